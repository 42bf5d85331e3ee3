/* The rule by which a switch adds packets; `switch/aggregator.py` is the same in Python, and says why it is as it is.
 *
 * Compiles into the user-space switch, the XDP program and the library that the tests use. No libc, no floating point,
 * no memory of its own, no clock. At most one packet leaves for each that comes.
 */
#ifndef EVENKEEL_RULE_H
#define EVENKEEL_RULE_H

#include "packet.h"

enum ek_policy {
	EK_UNLIMITED = 0,
	EK_ATP = 1,
	EK_ATP_FREE = 2,
	EK_SWITCHML = 3,
	EK_ESA = 4,
	EK_ASSOC = 5,
};

/* What is counted, behind the reasons of packet.h. Each packet counts once up to EK_ANSWERED. */
enum ek_event {
	EK_INSTALLED = EK_REASONS, /* took an empty slot */
	EK_ADDED,
	EK_COMPLETED,
	EK_EVICTED,   /* took the slot of another fragment, whose partial sum left for the server */
	EK_BYPASSED,  /* no slot: went to the server by itself */
	EK_FLUSHED,   /* a resend or a reminder took along what the slot held */
	EK_BOUNCED,   /* a reminder of a fragment that is not here */
	EK_RESENT,    /* a resend of a fragment that is not here */
	EK_FORWARDED, /* a result or a NACK */
	EK_ANSWERED,  /* SwitchML: the worker got the result again */
	EK_RELEASED,  /* slots freed by a result */
	EK_RECLAIMED, /* slots taken from an epoch or a job that is over */
	EK_ENTOMBED,  /* bypassed though there may have been room, since others of the fragment were */
	EK_LOST,      /* in the kernel: a frame could not be lengthened for what should leave */
	EK_COUNTERS,
};

enum ek_to { EK_NOBODY = 0, EK_SERVER = 1, EK_WORKERS = 2, EK_ALL = 3, EK_SENDER = 4 };

#define EK_SERVER_ID 32 /* as the sender; below are the workers */

struct ek_job {
	uint64_t token; /* 0: there is no such job */
	uint32_t epoch;
	uint32_t largest; /* that a raw lane stands for */
	uint16_t words;	  /* of a fragment's sums */
	uint8_t workers;
	uint8_t lanes;
	uint8_t via_server; /* finished sums go to the server only, which alone says what the result is */
	uint8_t zero; /* always 0, which BPF's verifier does not know */
	uint8_t unused[2];
};

struct ek_slot {
	uint64_t token;
	uint64_t touched; /* when something was last added */
	uint32_t job;
	uint32_t fragment;
	uint32_t epoch;
	uint32_t bitmap; /* 0: empty */
	uint8_t priority;
	uint8_t done; /* complete, and kept until the policy lets go of it */
	uint8_t unused[6];
};

struct ek_rule {
	uint32_t policy;
	uint32_t sets; /* a power of two */
	uint32_t ways; /* slots of a set; more than one for EK_ASSOC only */
	uint32_t words; /* of a slot, at least those of every job */
	uint32_t regions; /* a power of two: EK_UNLIMITED and EK_SWITCHML cut the slots evenly among as many jobs */
	uint32_t tombs;	  /* a power of two, EK_ASSOC only */
	uint64_t stale_ns; /* after this time without progress whoever comes may take a slot */
	uint64_t tomb_ns;  /* EK_ASSOC: how long a tombstone counts if no result clears it */
};

/* Where the words of a fragment are known when it is compiled, loops need no other bound, and BPF's verifier is content. */
#ifdef EK_WORDS
#define EK_WORDS_OF(job) ((uint32_t)EK_WORDS)
#else
#define EK_WORDS_OF(job) ((uint32_t)(job)->words)
#endif

/* BPF's verifier goes through all that follows once for each value that it knows `way` to have; now it knows but the range. */
#ifdef __bpf__
#define EK_BLURRED(way, job) (((way) + (job)->zero) & (EK_WAYS - 1))
#else
#define EK_BLURRED(way, job) (way)
#endif

struct ek_sent {
	uint8_t to;	/* enum ek_to */
	uint8_t filled; /* the packet is what was written to `out`; otherwise it is the one that came */
	uint8_t counted; /* reason or event */
};

/* BPF's compiler unrolls little of itself. */
#ifdef __bpf__
#define EK_UNROLLED _Pragma("clang loop unroll_count(10)")
#else
#define EK_UNROLLED
#endif

/* ---- lanes: words of eight bytes that are added as a whole, since no lane can carry ---- */

EK_INLINE int ek_doubles(uint8_t lanes)
{
	return lanes == EK_NIBBLES || lanes == EK_THC;
}

EK_INLINE uint32_t ek_raw_words(const struct ek_job *job)
{
	return ek_doubles(job->lanes) ? EK_WORDS_OF(job) / 2u : EK_WORDS_OF(job);
}

EK_INLINE uint64_t ek_load(const uint64_t *from)
{
	uint64_t word;

	__builtin_memcpy(&word, from, sizeof(word)); /* packets lie anywhere */
	return word;
}

EK_INLINE void ek_store(uint64_t *to, uint64_t word)
{
	__builtin_memcpy(to, &word, sizeof(word));
}

/* Spreads 8 lanes of 4 bits over 8 bytes. */
EK_INLINE uint64_t ek_spread(uint64_t x)
{
	x = (x | x << 16) & 0x0000ffff0000ffffull;
	x = (x | x << 8) & 0x00ff00ff00ff00ffull;
	return (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
}

/* THC's table of granularity 17 where `ones` has a 1 in each byte: k, one more if k > 0, one more if k = 15. Where it has
 * none: k. */
EK_INLINE uint64_t ek_look_up(uint64_t k, uint64_t ones)
{
	return k + ((k + 0x7f7f7f7f7f7f7f7full) >> 7 & ones) + ((k + 0x7171717171717171ull) >> 7 & ones);
}

/* What to do with a slot's words and a packet's. */
enum ek_do { EK_DO_ADD, EK_DO_INSTALL, EK_DO_SWAP, EK_DO_FINISH, EK_DO_HOLD, EK_DO_PASS };

EK_INLINE void ek_word(const int what, uint64_t *slot, uint64_t x, uint64_t *out)
{
	uint64_t old = what == EK_DO_PASS || what == EK_DO_INSTALL ? 0 : *slot;

	if (what == EK_DO_PASS) {
		ek_store(out, x);
	} else if (what == EK_DO_ADD) {
		*slot = old + x;
	} else if (what == EK_DO_INSTALL) {
		*slot = x;
	} else if (what == EK_DO_SWAP) {
		*slot = x;
		ek_store(out, old);
	} else if (what == EK_DO_FINISH) {
		ek_store(out, old + x);
	} else {
		*slot = old + x;
		ek_store(out, old + x);
	}
}

/* `doubles`: raw lanes have half the width of sums. Otherwise `out` may be `in`. */
EK_INLINE void ek_lanes(const int what, const int doubles, uint8_t lanes, uint32_t words, uint64_t *slot,
			const uint64_t *in, uint64_t *out)
{
	uint64_t ones = lanes == EK_THC ? 0x0101010101010101ull : 0;
	uint32_t i;

	if (doubles) {
		EK_UNROLLED
		for (i = 0; i < words / 2; i++) {
			uint64_t x = ek_load(in + i);

			ek_word(what, slot + 2 * i, ek_look_up(ek_spread(x & 0xffffffffu), ones), out + 2 * i);
			ek_word(what, slot + 2 * i + 1, ek_look_up(ek_spread(x >> 32), ones), out + 2 * i + 1);
		}
	} else {
		EK_UNROLLED
		for (i = 0; i < words; i++)
			ek_word(what, slot + i, ek_load(in + i), out + i);
	}
}

EK_INLINE void ek_take(uint32_t words, const uint64_t *slot, uint64_t *out)
{
	uint32_t i;

	EK_UNROLLED
	for (i = 0; i < words; i++)
		ek_store(out + i, slot[i]);
}

/* Is every raw lane at most the job's largest? All lanes of a word at once: one is too large if its top bit is set, or if
 * adding what the largest lacks to half the range sets it; where the largest has the top bit itself, if both. A carry into
 * the next lane needs a top bit, and is an alarm of its own in the first case; in the second it is cut off before. */
EK_INLINE int ek_in_bound(uint8_t lanes, uint32_t largest, uint32_t words, const uint64_t *in)
{
	uint64_t top = lanes == EK_BYTES ? 0x8080808080808080ull : lanes == EK_SHORTS ? 0x8000800080008000ull
										      : 0x8000000080000000ull;
	uint64_t ones = lanes == EK_BYTES ? 0x0101010101010101ull : lanes == EK_SHORTS ? 0x0001000100010001ull
										       : 0x0000000100000001ull;
	uint64_t half = lanes == EK_BYTES ? 0x80 : lanes == EK_SHORTS ? 0x8000 : 0x80000000u;
	uint64_t missing = (half - 1 - (largest & (half - 1))) * ones;
	uint64_t bad = 0, other = 0, more = 0, others = 0; /* several, so that no word waits for the one before */
	uint32_t i;

	if (ek_doubles(lanes))
		return 1;
	if (largest >= half) {
		EK_UNROLLED
		for (i = 0; i < words; i++) {
			uint64_t x = ek_load(in + i);

			bad |= x & ((x & ~top) + missing);
		}
		return !(bad & top);
	}
	EK_UNROLLED
	for (i = 0; i < words / 2; i++) {
		uint64_t x = ek_load(in + 2 * i), y = ek_load(in + 2 * i + 1);

		bad |= x;
		more |= x + missing;
		other |= y;
		others |= y + missing;
	}
	if (words & 1) {
		bad |= ek_load(in + words - 1);
		more |= ek_load(in + words - 1) + missing;
	}
	return !((bad | other | more | others) & top);
}

/* ---- which packets may come, and where they belong ---- */

EK_INLINE uint32_t ek_all(const struct ek_job *job)
{
	return job->workers >= 32 ? 0xffffffffu : (1u << job->workers) - 1;
}

/* May this packet be looked at? All but its lanes; changes nothing. `job` is jobs[header->job], if there is one. */
EK_INLINE enum ek_reason ek_admit(const struct ek_job *job, const struct ek_header *header, uint32_t sender)
{
	uint32_t kind = header->kind, raw = kind == EK_GRADIENT || kind == EK_RESEND;

	if (kind == EK_PARTIAL || kind == EK_CONTROL)
		return EK_BAD_KIND;
	if (!job->token)
		return EK_BAD_JOB;
	if (header->token != job->token)
		return EK_BAD_TOKEN;
	if (header->lanes != job->lanes)
		return EK_BAD_LANE_TYPE;
	if (raw ? header->words != ek_raw_words(job) : header->words > job->words)
		return EK_BAD_LENGTH;
	if (header->bitmap & ~ek_all(job))
		return EK_BAD_BITMAP;
	if (raw && (sender >= job->workers || header->bitmap != 1u << sender))
		return EK_BAD_SENDER;
	if (kind == EK_RESULT && sender >= job->workers && sender != EK_SERVER_ID)
		return EK_BAD_SENDER;
	if ((kind == EK_REMINDER || kind == EK_NACK) && sender != EK_SERVER_ID)
		return EK_BAD_SENDER;
	if (header->epoch < job->epoch)
		return EK_BAD_EPOCH;
	return EK_OK;
}

EK_INLINE uint32_t ek_mix(uint32_t x)
{
	x ^= x >> 16;
	x *= 0x7feb352du;
	x ^= x >> 15;
	x *= 0x846ca68bu;
	return x ^ x >> 16;
}

EK_INLINE uint32_t ek_hash(uint32_t job, uint32_t fragment)
{
	return ek_mix(fragment * 0x9e3779b1u ^ job * 0x85ebca6bu);
}

EK_INLINE uint32_t ek_set_of(const struct ek_rule *rule, const struct ek_header *header)
{
	uint32_t region = rule->sets / rule->regions;

	if (rule->policy == EK_UNLIMITED || rule->policy == EK_SWITCHML)
		return (header->job & (rule->regions - 1)) * region + (header->fragment & (region - 1));
	return ek_hash(header->job, header->fragment) & (rule->sets - 1);
}

/* Tombstones: what lies at a fragment's place is the fragment's own if its tag is, and old after rule->tomb_ns. */
EK_INLINE uint64_t *ek_tomb_of(const struct ek_rule *rule, uint64_t *tombs, uint32_t job, uint32_t fragment)
{
	return tombs + (ek_mix(ek_hash(job, fragment) + 0x9e3779b9u) & (rule->tombs - 1));
}

/* In units of 1,024 ns, from 1 on, above 16 bits of tag. */
EK_INLINE uint64_t ek_tomb(uint32_t job, uint32_t fragment, uint64_t now)
{
	return ((now >> 10) + 1) << 16 | ek_mix(ek_hash(job, fragment) + 0x3c6ef372u) >> 16;
}

EK_INLINE int ek_buried(const struct ek_rule *rule, uint64_t there, uint64_t mine)
{
	return there && (there & 0xffff) == (mine & 0xffff) && (mine >> 16) - (there >> 16) < rule->tomb_ns >> 10;
}

EK_INLINE int ek_live(const struct ek_job *jobs, const struct ek_slot *slot)
{
	const struct ek_job *job = jobs + (slot->job & (EK_MAX_JOBS - 1));

	return slot->bitmap && slot->token == job->token && slot->epoch == job->epoch;
}

EK_INLINE uint64_t ek_waited(const struct ek_slot *slot, uint64_t now)
{
	return now > slot->touched ? now - slot->touched : 0;
}

/* 16 * log2(x) for x >= 1, linear between powers of two, rounded down. Without branches, which BPF's verifier would have to
 * go through one by one. */
EK_INLINE uint32_t ek_log(uint64_t x)
{
	uint64_t below = x | x >> 1;
	uint32_t power;

	below |= below >> 2;
	below |= below >> 4;
	below |= below >> 8;
	below |= below >> 16;
	below |= below >> 32;
	power = ek_count((uint32_t)below) + ek_count((uint32_t)(below >> 32)) - 1;
	return 16 * power + (uint32_t)(x << (63 - power) >> 59 & 15);
}

/* What EK_ASSOC loses by taking a slot, on the scale of priorities, where 16 is a factor of two: more the more urgent it
 * is and the more packets its loss sends to the server, less the longer it has waited. */
EK_INLINE uint32_t ek_worth(const struct ek_job *jobs, const struct ek_slot *slot, uint64_t now)
{
	uint32_t missing = jobs[slot->job & (EK_MAX_JOBS - 1)].workers - ek_count(slot->bitmap);

	return 1024 + slot->priority + ek_log(missing + 1) - ek_log(ek_waited(slot, now) + 1);
}

/* ---- the rule ---- */

EK_INLINE void ek_write(struct ek_header *out, const struct ek_slot *slot, const struct ek_job *job, uint8_t kind)
{
	out->magic = EK_MAGIC;
	out->version = EK_VERSION;
	out->kind = kind;
	out->lanes = job->lanes;
	out->priority = slot->priority;
	out->words = job->words;
	out->token = slot->token;
	out->job = slot->job;
	out->fragment = slot->fragment;
	out->bitmap = slot->bitmap;
	out->epoch = slot->epoch;
}

EK_INLINE struct ek_sent ek_send(uint64_t *counters, uint32_t event, uint32_t to, uint32_t filled)
{
	struct ek_sent sent = {to, filled, event};

	counters[event]++;
	return sent;
}

EK_INLINE void ek_fill(struct ek_slot *slot, const struct ek_header *header, uint64_t now)
{
	slot->token = header->token;
	slot->touched = now;
	slot->job = header->job;
	slot->fragment = header->fragment;
	slot->epoch = header->epoch;
	slot->bitmap = header->bitmap;
	slot->priority = header->priority;
	slot->done = 0;
}

/* The way of the set that holds this fragment, or rule->ways. */
EK_INLINE uint32_t ek_find(const struct ek_rule *rule, const struct ek_slot *set, const struct ek_header *header)
{
	uint32_t way, found = rule->ways;

	for (way = 0; way < rule->ways; way++)
		if (set[way].bitmap && set[way].token == header->token && set[way].job == header->job &&
		    set[way].fragment == header->fragment && set[way].epoch == header->epoch)
			found = way;
	return found;
}

/* What an admitted packet without raw lanes does to its set: a reminder, a NACK, a result. `out` and `out_words` get what
 * leaves, if it is not the packet itself. */
EK_INLINE struct ek_sent ek_signal(const struct ek_rule *rule, const struct ek_job *jobs, struct ek_slot *set,
				   uint64_t *sums, uint64_t *tombs, uint64_t *counters, const struct ek_header *came,
				   uint32_t sender, uint64_t now, struct ek_header *out, uint64_t *out_words)
{
	const struct ek_job *job = jobs + (came->job & (EK_MAX_JOBS - 1));
	uint32_t found = ek_find(rule, set, came), here = found < rule->ways;

	if (came->kind == EK_RESULT && sender != EK_SERVER_ID) /* a worker answers the server */
		return ek_send(counters, EK_FORWARDED, EK_SERVER, 0);
	if (came->kind == EK_NACK)
		return ek_send(counters, EK_FORWARDED, EK_WORKERS, 0);
	if (rule->policy == EK_ASSOC) {
		uint64_t *tomb = ek_tomb_of(rule, tombs, came->job, came->fragment);
		uint64_t mine = ek_tomb(came->job, came->fragment, now);

		/* Who was left out of a result comes too late: straight to the server. */
		if (came->kind != EK_RESULT || came->bitmap != ek_all(job))
			*tomb = mine;
		else if ((*tomb & 0xffff) == (mine & 0xffff))
			*tomb = 0;
	}
	if (came->kind == EK_RESULT) {
		if (here) {
			found = EK_BLURRED(found, job);
			set[found].bitmap = 0;
			counters[EK_RELEASED]++;
		}
		return ek_send(counters, EK_FORWARDED, EK_WORKERS, 0);
	}
	if (!here)
		return ek_send(counters, EK_BOUNCED, EK_SERVER, 0);
	found = EK_BLURRED(found, job);
	ek_take(EK_WORDS_OF(job), sums + found * rule->words, out_words);
	ek_write(out, set + found, job, EK_PARTIAL);
	set[found].bitmap = 0;
	return ek_send(counters, EK_FLUSHED, EK_SERVER, 1);
}

/* What an admitted gradient or resend does to its set, whose lanes are in bound and whose epoch is its job's.
 *
 * `out` and `out_words` get what leaves, if it is not the packet itself. `out_words` may be `in` unless `doubles`, if all
 * jobs have one length.
 */
EK_INLINE struct ek_sent ek_gradient(const struct ek_rule *rule, const struct ek_job *jobs, struct ek_slot *set,
				     uint64_t *sums, uint64_t *tombs, uint64_t *counters, const struct ek_header *came,
				     const uint64_t *in, const int doubles, uint64_t now, struct ek_header *out,
				     uint64_t *out_words)
{
	const struct ek_job *job = jobs + (came->job & (EK_MAX_JOBS - 1));
	const uint32_t policy = rule->policy, all = ek_all(job), words = EK_WORDS_OF(job);
	const int echoed = policy == EK_ATP || (job->via_server && policy != EK_SWITCHML);
	const uint8_t lanes = job->lanes;
	uint32_t way, found = ek_find(rule, set, came), here = found < rule->ways, chosen = 0, least = 0xffffffffu;
	uint64_t *tomb = policy == EK_ASSOC ? ek_tomb_of(rule, tombs, came->job, came->fragment) : 0;
	struct ek_slot *slot = set, leaving;
	const struct ek_job *its;

	if (here) {
		found = EK_BLURRED(found, job);
		slot = set + found;
		sums += found * rule->words;
	}
	if (came->kind == EK_RESEND && policy != EK_SWITCHML) {
		if (policy == EK_ASSOC)
			*tomb = ek_tomb(came->job, came->fragment, now);
		if (!here)
			return ek_send(counters, EK_RESENT, EK_SERVER, 0);
		if (slot->bitmap & came->bitmap) {
			ek_take(words, sums, out_words);
		} else {
			slot->bitmap |= came->bitmap;
			ek_lanes(EK_DO_FINISH, doubles, lanes, words, sums, in, out_words);
		}
		ek_write(out, slot, job, EK_PARTIAL);
		slot->bitmap = 0;
		return ek_send(counters, EK_FLUSHED, EK_SERVER, 1);
	}
	if (came->bitmap == all) { /* of a job with one worker */
		ek_lanes(EK_DO_PASS, doubles, lanes, words, sums, in, out_words);
		ek_fill(&leaving, came, now);
		ek_write(out, &leaving, job, echoed ? EK_PARTIAL : EK_RESULT);
		return ek_send(counters, EK_COMPLETED, echoed ? EK_SERVER : EK_ALL, 1);
	}
#ifdef EK_ADDS_AGAIN /* to time adding by one packet that comes many times */
	if (here)
		slot->bitmap &= ~came->bitmap;
#endif
	if (here && slot->bitmap & came->bitmap) {
		if (policy != EK_SWITCHML || !slot->done)
			return ek_send(counters, EK_DUPLICATE, EK_NOBODY, 0);
		ek_take(words, sums, out_words);
		ek_write(out, slot, job, EK_RESULT);
		return ek_send(counters, EK_ANSWERED, EK_SENDER, 1);
	}
	if (here) {
		if (slot->priority < came->priority)
			slot->priority = came->priority;
		slot->touched = now;
		slot->bitmap |= came->bitmap;
		if (slot->bitmap != all) {
			ek_lanes(EK_DO_ADD, doubles, lanes, words, sums, in, out_words);
			return ek_send(counters, EK_ADDED, EK_NOBODY, 0);
		}
		ek_write(out, slot, job, echoed ? EK_PARTIAL : EK_RESULT);
		if (policy == EK_ATP || policy == EK_SWITCHML) {
			ek_lanes(EK_DO_HOLD, doubles, lanes, words, sums, in, out_words);
			slot->done = 1;
		} else {
			ek_lanes(EK_DO_FINISH, doubles, lanes, words, sums, in, out_words);
			slot->bitmap = 0;
		}
		return ek_send(counters, EK_COMPLETED, echoed ? EK_SERVER : EK_ALL, 1);
	}

	/* No slot holds its fragment. Which one would it take? */
	if (policy == EK_ASSOC && ek_buried(rule, *tomb, ek_tomb(came->job, came->fragment, now))) {
		counters[EK_ENTOMBED]++;
		return ek_send(counters, EK_BYPASSED, EK_SERVER, 0);
	}
	for (way = 0; way < rule->ways; way++) {
		uint32_t worth = 0;

		if (ek_live(jobs, set + way))
			worth = policy == EK_ASSOC ? ek_worth(jobs, set + way, now) : 1;
		if (worth < least) {
			least = worth;
			chosen = way;
		}
	}
	chosen = EK_BLURRED(chosen, job);
	slot = set + chosen;
	sums += chosen * rule->words;
	if (!least) {
		if (slot->bitmap)
			counters[EK_RECLAIMED]++;
		ek_lanes(EK_DO_INSTALL, doubles, lanes, words, sums, in, out_words);
		ek_fill(slot, came, now);
		return ek_send(counters, EK_INSTALLED, EK_NOBODY, 0);
	}
	if (policy == EK_SWITCHML) {
		/* Who sends f has the result of f - region, so all have that of what is here: it may go. */
		if (slot->job != came->job || (int32_t)(came->fragment - slot->fragment) < 0)
			return ek_send(counters, EK_STALE, EK_NOBODY, 0);
		ek_lanes(EK_DO_INSTALL, doubles, lanes, words, sums, in, out_words);
		ek_fill(slot, came, now);
		return ek_send(counters, EK_INSTALLED, EK_NOBODY, 0);
	}
	if (!(ek_waited(slot, now) >= rule->stale_ns || policy == EK_ASSOC ||
	      (policy == EK_UNLIMITED && slot->job == came->job && (int32_t)(came->fragment - slot->fragment) > 0) ||
	      (policy == EK_ESA && came->priority > slot->priority))) {
		if (policy == EK_ESA)
			slot->priority >>= 1;
		return ek_send(counters, EK_BYPASSED, EK_SERVER, 0);
	}
	its = jobs + (slot->job & (EK_MAX_JOBS - 1));
	if (policy == EK_ASSOC)
		*ek_tomb_of(rule, tombs, slot->job, slot->fragment) = ek_tomb(slot->job, slot->fragment, now);
	ek_write(out, slot, its, EK_PARTIAL);
	ek_fill(slot, came, now);
	if (EK_WORDS_OF(its) == words) {
		ek_lanes(EK_DO_SWAP, doubles, lanes, words, sums, in, out_words);
	} else {
		ek_take(EK_WORDS_OF(its), sums, out_words);
		ek_lanes(EK_DO_INSTALL, doubles, lanes, words, sums, in, out_words);
	}
	return ek_send(counters, EK_EVICTED, EK_SERVER, 1);
}

/* Either of them, for an admitted packet. `out` and `out_words` are memory of their own. */
EK_INLINE struct ek_sent ek_apply(const struct ek_rule *rule, const struct ek_job *jobs, struct ek_slot *set,
				  uint64_t *sums, uint64_t *tombs, uint64_t *counters, const struct ek_header *came,
				  const uint64_t *in, uint32_t sender, uint64_t now, struct ek_header *out,
				  uint64_t *out_words)
{
	if (came->kind != EK_GRADIENT && came->kind != EK_RESEND)
		return ek_signal(rule, jobs, set, sums, tombs, counters, came, sender, now, out, out_words);
	if (ek_doubles(came->lanes))
		return ek_gradient(rule, jobs, set, sums, tombs, counters, came, in, 1, now, out, out_words);
	return ek_gradient(rule, jobs, set, sums, tombs, counters, came, in, 0, now, out, out_words);
}

#ifndef __bpf__
/* A whole switch in memory that its owner provides, zeroed. */
struct ek_table {
	struct ek_rule rule;
	struct ek_job *jobs;	 /* [EK_MAX_JOBS] */
	struct ek_slot *slots;	 /* [sets * ways] */
	uint64_t *sums;		 /* [sets * ways * rule.words] */
	uint64_t *tombs;	 /* [rule.tombs] */
	uint64_t *counters;	 /* [EK_COUNTERS] */
};

/* Does all that a switch does with what came in a datagram of `length` bytes. `out_words` has room for rule.words. */
EK_INLINE struct ek_sent ek_step(struct ek_table *table, const struct ek_header *header, uint32_t length,
				 uint32_t sender, uint64_t now, struct ek_header *out, uint64_t *out_words)
{
	const struct ek_rule *rule = &table->rule;
	const uint64_t *in = (const uint64_t *)(header + 1);
	enum ek_reason reason = ek_parse(header, length);
	struct ek_job *job;
	uint32_t set;

	if (!reason && header->job >= EK_MAX_JOBS)
		reason = EK_BAD_JOB;
	if (reason)
		return ek_send(table->counters, reason, EK_NOBODY, 0);
	job = table->jobs + header->job;
	reason = ek_admit(job, header, sender);
	if (!reason && (header->kind == EK_GRADIENT || header->kind == EK_RESEND) &&
	    !ek_in_bound(job->lanes, job->largest, header->words, in))
		reason = EK_BAD_BOUND;
	if (reason)
		return ek_send(table->counters, reason, EK_NOBODY, 0);
	job->epoch = header->epoch;
	set = ek_set_of(rule, header);
	return ek_apply(rule, table->jobs, table->slots + set * rule->ways,
			table->sums + (uint64_t)set * rule->ways * rule->words,
			table->tombs, table->counters, header, in, sender, now, out, out_words);
}
#endif

#endif
