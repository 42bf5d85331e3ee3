/* Adds what workers send, answers who lacks a result, and calls in what it lacks itself: a parameter server, also that
 * behind a switch in the kernel, and with the switch's rule in front of it the switch in user space.
 *
 * A job is opened by its workers' HELLOs, which must agree. Of each fragment a ring of entries keeps who is in it, the
 * sums while it is open, and the result packet once it is done, so that whoever lost it gets it again. An entry is used
 * again only when every worker has said that it has the result (`low`), so no worker is ever left behind.
 *
 * Every packet's token, epoch, worker and size are checked; what does not fit is counted by its reason and dropped.
 */
#include "wire.h"
#include "control.h"
#include "rule.h"

#define MAX_JOBS 64
#define MAX_WORKERS EK_MAX_WORKERS
#define MAX_PACKET (EK_HEADER_BYTES + 8 * EK_MAX_WORDS)
#define ASKS_ENOUGH 2 /* for a fragment, of each worker on average */
#define REORDERED 8 /* packets of a worker that may overtake another before that one counts as lost */

enum { FREE, OPEN, DONE };

enum counter {
	PACKETS, RESULTS, RESULTS_AGAIN, NACKS, QUERIES, REMINDERS, PARTIALS, LEFT_OUT, LATE, DUPLICATES, INJECTED_IN, INJECTED_OUT,
	BAD_OLD, BAD_AHEAD, BAD_OVERLAP,
	/* as in `enum ek_reason`, in its order */
	BAD_SHORT, BAD_MAGIC, BAD_VERSION, BAD_KIND, BAD_LANE_TYPE, BAD_LENGTH, BAD_BITMAP, BAD_JOB, BAD_TOKEN, BAD_SENDER,
	BAD_EPOCH, BAD_BOUND, REFUSALS, JOBS, BYTES_IN, BYTES_OUT, COUNTERS
};

struct entry {
	uint32_t fragment;
	uint32_t seen;   /* whose packets came by, whatever became of them */
	uint32_t bitmap; /* who is in the sums */
	uint32_t waiting; /* who has asked for the result */
	uint8_t state;
	uint8_t asks;    /* how often */
	uint8_t reminders;
	uint64_t first_ns;
};

struct job {
	int used, enrolled;
	uint32_t name, number, epoch, full, joined, late, ring, span, highest, open_from, safe_from;
	uint64_t token, heard_ns;
	struct ek_hello terms;
	int up_bytes, sum_bytes, down_bytes, lane_bytes;
	struct sockaddr_in address[MAX_WORKERS];
	uint32_t low[MAX_WORKERS], reached[MAX_WORKERS], checked[MAX_WORKERS];
	struct entry *entries;
	uint8_t *sums, *results;
	/* what this batch leaves to be sent */
	uint32_t *done, dones;
	uint32_t *again[MAX_WORKERS], agains[MAX_WORKERS];
	uint32_t lacking[MAX_WORKERS][EK_MAX_LISTED], lackings[MAX_WORKERS];
	uint32_t alive; /* workers that asked, and learn that we live */
};

/* What is to be known of a job for letting its packets into the switch in the kernel. */
struct ek_asked {
	uint64_t token;
	uint32_t job, epoch, workers, joined, words, lanes, via_server;
	uint32_t addresses[MAX_WORKERS];
	uint32_t ports[MAX_WORKERS];
	char why[200]; /* written: the reason of a refusal */
};

/* Gives the number by which the job's packets go. -1: not yet, or for the reason that was written. Of a job that nobody
 * has joined it is told that it is over. */
typedef int (*registrar)(struct ek_asked *asked);

struct server {
	int fd, segments, pack;
	registrar enroll; /* where a switch in the kernel adds before us */
	struct ek_shape shape;
	struct ek_table *table; /* of the rule that adds before us, if it is in this process */
	uint64_t boot, seed, in_share, out_share, in_count, out_count;
	uint32_t ring_most;
	size_t job_bytes_most;
	uint64_t counters[COUNTERS];
	struct inbox inbox;
	struct job jobs[MAX_JOBS];
	struct iovec *pieces;
	uint8_t scratch[MAX_PACKET];
	uint64_t out[EK_MAX_WORDS];
};

static uint32_t bits_of(uint32_t workers) { return workers >= 32 ? 0xffffffffu : (1u << workers) - 1; }

static int lane_bytes_of(uint32_t type) { return type == EK_INTS ? 4 : type == EK_SHORTS ? 2 : 1; }

static int is_nibbles(uint32_t type) { return type == EK_NIBBLES || type == EK_THC; }

static void describe(const struct job *job, struct ek_asked *asked)
{
	*asked = (struct ek_asked){
		.token = job->token,
		.job = job->number,
		.epoch = job->epoch,
		.workers = job->terms.world,
		.joined = job->joined,
		.words = job->sum_bytes / 8,
		.lanes = job->terms.lane_type,
		.via_server = job->terms.deadline_ns > 0,
	};
	for (uint32_t w = 0; w < job->terms.world; w++) {
		asked->addresses[w] = ntohl(job->address[w].sin_addr.s_addr);
		asked->ports[w] = ntohs(job->address[w].sin_port);
	}
}

static void job_free(struct server *s, struct job *job)
{
	if (s->table)
		s->table->jobs[job - s->jobs] = (struct ek_job){0};
	free(job->entries);
	free(job->sums);
	free(job->results);
	free(job->done);
	for (int w = 0; w < MAX_WORKERS; w++)
		free(job->again[w]);
	memset(job, 0, sizeof *job);
}

static struct job *job_find(struct server *s, uint32_t number, uint64_t token)
{
	for (int i = 0; i < MAX_JOBS; i++)
		if (s->jobs[i].used && s->jobs[i].number == number && s->jobs[i].token == token)
			return &s->jobs[i];
	return NULL;
}

/* The same by the name that the job has among its workers. */
static struct job *job_named(struct server *s, uint32_t name, uint64_t token)
{
	for (int i = 0; i < MAX_JOBS; i++)
		if (s->jobs[i].used && s->jobs[i].name == name && s->jobs[i].token == token)
			return &s->jobs[i];
	return NULL;
}

static void say(struct server *s, const struct sockaddr_in *to, const struct ek_header *about, enum ek_word word,
		const void *body, uint32_t count, uint32_t bytes)
{
	struct ek_header *p = (void *)s->scratch;
	struct ek_control *c = (void *)(s->scratch + EK_HEADER_BYTES);
	uint32_t words = (sizeof *c + bytes + 7) / 8;

	*p = *about;
	p->magic = EK_MAGIC;
	p->version = EK_VERSION;
	p->kind = EK_CONTROL;
	p->lanes = EK_NO_LANES;
	p->words = words;
	*c = (struct ek_control){word, count};
	memset(s->scratch + EK_CONTROL_BYTES, 0, 8 * words - sizeof *c);
	memcpy(s->scratch + EK_CONTROL_BYTES, body, bytes);
	send_one(s->fd, to, s->scratch, EK_HEADER_BYTES + 8 * words);
}

static void refuse(struct server *s, const struct sockaddr_in *to, const struct ek_header *about, const char *why)
{
	s->counters[REFUSALS]++;
	say(s, to, about, EK_REFUSED, why, strlen(why), strlen(why));
}

static struct job *job_open(struct server *s, const struct ek_header *p, const struct ek_hello *h)
{
	struct job *job = NULL;
	uint64_t now = now_ns();
	size_t stride;

	for (int i = 0; i < MAX_JOBS && !job; i++)
		if (!s->jobs[i].used)
			job = &s->jobs[i];
	if (!job) { /* the one that has been silent longest, if that is long */
		for (int i = 0; i < MAX_JOBS; i++)
			if (!job || s->jobs[i].heard_ns < job->heard_ns)
				job = &s->jobs[i];
		if (now - job->heard_ns < 60000000000ull)
			return NULL;
		if (s->enroll) {
			struct ek_asked over;

			describe(job, &over);
			over.joined = 0;
			s->enroll(&over);
		}
		job_free(s, job);
	}
	job->token = p->token;
	job->epoch = p->epoch;
	job->terms = *h;
	job->full = bits_of(h->world);
	job->lane_bytes = lane_bytes_of(h->lane_type);
	job->sum_bytes = h->lanes * job->lane_bytes;
	job->up_bytes = is_nibbles(h->lane_type) ? job->sum_bytes / 2 : job->sum_bytes;
	job->down_bytes = h->sum_bits ? h->lanes / 8 * h->sum_bits : (uint32_t)job->sum_bytes;
	stride = job->sum_bytes + EK_HEADER_BYTES + job->down_bytes + sizeof(struct entry) + 4 * (h->world + 1);
	job->ring = s->ring_most;
	while (job->ring > 64 && job->ring * stride > s->job_bytes_most)
		job->ring /= 2;
	job->span = job->ring / 4;
	job->entries = calloc(job->ring, sizeof *job->entries);
	job->sums = malloc((size_t)job->ring * job->sum_bytes);
	job->results = malloc((size_t)job->ring * (EK_HEADER_BYTES + job->down_bytes));
	job->done = malloc((size_t)job->ring * 4);
	int failed = !job->entries || !job->sums || !job->results || !job->done;
	for (uint32_t w = 0; w < h->world; w++) {
		job->again[w] = malloc((size_t)job->ring * 4);
		failed |= !job->again[w];
	}
	if (failed) {
		job_free(s, job);
		return NULL;
	}
	job->used = 1;
	if (s->table) {
		uint64_t top = job->lane_bytes == 4 ? 0xffffffffull : (1ull << 8 * job->lane_bytes) - 1;

		s->table->jobs[job - s->jobs] = (struct ek_job){
			.token = job->token,
			.epoch = job->epoch,
			.largest = is_nibbles(h->lane_type) ? 17 : top / h->world, /* more could carry into the next lane */
			.words = job->sum_bytes / 8,
			.workers = h->world,
			.lanes = h->lane_type,
			.via_server = h->deadline_ns > 0,
		};
	}
	s->counters[JOBS]++;
	return job;
}

/* Lets a job into the switch in the kernel. Its workers hear WELCOME only then: nothing of it comes before. */
static int enroll(struct server *s, struct job *job, const struct sockaddr_in *to, const struct ek_header *about,
		  uint32_t wanted)
{
	struct ek_asked asked;
	int number;

	describe(job, &asked);
	if (asked.job == EK_NO_NUMBER)
		asked.job = wanted;
	number = s->enroll(&asked);
	if (number < 0) {
		asked.why[sizeof asked.why - 1] = 0;
		if (asked.why[0])
			refuse(s, to, about, asked.why);
		return 0;
	}
	job->number = number;
	job->enrolled = job->joined == job->full;
	return 1;
}

/* Opens a job, or lets a worker join it. */
static void take_hello(struct server *s, const struct sockaddr_in *from, const struct ek_header *p, int size)
{
	struct ek_hello h;
	struct job *job = job_named(s, p->job, p->token);
	struct ek_welcome welcome;
	uint32_t welcomed;
	int bytes, moved;

	if (size < EK_CONTROL_BYTES + (int)sizeof h) {
		s->counters[BAD_LENGTH]++;
		return;
	}
	memcpy(&h, (const uint8_t *)p + EK_CONTROL_BYTES, sizeof h);
	if (!s->pack) /* what adds before us gives plain lanes, so we do too */
		h.sum_bits = h.mapped = 0;
	if (h.world < 1 || h.world > MAX_WORKERS || h.worker >= h.world) {
		refuse(s, from, p, "a job has 1 to 32 workers, numbered from 0");
		return;
	}
	bytes = lane_bytes_of(h.lane_type);
	/* Lanes as they come are whole words; sums in fewer bits are if the lanes are a multiple of 64. */
	if (h.lane_type < EK_NIBBLES || h.lane_type > EK_INTS || h.lanes < 16 || h.lanes * bytes % 16 ||
	    (h.sum_bits && h.lanes % 64) || h.lanes > 8 * EK_MAX_WORDS || (int)h.lanes * bytes > 8 * EK_MAX_WORDS ||
	    (int)h.sum_bits > 8 * bytes || (h.mapped && bytes > 1)) {
		refuse(s, from, p, "lanes of such a type or number are not added here");
		return;
	}
	if (s->enroll && (h.lanes * bytes != 8 * s->shape.words || (s->shape.bytes_only && is_nibbles(h.lane_type)))) {
		refuse(s, from, p, "fragments do not have the length or the lanes of the switch in the kernel; "
				   "was it another kind of switch before?");
		return;
	}
	if (s->enroll && h.shards > 1) {
		refuse(s, from, p, "a job in the kernel's switch has one server: give one address");
		return;
	}
	if (h.world * (h.lane_type == EK_THC ? 17 : h.lane_type == EK_NIBBLES ? 15 : 1) > 255) {
		refuse(s, from, p, "a byte does not hold the sums of the nibbles of so many workers");
		return;
	}
	if (!h.shards || h.shard >= h.shards) {
		refuse(s, from, p, "a job's fragments are shared out over one server at least");
		return;
	}
	if (h.at_least > h.world || (h.deadline_ns && !h.at_least)) {
		refuse(s, from, p, "at_least must be 1 up to the number of workers");
		return;
	}
	if (job && p->epoch < job->epoch) {
		s->counters[BAD_EPOCH]++;
		refuse(s, from, p, "the job has begun a later epoch");
		return;
	}
	if (job && p->epoch > job->epoch) {
		job_free(s, job);
		job = NULL;
	}
	if (job) {
		struct ek_hello mine = job->terms, theirs = h;

		mine.worker = theirs.worker = mine.sent = theirs.sent = mine.low = theirs.low = 0;
		mine.number = theirs.number = 0;
		if (memcmp(&mine, &theirs, sizeof mine)) {
			refuse(s, from, p, "the workers of this job differ in their terms");
			return;
		}
	} else {
		job = job_open(s, p, &h);
		if (!job) {
			refuse(s, from, p, "there is no room for another job");
			return;
		}
		job->name = p->job;
		job->number = s->enroll ? EK_NO_NUMBER : p->job;
	}
	job->heard_ns = now_ns();
	moved = job->address[h.worker].sin_port != from->sin_port ||
		job->address[h.worker].sin_addr.s_addr != from->sin_addr.s_addr;
	job->address[h.worker] = *from;
	if (!(job->joined & 1u << h.worker)) {
		job->joined |= 1u << h.worker;
		job->low[h.worker] = h.low;
		/* A fragment that was under way before may be done elsewhere, so only a full sum of it is sure. */
		if ((int32_t)(h.sent - job->safe_from) > 0)
			job->safe_from = h.sent;
	}
	welcomed = 1u << h.worker;
	if (s->enroll && (moved || !job->enrolled)) {
		if (!enroll(s, job, from, p, h.number))
			return;
		welcomed = job->joined; /* those that came first have waited for this */
	}
	welcome = (struct ek_welcome){.boot = s->boot, .span = job->span, .sum_bits = h.sum_bits, .job = job->number};
	for (uint32_t w = 0; w < h.world; w++)
		if (welcomed >> w & 1)
			say(s, &job->address[w], p, EK_WELCOME, &welcome, sizeof welcome, sizeof welcome);
}

static struct ek_header *result_of(struct job *job, uint32_t at)
{
	return (void *)(job->results + (size_t)at * (EK_HEADER_BYTES + job->down_bytes));
}

static void pack_result(struct job *job, const uint8_t *sums, uint8_t *out)
{
	int bits = job->terms.sum_bits, lanes = job->terms.lanes;
	const uint8_t *map = job->terms.mapped ? job->terms.map : NULL;

	if (!bits || (bits == 8 * job->lane_bytes && !map)) {
		memcpy(out, sums, job->sum_bytes);
		return;
	}
	if (job->lane_bytes == 1) {
		for (int i = 0; i < lanes; i += 8) { /* eight lanes are `bits` whole bytes */
			uint64_t word = 0;

			for (int k = 0; k < 8; k++)
				word |= (uint64_t)(map ? map[sums[i + k]] : sums[i + k]) << (k * bits);
			memcpy(out, &word, bits);
			out += bits;
		}
		return;
	}
	for (int i = 0; i < lanes; i += 8) { /* eight lanes are `bits` whole bytes */
		unsigned __int128 word = 0;

		for (int k = 0; k < 8; k++) {
			uint64_t value;

			if (job->lane_bytes == 2)
				value = ((const uint16_t *)sums)[i + k];
			else
				value = ((const uint32_t *)sums)[i + k];
			if (bits <= 16)
				word |= (unsigned __int128)value << (k * bits);
			else { /* too wide for one word: bit by bit, seldom */
				for (int b = 0; b < bits; b++) {
					int place = k * bits + b;
					uint8_t mask = 1u << (place & 7), bit = value >> b & 1;

					out[place >> 3] = (out[place >> 3] & ~mask) | (bit ? mask : 0);
				}
			}
		}
		if (bits <= 16)
			memcpy(out, &word, bits);
		out += bits;
	}
}

/* Ends a fragment, and keeps its result. The workers get it, unless they have it from the switch. */
static void finish(struct server *s, struct job *job, uint32_t at, int tell)
{
	struct entry *e = &job->entries[at];
	struct ek_header *r = result_of(job, at);

	*r = (struct ek_header){
		.magic = EK_MAGIC,
		.version = EK_VERSION,
		.kind = EK_RESULT,
		.lanes = job->terms.lane_type,
		.words = job->down_bytes / 8,
		.token = job->token,
		.job = job->number,
		.fragment = e->fragment,
		.bitmap = e->bitmap,
		.epoch = job->epoch,
	};
	pack_result(job, job->sums + (size_t)at * job->sum_bytes, (uint8_t *)r + EK_HEADER_BYTES);
	e->state = DONE;
	if (tell && job->dones < job->ring)
		job->done[job->dones++] = at;
	s->counters[RESULTS]++;
}

static void add(uint32_t type, uint8_t *restrict sums, const uint8_t *restrict lanes, int count, int first)
{
	if (is_nibbles(type)) {
		int steps = type == EK_THC;

		for (int i = 0; i < count / 2; i++) {
			uint8_t low = lanes[i] & 15, high = lanes[i] >> 4;

			if (steps) {
				low += (low > 0) + (low == 15);
				high += (high > 0) + (high == 15);
			}
			sums[2 * i] = first ? low : sums[2 * i] + low;
			sums[2 * i + 1] = first ? high : sums[2 * i + 1] + high;
		}
	} else if (first) {
		memcpy(sums, lanes, (size_t)count * lane_bytes_of(type));
	} else if (type == EK_BYTES) {
		for (int i = 0; i < count; i++)
			sums[i] += lanes[i];
	} else if (type == EK_SHORTS) {
		for (int i = 0; i < count; i++) {
			uint16_t a, b;

			memcpy(&a, sums + 2 * i, 2);
			memcpy(&b, lanes + 2 * i, 2);
			a += b;
			memcpy(sums + 2 * i, &a, 2);
		}
	} else {
		for (int i = 0; i < count; i++) {
			uint32_t a, b;

			memcpy(&a, sums + 4 * i, 4);
			memcpy(&b, lanes + 4 * i, 4);
			a += b;
			memcpy(sums + 4 * i, &a, 4);
		}
	}
}

static void ask_for(struct server *s, struct job *job, int worker, uint32_t fragment)
{
	if (job->lackings[worker] < EK_MAX_LISTED) {
		job->lacking[worker][job->lackings[worker]++] = fragment;
		s->counters[NACKS]++;
	}
}

static void settle(struct server *s, struct job *job, uint32_t at, uint64_t now);

/* Adds lanes of one worker, or sums of several, to an open entry. */
static void merge(struct server *s, struct job *job, uint32_t at, uint32_t bits, int raw, const uint8_t *lanes)
{
	struct entry *e = &job->entries[at];
	uint32_t fresh = bits & ~e->bitmap;
	int first = !e->bitmap || bits == job->full;

	if (bits & e->bitmap && !first) {
		/* Bits that are new cannot be distinguished from those that are not: their workers send theirs alone. */
		s->counters[fresh ? BAD_OVERLAP : DUPLICATES]++;
		for (uint32_t w = 0; w < job->terms.world; w++)
			if (fresh & 1u << w)
				ask_for(s, job, w, e->fragment);
		e->seen &= ~fresh;
		return;
	}
	if (!raw && bits != job->full)
		s->counters[PARTIALS]++;
	add(!raw && is_nibbles(job->terms.lane_type) ? EK_BYTES : job->terms.lane_type,
	    job->sums + (size_t)at * job->sum_bytes, lanes, job->terms.lanes, first);
	e->bitmap |= bits;
}

/* Gives what the rule let out to the entry that it belongs to. */
static void take_sums(struct server *s, const struct ek_header *out, uint64_t now)
{
	struct job *job = &s->jobs[out->job];
	uint32_t at = out->fragment & (job->ring - 1);
	struct entry *e = &job->entries[at];

	if (!job->used || e->state != OPEN || e->fragment != out->fragment)
		return; /* done already */
	merge(s, job, at, out->bitmap, 0, (const uint8_t *)s->out);
	settle(s, job, at, now);
}

/* Has the rule give out what it holds of a fragment. */
static void remind(struct server *s, struct job *job, uint32_t at, uint64_t now)
{
	struct ek_header out, reminder = {
		.magic = EK_MAGIC,
		.version = EK_VERSION,
		.kind = EK_REMINDER,
		.lanes = job->terms.lane_type,
		.token = job->token,
		.job = job - s->jobs,
		.fragment = job->entries[at].fragment,
		.epoch = job->epoch,
	};
	struct ek_sent sent = ek_step(s->table, &reminder, sizeof reminder, EK_SERVER_ID, now, &out, s->out);

	if (sent.filled)
		merge(s, job, at, out.bitmap, 0, (const uint8_t *)s->out);
}

/* Ends a fragment if all are in it, or enough of them when its time is over. */
static void settle(struct server *s, struct job *job, uint32_t at, uint64_t now)
{
	struct entry *e = &job->entries[at];
	uint32_t missing = job->full & ~e->bitmap, there = s->table ? e->seen : e->bitmap;

	if (missing) {
		if (!job->terms.deadline_ns || job->joined != job->full || (int32_t)(e->fragment - job->safe_from) < 0)
			return;
		if (ek_count(there) < job->terms.at_least)
			return;
		if (job->full & ~there & ~job->late && now - e->first_ns < job->terms.deadline_ns)
			return;
		if (s->table)
			remind(s, job, at, now);
		missing = job->full & ~e->bitmap;
		if (job->terms.world - ek_count(missing) < job->terms.at_least)
			return;
	}
	if (missing) {
		for (int i = 0; i < MAX_JOBS; i++) /* who is late in one of a training's jobs is so in all */
			if (s->jobs[i].used && s->jobs[i].token == job->token)
				s->jobs[i].late |= missing;
		s->counters[LEFT_OUT] += ek_count(missing);
	}
	finish(s, job, at, 1);
	if (s->table) { /* the rule lets go of what it may still hold of it */
		struct ek_header out, result = *result_of(job, at);

		result.job = job - s->jobs;
		ek_step(s->table, &result, sizeof result + 8 * result.words, EK_SERVER_ID, now, &out, s->out);
	}
}

static struct entry *entry_for(struct server *s, struct job *job, uint32_t fragment, uint64_t now)
{
	uint32_t lowest = fragment;
	struct entry *e = &job->entries[fragment & (job->ring - 1)];

	if (e->state != FREE && e->fragment == fragment)
		return e;
	if (e->state != FREE && (int32_t)(e->fragment - fragment) > 0) {
		s->counters[BAD_OLD]++; /* whoever has the result answers instead of us */
		return NULL;
	}
	for (uint32_t w = 0; w < job->terms.world; w++)
		if (job->joined & 1u << w && (int32_t)(job->low[w] - lowest) < 0)
			lowest = job->low[w];
	if (fragment - lowest >= job->ring || (e->state != FREE && (int32_t)(e->fragment - lowest) >= 0)) {
		s->counters[BAD_AHEAD]++;
		return NULL;
	}
	*e = (struct entry){.fragment = fragment, .state = OPEN, .first_ns = now};
	if ((int32_t)(fragment + 1 - job->highest) > 0)
		job->highest = fragment + 1;
	if ((int32_t)(job->open_from - fragment) > 0) /* later ones were quicker */
		job->open_from = fragment;
	return e;
}

static void take_data(struct server *s, struct job *job, int worker, struct ek_header *p, int size, uint64_t now)
{
	int partial = p->kind == EK_PARTIAL || p->kind == EK_RESULT;
	int bytes = partial ? job->sum_bytes : job->up_bytes;
	uint32_t at = p->fragment & (job->ring - 1), own = p->bitmap;
	struct entry *e;

	if (size != EK_HEADER_BYTES + bytes || p->lanes != job->terms.lane_type) {
		s->counters[BAD_LENGTH]++;
		return;
	}
	e = entry_for(s, job, p->fragment, now);
	if (!e)
		return;
	if (worker >= 0 && (int32_t)(p->fragment + 1 - job->reached[worker]) > 0)
		job->reached[worker] = p->fragment + 1;
	if (worker >= 0 && job->reached[worker] == job->highest)
		job->late &= ~own;
	if (p->kind == EK_RESULT) { /* of the switch: the workers have it too, but for those on whose way it was lost */
		if (e->state == OPEN) {
			merge(s, job, at, job->full, 0, (const uint8_t *)(p + 1));
			finish(s, job, at, 0);
			for (uint32_t w = 0; w < job->terms.world; w++)
				if (e->waiting >> w & 1 && job->agains[w] < job->ring)
					job->again[w][job->agains[w]++] = at;
		}
		return;
	}
	if (e->state == DONE) {
		s->counters[e->bitmap & own ? DUPLICATES : LATE]++;
		if (worker >= 0 && job->agains[worker] < job->ring)
			job->again[worker][job->agains[worker]++] = at;
		return;
	}
	e->seen |= own;
	job->late &= ~own;
	if (s->table && worker >= 0 && !(e->bitmap & own)) {
		struct ek_header out;
		struct ek_sent sent;

		p->job = job - s->jobs;
		sent = ek_step(s->table, p, size, worker, now, &out, s->out);
		if (sent.to == EK_NOBODY) {
			if (sent.counted == EK_BAD_BOUND)
				s->counters[BAD_BOUND]++;
			else if (sent.counted < EK_REASONS)
				s->counters[DUPLICATES]++;
		} else if (sent.filled) {
			take_sums(s, &out, now);
		} else {
			merge(s, job, at, own, 1, (const uint8_t *)(p + 1));
			settle(s, job, at, now);
		}
		if (e->state == OPEN && e->bitmap && e->seen == job->full)
			remind(s, job, at, now); /* part is here and part in a slot, where nobody will complete it */
		if (e->state == OPEN && (job->terms.deadline_ns || e->bitmap == job->full))
			settle(s, job, at, now);
		return;
	}
	merge(s, job, at, own, !partial, (const uint8_t *)(p + 1));
	settle(s, job, at, now);
}

/* Has the switch in the kernel give out what it holds of a fragment: a packet with room for it. */
static void remind_kernel(struct server *s, struct job *job, const struct entry *e)
{
	struct ek_header *p = (void *)s->scratch;
	int size = EK_HEADER_BYTES + job->sum_bytes;

	memset(s->scratch, 0, size);
	*p = (struct ek_header){
		.magic = EK_MAGIC,
		.version = EK_VERSION,
		.kind = EK_REMINDER,
		.lanes = job->terms.lane_type,
		.words = job->sum_bytes / 8,
		.token = job->token,
		.job = job->number,
		.fragment = e->fragment,
		.epoch = job->epoch,
	};
	s->counters[REMINDERS]++;
	send_one(s->fd, &job->address[0], s->scratch, size);
}

/* Calls in the parts of a fragment that are in the kernel's switch or were lost on their way to it.
 *
 * While a worker has not sent its part, nothing is amiss: what is in a slot stays there until all have asked, or one has
 * asked so often that the result was probably lost. A deadline waits for nobody, and begins to count here. */
static void call_from_kernel(struct server *s, struct job *job, struct entry *e, int worker)
{
	e->waiting |= 1u << worker;
	if (e->asks < 255)
		e->asks++;
	if (!job->terms.deadline_ns && (e->waiting | e->bitmap) != job->full && e->asks < ASKS_ENOUGH * job->terms.world)
		return;
	if (e->reminders++ % 2 == 0)
		remind_kernel(s, job, e);
	else if (!(e->bitmap & 1u << worker))
		ask_for(s, job, worker, e->fragment);
}

/* The switch in the kernel holds nothing of a fragment. */
static void take_bounce(struct server *s, struct job *job, const struct ek_header *p)
{
	struct entry *e = &job->entries[p->fragment & (job->ring - 1)];

	if (e->state != OPEN || e->fragment != p->fragment)
		return;
	for (uint32_t w = 0; w < job->terms.world; w++)
		if (e->waiting & ~e->bitmap & 1u << w)
			ask_for(s, job, w, e->fragment);
}

static void take_query(struct server *s, struct job *job, int worker, const struct ek_header *p, int size, uint64_t now)
{
	const struct ek_control *c = (const void *)((const uint8_t *)p + EK_HEADER_BYTES);
	const uint8_t *list = (const uint8_t *)p + EK_CONTROL_BYTES;
	uint32_t count = c->count, low;

	/* The first number is the worker's first missing fragment; the others are asked for. */
	if (!count || count > EK_MAX_LISTED || size < EK_CONTROL_BYTES + 4 * (int)count) {
		s->counters[BAD_LENGTH]++;
		return;
	}
	memcpy(&low, list, 4);
	if ((int32_t)(low - job->low[worker]) > 0)
		job->low[worker] = low;
	if ((int32_t)(low - job->highest) >= 0)
		job->late &= ~(1u << worker);

	s->counters[QUERIES]++;
	if (count > 1)
		job->alive |= 1u << worker;
	for (uint32_t i = 1; i < count; i++) {
		uint32_t fragment, at;
		struct entry *e;

		memcpy(&fragment, list + 4 * i, 4);
		at = fragment & (job->ring - 1);
		e = &job->entries[at];
		if (e->state == DONE && e->fragment == fragment) {
			if (job->agains[worker] < job->ring)
				job->again[worker][job->agains[worker]++] = at;
		} else if (s->enroll && (e = entry_for(s, job, fragment, now))) {
			call_from_kernel(s, job, e, worker);
		} else if (!e || e->state != OPEN || e->fragment != fragment || !(e->seen & 1u << worker)) {
			ask_for(s, job, worker, fragment);
		}
	}
}

/* Asks a worker again for what its later packets have overtaken. */
static void call_in(struct server *s, struct job *job)
{
	for (uint32_t w = 0; w < job->terms.world; w++) {
		uint32_t end = job->reached[w] > REORDERED ? job->reached[w] - REORDERED : 0, f = job->checked[w];

		if ((int32_t)(job->low[w] - f) > 0)
			f = job->low[w];
		for (; (int32_t)(end - f) > 0; f++) {
			struct entry *e = &job->entries[f & (job->ring - 1)];

			if (f % job->terms.shards != job->terms.shard)
				continue;
			if (e->state == FREE || (int32_t)(e->fragment - f) < 0)
				ask_for(s, job, w, f);
			else if (e->fragment == f && e->state == OPEN && !(e->seen & 1u << w))
				ask_for(s, job, w, f);
		}
		job->checked[w] = f;
	}
}

/* Ends what has waited for the deadline. */
static void expire(struct server *s, struct job *job, uint64_t now)
{
	uint32_t f = job->open_from;

	if (!job->terms.deadline_ns)
		return;
	if (job->highest - f > job->ring)
		f = job->highest - job->ring;
	while (f != job->highest) {
		struct entry *e = &job->entries[f & (job->ring - 1)];

		if (e->fragment == f && e->state == OPEN)
			break;
		f++;
	}
	job->open_from = f;
	for (; f != job->highest; f++) {
		struct entry *e = &job->entries[f & (job->ring - 1)];

		if (e->fragment != f || e->state != OPEN)
			continue;
		settle(s, job, f & (job->ring - 1), now);
	}
}

static void send_results(struct server *s, struct job *job, int worker, const uint32_t *list, uint32_t count)
{
	uint32_t kept = 0;
	int size = EK_HEADER_BYTES + job->down_bytes;

	for (uint32_t i = 0; i < count; i++) {
		if (lost(s->out_share, s->seed ^ 0x6f7574, &s->out_count)) {
			s->counters[INJECTED_OUT]++;
			continue;
		}
		s->pieces[kept++] = (struct iovec){result_of(job, list[i]), size};
	}
	s->counters[BYTES_OUT] += (uint64_t)kept * size;
	send_run(s->fd, &job->address[worker], s->pieces, 1, kept, size, &s->segments);
}

static void flush(struct server *s, struct job *job)
{
	struct ek_header about = {.job = job->number, .token = job->token, .epoch = job->epoch};

	for (uint32_t w = 0; w < job->terms.world; w++) {
		if (!(job->joined & 1u << w))
			continue;
		if (job->dones)
			send_results(s, job, w, job->done, job->dones);
		if (job->agains[w]) {
			s->counters[RESULTS_AGAIN] += job->agains[w];
			send_results(s, job, w, job->again[w], job->agains[w]);
		}
		about.bitmap = 1u << w;
		if (job->lackings[w])
			say(s, &job->address[w], &about, EK_LACKING, job->lacking[w], job->lackings[w], 4 * job->lackings[w]);
		if (job->alive & 1u << w)
			say(s, &job->address[w], &about, EK_ALIVE, &s->boot, sizeof s->boot, sizeof s->boot);
		job->agains[w] = job->lackings[w] = 0;
	}
	job->dones = job->alive = 0;
}

static void take_packet(struct server *s, const struct sockaddr_in *from, uint8_t *bytes, int size, uint64_t now)
{
	struct ek_header *p = (void *)bytes;
	enum ek_reason reason;
	struct job *job;
	uint32_t word;
	int worker;

	s->counters[PACKETS]++;
	s->counters[BYTES_IN] += size;
	if (lost(s->in_share, s->seed, &s->in_count)) {
		s->counters[INJECTED_IN]++;
		return;
	}
	reason = ek_parse(p, size);
	if (reason) {
		s->counters[BAD_SHORT + reason - EK_BAD_SHORT]++;
		return;
	}
	word = p->kind == EK_CONTROL && size >= EK_CONTROL_BYTES ? ((const struct ek_control *)(p + 1))->word : 0;
	if (word == EK_HELLO) {
		take_hello(s, from, p, size);
		return;
	}
	if (word == EK_ASK) {
		say(s, from, p, EK_SHAPE, &s->shape, sizeof s->shape, sizeof s->shape);
		return;
	}
	if (p->kind == EK_CONTROL ? word != EK_QUERY
				  : p->kind != EK_GRADIENT && p->kind != EK_RESEND && p->kind != EK_PARTIAL &&
					    (!s->enroll || (p->kind != EK_RESULT && p->kind != EK_REMINDER))) {
		s->counters[BAD_KIND]++;
		return;
	}
	job = job_find(s, p->job, p->token);
	if (!job) {
		s->counters[BAD_JOB]++;
		if (word == EK_QUERY)
			refuse(s, from, p, "there is no such job: say hello");
		return;
	}
	if (p->epoch != job->epoch) {
		s->counters[BAD_EPOCH]++;
		if (word == EK_QUERY && (int32_t)(p->epoch - job->epoch) > 0)
			refuse(s, from, p, "the job has not begun this epoch here: say hello");
		return;
	}
	if (p->kind == EK_REMINDER) {
		take_bounce(s, job, p);
		return;
	}
	if (p->bitmap & ~job->joined ||
	    (p->kind == EK_RESULT ? p->bitmap != job->full : p->kind != EK_PARTIAL && !ek_one_bit(p->bitmap))) {
		s->counters[BAD_BITMAP]++;
		if (word == EK_QUERY)
			refuse(s, from, p, "this worker is not in the job: say hello");
		return;
	}
	worker = p->kind == EK_PARTIAL || p->kind == EK_RESULT ? -1 : __builtin_ctz(p->bitmap);
	job->heard_ns = now;
	if (word == EK_QUERY) {
		take_query(s, job, worker, p, size, now);
		return;
	}
	/* Who sends a fragment has all results up to `span` before it. */
	for (uint32_t w = 0; w < job->terms.world && p->fragment > job->span; w++)
		if (p->bitmap >> w & 1 && (int32_t)(p->fragment - job->span - job->low[w]) > 0)
			job->low[w] = p->fragment - job->span;
	take_data(s, job, worker, p, size, now);
}

/* Opens a server on a bound socket.
 *
 * table: of the rule that adds before this server, zeroed; NULL where it is elsewhere, or nowhere. Only with it are results
 * written in fewer bits than lanes, and packets that are overtaken called in, since all come by here. in_share, out_share: of packets to lose on purpose,
 * in 2**-32. Gives NULL where memory is short. */
struct server *server_open(int fd, struct ek_table *table, uint32_t ring, uint64_t job_bytes, uint64_t seed,
			   uint64_t in_share, uint64_t out_share)
{
	struct server *s = calloc(1, sizeof *s);

	if (!s)
		return NULL;
	s->fd = fd;
	s->table = table;
	s->pack = table != NULL;
	s->segments = 1;
	s->ring_most = ring;
	s->job_bytes_most = job_bytes;
	s->seed = seed;
	s->in_share = in_share;
	s->out_share = out_share;
	s->boot = mixed(now_ns(), (uint64_t)(uintptr_t)s) | 1;
	s->pieces = calloc(ring, sizeof *s->pieces);
	if (inbox_open(&s->inbox) || !s->pieces) {
		free(s->pieces);
		free(s);
		return NULL;
	}
	socket_tune(fd, 16 << 20);
	return s;
}

/* Has a switch in the kernel add before the server. */
void server_behind(struct server *s, uint32_t words, uint32_t bytes_only, registrar enroll)
{
	s->shape = (struct ek_shape){words, bytes_only};
	s->enroll = enroll;
}

/* Lets all jobs into the switch again: it is another one. */
void server_enroll_again(struct server *s)
{
	for (int i = 0; i < MAX_JOBS; i++)
		if (s->jobs[i].used && s->jobs[i].enrolled) {
			struct ek_header about = {.job = s->jobs[i].number, .token = s->jobs[i].token};

			enroll(s, &s->jobs[i], &s->jobs[i].address[0], &about, EK_NO_NUMBER);
		}
}

void server_close(struct server *s)
{
	for (int i = 0; i < MAX_JOBS && s->enroll; i++)
		if (s->jobs[i].used) {
			struct ek_asked over;

			describe(&s->jobs[i], &over);
			over.joined = 0;
			s->enroll(&over);
		}
	for (int i = 0; i < MAX_JOBS; i++)
		if (s->jobs[i].used)
			job_free(s, &s->jobs[i]);
	free(s->inbox.bytes);
	free(s->pieces);
	free(s);
}

/* Takes in what is there, and sends what comes of it. Gives whether anything was there; `timed`: whether deadlines run. */
int server_turn(struct server *s, int *timed)
{
	int runs = inbox_fill(&s->inbox, s->fd);
	uint64_t now = now_ns();

	*timed = 0;
	for (int i = 0; i < runs; i++) {
		int size = s->inbox.messages[i].msg_len, segment = run_segment(&s->inbox, i);
		uint8_t *bytes = s->inbox.pieces[i].iov_base;

		for (int at = 0; at < size; at += segment)
			take_packet(s, &s->inbox.from[i], bytes + at, size - at < segment ? size - at : segment, now);
	}
	for (int i = 0; i < MAX_JOBS; i++) {
		struct job *job = &s->jobs[i];

		if (!job->used)
			continue;
		if (s->table) /* otherwise most packets end in the switch before us */
			call_in(s, job);
		expire(s, job, now);
		*timed |= job->terms.deadline_ns && job->open_from != job->highest;
		flush(s, job);
	}
	return runs > 0;
}

/* Serves for so long. */
void server_run(struct server *s, uint64_t slice_ns)
{
	uint64_t end = now_ns() + slice_ns, now;
	int timed;

	while ((now = now_ns()) < end)
		if (!server_turn(s, &timed)) {
			uint64_t left = end - now, wait = timed ? 500000 : left;

			wait_readable(s->fd, wait < left ? wait : left);
		}
}

const uint64_t *server_counters(struct server *s, int *count)
{
	*count = COUNTERS;
	return s->counters;
}
