/* Workers, a server for each job and one switch around the C rule, on a network that loses, doubles and reorders, while
 * workers and servers are killed and start again. Every result that a worker takes is compared with the sum that it should
 * be. One thread, whole numbers, seeded: a run can be repeated. */
#include <linux/bpf.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "rule.h"

#define MAX_JOBS 8
#define MAX_WORKERS 8
#define WORDS 2
#define WINDOW 32
#define CACHE (4 * WINDOW) /* results that a server keeps */

enum { SWITCH, SERVER, WORKER };

struct event {
	uint64_t at;
	uint64_t serial;
	uint8_t to, job, who, sender;
	struct ek_header header;
	uint64_t words[WORDS];
};

struct entry {
	uint32_t fragment, epoch, bitmap;
	uint8_t used, done;
	uint16_t reminders;
	uint64_t since;
	uint64_t sums[WORDS];
};

struct worker {
	uint32_t base; /* all before have their result */
	uint32_t next; /* to send */
	uint8_t done[CACHE];
	uint64_t sent[CACHE];
	uint64_t results[CACHE][WORDS];
};

struct job {
	uint64_t token;
	uint32_t epoch, finished;
	struct worker workers[MAX_WORKERS];
	struct entry entries[CACHE];
};

struct settings {
	uint64_t fragments, seed;
	uint32_t jobs, workers, loss, twice, late; /* the last three of 1,000,000 */
	uint32_t restart_every;			   /* fragments of a job; 0: never */
	int32_t program;			   /* the switch in the kernel, where it is what steps; or -1 */
	uint32_t with_server;			   /* 1; SwitchML has none */
	uint64_t *clock;			   /* that of the program */
};

struct outcome {
	uint64_t finished, wrong, steps, packets, lost, doubled, resends, reminders, nacks, answers, server_restarts,
		worker_restarts, stuck;
};

struct world {
	struct settings set;
	struct ek_table *table;
	struct outcome *out;
	struct job jobs[MAX_JOBS];
	struct event *heap;
	uint64_t count, room, serial, now, random;
};

static uint64_t draw(struct world *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random * 0x2545f4914f6cdd1dull >> 11;
}

static int chance(struct world *w, uint32_t of_a_million)
{
	return of_a_million && draw(w) % 1000000 < of_a_million;
}

static int before(const struct event *a, const struct event *b)
{
	return a->at != b->at ? a->at < b->at : a->serial < b->serial;
}

static void push(struct world *w, const struct event *event)
{
	uint64_t at;

	if (w->count == w->room) {
		w->room = w->room ? 2 * w->room : 1024;
		w->heap = realloc(w->heap, w->room * sizeof(struct event));
	}
	for (at = w->count++; at && before(event, w->heap + (at - 1) / 2); at = (at - 1) / 2)
		w->heap[at] = w->heap[(at - 1) / 2];
	w->heap[at] = *event;
}

static struct event pop(struct world *w)
{
	struct event first = w->heap[0], last = w->heap[--w->count];
	uint64_t at = 0, child;

	while ((child = 2 * at + 1) < w->count) {
		if (child + 1 < w->count && before(w->heap + child + 1, w->heap + child))
			child++;
		if (!before(w->heap + child, &last))
			break;
		w->heap[at] = w->heap[child];
		at = child;
	}
	w->heap[at] = last;
	return first;
}

/* The gradient that a worker has for a fragment in an epoch. */
static void gradient(const struct world *w, uint32_t job, uint32_t epoch, uint32_t fragment, uint32_t worker, uint64_t *to)
{
	uint64_t x = w->set.seed + job * 0x9e3779b97f4a7c15ull + fragment * 0xbf58476d1ce4e5b9ull +
		     epoch * 0x94d049bb133111ebull + worker * 0xd6e8feb86659fd93ull;
	uint32_t i;

	for (i = 0; i < WORDS; i++) {
		x ^= x >> 30;
		x *= 0xbf58476d1ce4e5b9ull;
		x ^= x >> 27;
		to[i] = x & 0x1f1f1f1f1f1f1f1full;
	}
}

static int is_sum(const struct world *w, uint32_t job, const struct ek_header *h, const uint64_t *words)
{
	uint64_t sum[WORDS] = {0}, one[WORDS];
	uint32_t worker, i;

	for (worker = 0; worker < w->set.workers; worker++)
		if (h->bitmap >> worker & 1) {
			gradient(w, job, h->epoch, h->fragment, worker, one);
			for (i = 0; i < WORDS; i++)
				sum[i] += one[i];
		}
	return !memcmp(sum, words, sizeof(sum));
}

static void post(struct world *w, uint32_t to, uint32_t job, uint32_t who, uint32_t sender, const struct ek_header *h,
		 const uint64_t *words)
{
	struct event event = {.to = to, .job = job, .who = who, .sender = sender, .header = *h};
	int copies = 1;

	w->out->packets++;
	if (h->words)
		memcpy(event.words, words, 8 * h->words);
	if (chance(w, w->set.loss)) {
		w->out->lost++;
		return;
	}
	if (chance(w, w->set.twice)) {
		w->out->doubled++;
		copies = 2;
	}
	while (copies--) {
		event.at = w->now + 1000 + draw(w) % 1000;
		if (chance(w, w->set.late))
			event.at += draw(w) % 100000;
		event.serial = w->serial++;
		push(w, &event);
	}
}

static struct ek_header header_of(struct world *w, uint32_t job, uint32_t kind, uint32_t fragment, uint32_t bitmap, uint32_t words)
{
	struct ek_header h = {EK_MAGIC, EK_VERSION, kind, EK_BYTES, 100 + fragment % 3, words, w->jobs[job].token, job,
			      fragment, bitmap, w->jobs[job].epoch};

	return h;
}

static void send_gradient(struct world *w, uint32_t job, uint32_t worker, uint32_t fragment, uint32_t kind)
{
	struct ek_header h = header_of(w, job, kind, fragment, 1u << worker, WORDS);
	uint64_t words[WORDS];

	gradient(w, job, h.epoch, fragment, worker, words);
	w->jobs[job].workers[worker].sent[fragment % CACHE] = w->now;
	post(w, SWITCH, job, 0, worker, &h, words);
}

static void send_more(struct world *w, uint32_t job, uint32_t worker)
{
	struct worker *me = w->jobs[job].workers + worker;

	for (; me->next < me->base + WINDOW; me->next++) {
		me->done[me->next % CACHE] = 0;
		send_gradient(w, job, worker, me->next, EK_GRADIENT);
	}
}

static uint32_t slowest(const struct world *w, uint32_t job)
{
	uint32_t worker, least = w->jobs[job].workers[0].base;

	for (worker = 1; worker < w->set.workers; worker++)
		if (w->jobs[job].workers[worker].base < least)
			least = w->jobs[job].workers[worker].base;
	return least;
}

/* A worker died, and computes other gradients: all go back to what not all have, in a new epoch. */
static void restart_worker(struct world *w, uint32_t job)
{
	struct job *j = w->jobs + job;
	uint32_t worker, base = slowest(w, job);

	j->epoch++;
	w->out->worker_restarts++;
	for (worker = 0; worker < w->set.workers; worker++) {
		j->workers[worker].base = j->workers[worker].next = base;
		memset(j->workers[worker].done, 0, sizeof(j->workers[worker].done));
		send_more(w, job, worker);
	}
}

static void at_worker(struct world *w, const struct event *e)
{
	struct job *j = w->jobs + e->job;
	struct worker *me = j->workers + e->who;
	const struct ek_header *h = &e->header;
	uint32_t all = (w->set.workers >= 32 ? 0 : 1u << w->set.workers) - 1, place = h->fragment % CACHE;
	int known = h->fragment < me->next && me->next - h->fragment <= CACHE && h->epoch == j->epoch;

	if (h->kind == EK_NACK) {
		if (!known || !(h->bitmap >> e->who & 1))
			return;
		if (h->fragment < me->base || me->done[place]) {
			struct ek_header answer = header_of(w, e->job, EK_RESULT, h->fragment, all, WORDS);

			if (me->next - h->fragment > CACHE - WINDOW)
				return;
			w->out->answers++;
			post(w, SWITCH, e->job, 0, e->who, &answer, me->results[place]);
		} else {
			w->out->resends++;
			send_gradient(w, e->job, e->who, h->fragment, EK_RESEND);
		}
		return;
	}
	if (h->kind != EK_RESULT || !known || h->fragment < me->base || me->done[place])
		return;
	if (h->bitmap != all || !is_sum(w, e->job, h, e->words))
		w->out->wrong++;
	me->done[place] = 1;
	memcpy(me->results[place], e->words, sizeof(me->results[place]));
	while (me->base < me->next && me->done[me->base % CACHE])
		me->base++;
	send_more(w, e->job, e->who);
}

static void say_result(struct world *w, uint32_t job, struct entry *entry)
{
	uint32_t all = (1u << w->set.workers) - 1;
	struct ek_header h = header_of(w, job, EK_RESULT, entry->fragment, all, WORDS);

	h.epoch = entry->epoch;
	if (!is_sum(w, job, &h, entry->sums))
		w->out->wrong++;
	post(w, SWITCH, job, 0, EK_SERVER_ID, &h, entry->sums);
}

static void ask(struct world *w, uint32_t job, struct entry *entry)
{
	uint32_t all = (1u << w->set.workers) - 1;
	struct ek_header h = header_of(w, job, EK_NACK, entry->fragment, all & ~entry->bitmap, 0);

	h.epoch = entry->epoch;
	w->out->nacks++;
	post(w, SWITCH, job, 0, EK_SERVER_ID, &h, 0);
}

static void at_server(struct world *w, const struct event *e)
{
	struct job *j = w->jobs + e->job;
	const struct ek_header *h = &e->header;
	struct entry *entry = j->entries + h->fragment % CACHE;
	uint32_t all = (1u << w->set.workers) - 1, i;

	if (h->kind == EK_REMINDER || h->kind == EK_NACK || h->epoch != j->epoch)
		return;
	if (!entry->used || entry->epoch != h->epoch || entry->fragment != h->fragment) {
		if (entry->used && entry->epoch == h->epoch && entry->fragment > h->fragment)
			return; /* of before its window: a copy that came late */
		memset(entry, 0, sizeof(*entry));
		entry->used = 1;
		entry->fragment = h->fragment;
		entry->epoch = h->epoch;
		entry->since = w->now;
	}
	if (h->kind == EK_RESULT) {
		if (h->bitmap != all || !is_sum(w, e->job, h, e->words))
			w->out->wrong++;
		i = entry->done;
		entry->done = 1;
		entry->bitmap = all;
		memcpy(entry->sums, e->words, sizeof(entry->sums));
		if (!i && e->sender < EK_SERVER_ID && entry->reminders) /* an answer to a NACK */
			say_result(w, e->job, entry);
		return;
	}
	if (entry->done) { /* who still asks gets the result by itself */
		struct ek_header answer = header_of(w, e->job, EK_RESULT, entry->fragment, all, WORDS);

		for (i = 0; i < w->set.workers; i++)
			if (h->bitmap >> i & 1 && (h->kind == EK_RESEND || h->kind == EK_PARTIAL))
				post(w, WORKER, e->job, i, EK_SERVER_ID, &answer, entry->sums);
		return;
	}
	if (h->bitmap == all) {
		memcpy(entry->sums, e->words, sizeof(entry->sums));
	} else if (entry->bitmap & h->bitmap) {
		if (h->kind == EK_PARTIAL)
			ask(w, e->job, entry);
		return;
	} else {
		for (i = 0; i < WORDS; i++)
			entry->sums[i] += e->words[i];
	}
	entry->bitmap |= h->bitmap;
	if (entry->bitmap == all) {
		entry->done = 1;
		say_result(w, e->job, entry);
	}
}

/* Steps the program in the kernel by a test run, and tells its answer as `ek_step` does. */
static struct ek_sent step_program(struct world *w, const struct ek_header *came, uint32_t sender, struct ek_header *out, uint64_t *words)
{
	static uint8_t frame[42 + EK_HEADER_BYTES + 8 * WORDS], left[4096];
	const uint32_t size = EK_HEADER_BYTES + 8 * came->words, udp = size + 8, ip = udp + 20;
	const uint8_t headers[42] = {[12] = 8, 0, 0x45, 0, ip >> 8, ip, [22] = 64, 17, [26] = 10, 1, 0, sender + 1, 10, 1, 0,
				     sender == EK_SERVER_ID ? 1 : EK_SERVER_ID + 1, 5000 >> 8, 5000 & 255, 7000 >> 8,
				     7000 & 255, udp >> 8, udp};
	struct ek_sent sent = {EK_NOBODY, 0, 0};
	union bpf_attr attr;

	memcpy(frame, headers, sizeof(headers));
	memcpy(frame + 42, came, size);
	memset(&attr, 0, sizeof(attr));
	attr.test.prog_fd = w->set.program;
	attr.test.data_in = (uint64_t)(uintptr_t)frame;
	attr.test.data_out = (uint64_t)(uintptr_t)left;
	attr.test.data_size_in = 42 + size;
	attr.test.data_size_out = sizeof(left);
	attr.test.repeat = 1;
	*(volatile uint64_t *)w->set.clock = w->now;
	if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr)))
		abort();
	if (attr.test.retval == XDP_PASS) {
		sent.to = sender == EK_SERVER_ID ? EK_WORKERS : EK_SERVER;
	} else if (attr.test.retval == XDP_REDIRECT) {
		memcpy(out, left + 42, EK_HEADER_BYTES);
		memcpy(words, left + 42 + EK_HEADER_BYTES, 8 * out->words);
		sent.filled = out->kind != EK_REMINDER;
		sent.to = out->kind == EK_RESULT ? EK_ALL : EK_SERVER;
	} else if (attr.test.retval != XDP_DROP) {
		abort();
	}
	return sent;
}

static void at_switch(struct world *w, const struct event *e)
{
	struct ek_header out;
	uint64_t words[WORDS];
	struct {
		struct ek_header header;
		uint64_t words[WORDS];
	} came = {e->header, {e->words[0], e->words[1]}};
	struct ek_sent sent =
		w->set.program >= 0
			? step_program(w, &came.header, e->sender, &out, words)
			: ek_step(w->table, &came.header, EK_HEADER_BYTES + 8 * e->header.words, e->sender, w->now, &out, words);
	const struct ek_header *h = sent.filled ? &out : &e->header;
	const uint64_t *with = sent.filled ? words : e->words;
	uint32_t worker;

	w->out->steps++;
	if (sent.filled && !is_sum(w, h->job, h, with))
		w->out->wrong++;
	if (sent.to == EK_SERVER || sent.to == EK_ALL)
		post(w, SERVER, h->job, 0, e->sender, h, with);
	if (sent.to == EK_SENDER)
		post(w, WORKER, h->job, e->sender, EK_SERVER_ID, h, with);
	if (sent.to == EK_WORKERS || sent.to == EK_ALL)
		for (worker = 0; worker < w->set.workers; worker++)
			post(w, WORKER, h->job, worker, EK_SERVER_ID, h, with);
}

/* What clocks do: workers resend, servers remind and ask. */
static void tick(struct world *w, uint32_t server)
{
	uint32_t job, worker, f, i;

	for (job = 0; job < w->set.jobs; job++) {
		struct job *j = w->jobs + job;

		for (worker = 0; worker < w->set.workers; worker++) {
			struct worker *me = j->workers + worker;

			for (f = me->base; f < me->next; f++)
				if (!me->done[f % CACHE] && w->now - me->sent[f % CACHE] > 60000 + draw(w) % 20000) {
					w->out->resends++;
					send_gradient(w, job, worker, f, EK_RESEND);
				}
		}
		for (i = 0; server && i < CACHE; i++) {
			struct entry *entry = j->entries + i;

			if (!entry->used || entry->done || entry->epoch != j->epoch || w->now - entry->since < 20000)
				continue;
			entry->since = w->now;
			if (entry->reminders++ % 3 < 2) {
				struct ek_header h = header_of(w, job, EK_REMINDER, entry->fragment, 0, 0);

				w->out->reminders++;
				post(w, SWITCH, job, 0, EK_SERVER_ID, &h, 0);
			} else {
				ask(w, job, entry);
			}
		}
	}
}

int run(const struct settings *settings, struct ek_table *table, struct outcome *out)
{
	struct world *w = calloc(1, sizeof(*w));
	uint64_t next_tick = 10000, last_progress = 0;
	uint32_t job, worker, done, server = settings->with_server;

	w->set = *settings;
	w->table = table;
	w->out = out;
	w->random = settings->seed * 2 + 1;
	for (job = 0; job < settings->jobs; job++) {
		struct ek_job *known = table->jobs + job;

		w->jobs[job].token = 1000 + job;
		known->token = w->jobs[job].token;
		known->workers = settings->workers;
		known->words = WORDS;
		known->lanes = EK_BYTES;
		known->largest = 31;
		for (worker = 0; worker < settings->workers; worker++)
			send_more(w, job, worker);
	}
	while (out->finished < settings->fragments) {
		struct event e;

		if (!w->count || w->heap[0].at > next_tick) {
			w->now = next_tick;
			next_tick += 10000;
			tick(w, server);
			if (w->now - last_progress > 1000000000ull) { /* a second without any progress */
				out->stuck = 1;
				break;
			}
			continue;
		}
		e = pop(w);
		w->now = e.at;
		if (e.to == SWITCH)
			at_switch(w, &e);
		else if (e.to == SERVER)
			at_server(w, &e);
		else
			at_worker(w, &e);
		if (e.to != WORKER)
			continue;
		done = slowest(w, e.job);
		if (done > w->jobs[e.job].finished) {
			uint32_t old = w->jobs[e.job].finished;

			out->finished += done - old;
			w->jobs[e.job].finished = done;
			last_progress = w->now;
			if (settings->restart_every && done / settings->restart_every > old / settings->restart_every) {
				if (done / settings->restart_every % 2) {
					restart_worker(w, e.job);
				} else { /* the server loses all that it knew */
					memset(w->jobs[e.job].entries, 0, sizeof(w->jobs[e.job].entries));
					out->server_restarts++;
				}
			}
		}
	}
	free(w->heap);
	free(w);
	return out->wrong || out->stuck;
}
