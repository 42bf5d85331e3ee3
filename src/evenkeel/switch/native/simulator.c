/* Simulates training jobs that add their gradients in switches with little memory, event by event.
 *
 * Time is an integer number of picoseconds. Events of one time happen in the order in which they were scheduled, so a run
 * depends on its arguments alone. A link is a first-in-first-out queue of which only the time is kept until which it is busy.
 *
 * Every fragment carries one 64-bit number instead of a gradient: a hash of (job, worker, fragment, incarnation of the worker).
 * Slots and servers add these numbers, and workers compare each result with the sum that it must be. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* One word of sums a slot: the number that stands for a fragment. */
#define EK_WORDS 1
#include "rule.h"

#define EXPORT __attribute__((visibility("default")))

enum { NO_INA = 100, RING = 101 }; /* besides the policies of rule.h */

enum kind {
	DATA_AT_SWITCH,     /* a packet of gradients, from below */
	PASS_AT_SWITCH,     /* one at the root switch that goes on to its server unchanged */
	AT_SERVER,
	RESULT_AT_SWITCH,   /* a finished sum, from above */
	RESULT_AT_WORKERS,  /* at all workers of a job below one switch */
	RESULT_AT_WORKER,
	NACK_AT_WORKER,     /* the server asks one worker for a fragment */
	REMINDER_AT_SWITCH, /* the server asks for what a switch has of a fragment */
	REMIND,             /* the server looks whether a fragment is still unfinished */
	OVERTAKEN,          /* a worker looks whether a result that later ones have overtaken has come */
	TIMEOUT,            /* a worker looks whether it got on */
	COMPUTED,           /* a worker has done one layer */
	RING_DONE,
	ARRIVAL,            /* a job begins */
	FAULT,
};

enum { RESEND = 1, RESULT = 2 };

struct settings {
	int64_t policy, slots, ways, tombs, regions; /* powers of two */
	int64_t stale_ns, tomb_ns;
	int64_t packet_ps, trunk_ps, server_ps, control_ps; /* how long a link is busy with a packet */
	int64_t worker_delay_ps, trunk_delay_ps, server_delay_ps;
	int64_t racks, servers;
	int64_t remind_ps, timeout_ps, overtaken_ps, useful_ps;
	int64_t loss, duplicate, reorder, reorder_ps; /* chances are out of 2^32 */
	int64_t seed, max_events, jobs, faults;
};

struct job {
	int64_t arrival_ps;
	int32_t workers, iterations, layers, first_layer, fragments, window, first_worker, server;
	int64_t first_factor, first_priority, first_place;
};

struct layer {
	int64_t forward_ps, backward_ps;
	int64_t fragments;
};

struct fault {
	int64_t time_ps, down_ps;
	int32_t job, worker; /* job -1: the server of number `worker` */
};

struct totals {
	int64_t events, packets, fragments, in_switch, server_packets, evictions, bypassed, useful_ps, waiting_ps, makespan_ps;
	int64_t resends, reminders, nacks, lost, duplicates, stale, wrong, unfinished;
};

struct event {
	uint64_t sum;
	uint32_t seq, bits;
	uint16_t job, worker, place, epoch; /* place: the switch or the server */
	uint8_t kind, flags, priority;
};

struct entry { /* of the heap */
	int64_t time;
	uint64_t order; /* number << 24 | where the event is */
};

struct kept { /* by a server, of one fragment */
	uint64_t sum;
	int64_t reminded;
	uint32_t seq, bits;
	uint16_t epoch;
	uint8_t done, armed, tries;
};

struct worker {
	int64_t up_busy, down_busy;
	uint64_t incarnation;
	uint32_t next, ready, low, checked, highest; /* fragments: to be sent, with a gradient, without a result */
	int32_t iteration, step, generation, idle;
	uint8_t computing, finished, watching, tries;
};

struct state {
	const struct settings *set;
	const struct job *jobs;
	const struct layer *layers;
	const float *factors;
	const uint8_t *priorities, *layer_of;
	const int32_t *rack_of;
	const struct fault *faults;
	struct totals *out;
	int64_t *finish;
	int64_t now;
	struct entry *heap;
	size_t pending, room;
	struct event *pool;
	uint32_t *unused;
	size_t unused_count;
	uint64_t order, random;
	struct worker *workers;
	struct ek_table *tables;  /* [switch] */
	struct ek_slot *slots;    /* [switch][slot] */
	struct ek_job *table_jobs;
	uint64_t *sums, *tombs, *counters;
	int64_t *touched_ps;      /* [switch][slot] */
	int64_t slots_each;
	uint32_t *full;           /* [switch][job]: the workers below */
	uint32_t *members;        /* [switch][job][bit]: the workers that a bit of its bitmaps stands for */
	uint8_t *bit_of;          /* [worker], in its own switch's bitmaps */
	uint8_t *rack_bit;        /* [rack][job], in the root's */
	struct kept **kept;       /* [job][ring] */
	uint32_t *kept_mask;
	uint16_t *epoch, *known_epoch;
	uint32_t *unfinished_low; /* of each job, the server's lowest fragment that is not done */
	uint8_t **received;       /* [worker][ring] */
	uint32_t *received_mask;  /* of each job */
	int32_t **got;            /* [worker][layer] */
	int32_t **ready_layers;   /* [job][layer]: workers that have computed it, for the ring */
	int64_t *ring_busy;
	int32_t *working;
	int64_t *trunk_up, *trunk_down, *server_down, *server_up, *server_back;
	int32_t root;
	int lossy, failed;
};

/* ---- numbers ---- */

static inline uint64_t mixed(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static inline uint64_t drawn(struct state *s)
{
	return mixed(s->random += 0x9e3779b97f4a7c15u);
}

static inline int happens(struct state *s, int64_t chance)
{
	return chance && (int64_t)(drawn(s) >> 32) < chance;
}

static inline uint64_t gradient(const struct state *s, uint32_t job, uint32_t worker, uint32_t seq)
{
	uint64_t incarnation = s->workers[s->jobs[job].first_worker + worker].incarnation;
	return mixed((uint64_t)seq << 32 | (uint64_t)job << 16 | worker << 8 | (incarnation & 255));
}

static uint64_t whole_sum(const struct state *s, uint32_t job, uint32_t seq)
{
	uint64_t sum = 0;
	for (int worker = 0; worker < s->jobs[job].workers; worker++)
		sum += gradient(s, job, worker, seq);
	return sum;
}

static inline int64_t later(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

/* ---- events: a heap of four children, 16 bytes an entry ---- */

static inline int before(struct entry a, struct entry b)
{
	return a.time < b.time || (a.time == b.time && a.order < b.order);
}

static void push(struct state *s, int64_t time, struct event event)
{
	if (!s->unused_count) {
		size_t more = s->room ? s->room : 1024, total = s->room + more;
		struct entry *heap = total > 1u << 24 ? NULL : realloc(s->heap, total * sizeof *heap);
		if (heap)
			s->heap = heap;
		struct event *pool = heap ? realloc(s->pool, total * sizeof *pool) : NULL;
		if (pool)
			s->pool = pool;
		uint32_t *unused = pool ? realloc(s->unused, total * sizeof *unused) : NULL;
		if (!unused) {
			s->failed = 1;
			return;
		}
		s->unused = unused;
		for (size_t place = total; place-- > s->room;)
			unused[s->unused_count++] = (uint32_t)place;
		s->room = total;
	}
	uint32_t place = s->unused[--s->unused_count];
	s->pool[place] = event;
	struct entry entry = {time, s->order++ << 24 | place};
	size_t at = s->pending++;
	while (at) {
		size_t above = (at - 1) / 4;
		if (!before(entry, s->heap[above]))
			break;
		s->heap[at] = s->heap[above];
		at = above;
	}
	s->heap[at] = entry;
}

static struct event pop(struct state *s)
{
	struct entry first = s->heap[0], last = s->heap[--s->pending];
	size_t at = 0, count = s->pending;
	for (;;) {
		size_t child = 4 * at + 1, end = child + 4 < count ? child + 4 : count, least = child;
		if (child >= count)
			break;
		for (size_t other = child + 1; other < end; other++)
			if (before(s->heap[other], s->heap[least]))
				least = other;
		if (!before(s->heap[least], last))
			break;
		s->heap[at] = s->heap[least];
		at = least;
	}
	s->heap[at] = last;
	uint32_t place = first.order & 0xffffff;
	s->unused[s->unused_count++] = place;
	s->now = first.time;
	return s->pool[place];
}

/* Puts a packet on its way: it may be lost, come twice, or be overtaken. */
static void travel(struct state *s, int64_t time, struct event event)
{
	if (s->lossy) {
		if (happens(s, s->set->loss)) {
			s->out->lost++;
			return;
		}
		if (happens(s, s->set->reorder))
			time += (int64_t)(drawn(s) % (uint64_t)(s->set->reorder_ps + 1));
		if (happens(s, s->set->duplicate))
			push(s, time + s->set->packet_ps, event);
	}
	push(s, time, event);
}

static inline int64_t over(int64_t *busy, int64_t now, int64_t length)
{
	return *busy = later(*busy, now) + length;
}

/* ---- workers ---- */

static void compute(struct state *s, uint32_t job, uint32_t worker);

static void transmit(struct state *s, uint32_t job, uint32_t worker, uint32_t seq, uint8_t flags)
{
	const struct job *j = s->jobs + job;
	struct worker *w = s->workers + j->first_worker + worker;
	struct event event = {
		.kind = DATA_AT_SWITCH, .job = job, .worker = worker, .seq = seq, .bits = 1u << worker, .flags = flags,
		.epoch = s->epoch[job], .place = s->rack_of[j->first_worker + worker], .sum = gradient(s, job, worker, seq),
	};
	uint32_t iteration = seq / j->fragments, fragment = seq % j->fragments;
	event.priority = s->priorities[j->first_priority + (int64_t)iteration * j->layers + s->layer_of[j->first_place + fragment]];
	travel(s, over(&w->up_busy, s->now, s->set->packet_ps) + s->set->worker_delay_ps, event);
}

static void send_more(struct state *s, uint32_t job, uint32_t worker)
{
	const struct job *j = s->jobs + job;
	struct worker *w = s->workers + j->first_worker + worker;
	while (w->next < w->ready && w->next < w->low + j->window)
		transmit(s, job, worker, w->next++, 0);
}

/* Sends again what later results have overtaken, and the lowest fragment without a result: few at a time, and none while the link
 * is behind, or resends would be what delays the results that they are for. */
static void send_again(struct state *s, uint32_t job, uint32_t worker)
{
	struct worker *w = s->workers + s->jobs[job].first_worker + worker;
	const uint8_t *received = s->received[s->jobs[job].first_worker + worker];
	int left = w->up_busy > s->now + s->set->overtaken_ps ? 0 : 8;
	for (uint32_t seq = w->low; left && seq < w->next && (seq == w->low || seq < w->highest); seq++)
		if (!received[seq & s->received_mask[job]]) {
			left--;
			s->out->resends++;
			transmit(s, job, worker, seq, RESEND);
		}
}

static void watch(struct state *s, uint32_t job, uint32_t worker)
{
	struct worker *w = s->workers + s->jobs[job].first_worker + worker;
	if (w->watching)
		return;
	w->watching = 1;
	struct event event = {.kind = OVERTAKEN, .job = job, .worker = worker, .seq = w->low};
	push(s, s->now + (s->set->overtaken_ps << w->tries), event);
}

static void overtaken(struct state *s, struct event *e)
{
	struct worker *w = s->workers + s->jobs[e->job].first_worker + e->worker;
	w->watching = 0;
	if (w->low == e->seq && w->low < w->highest) {
		send_again(s, e->job, e->worker);
		w->tries += w->tries < 6;
	} else {
		w->tries = 0;
	}
	if (w->low >= w->highest)
		return;
	watch(s, e->job, e->worker);
}

static void result_at(struct state *s, uint32_t job, uint32_t worker, uint32_t seq)
{
	const struct job *j = s->jobs + job;
	uint32_t number = j->first_worker + worker, mask = s->received_mask[job];
	struct worker *w = s->workers + number;
	uint8_t *received = s->received[number];
	if (seq < w->low || seq >= w->next || received[seq & mask]) {
		s->out->duplicates++;
		return;
	}
	received[seq & mask] = 1;
	if (seq > w->highest)
		w->highest = seq;
	while (w->low < w->next && received[w->low & mask])
		received[w->low++ & mask] = 0;
	if (s->lossy && w->low < w->highest)
		watch(s, job, worker);
	uint32_t layer = s->layer_of[j->first_place + seq % j->fragments];
	if (++s->got[number][layer] == s->layers[j->first_layer + layer].fragments)
		compute(s, job, worker);
	if (w->low == (uint32_t)j->iterations * j->fragments && !w->finished) {
		w->finished = 1;
		if (!--s->working[job])
			s->finish[job] = s->now;
	}
	send_more(s, job, worker);
}

/* Begins the next layer if nothing is missing for it: forward layers need their sums of the iteration before. */
static void compute(struct state *s, uint32_t job, uint32_t worker)
{
	const struct job *j = s->jobs + job;
	uint32_t number = j->first_worker + worker;
	struct worker *w = s->workers + number;
	if (w->computing || w->iteration == j->iterations)
		return;
	int backward = w->step >= j->layers, layer = backward ? 2 * j->layers - 1 - w->step : w->step;
	const struct layer *l = s->layers + j->first_layer + layer;
	if (!backward && w->iteration && s->got[number][layer] < l->fragments)
		return;
	if (w->step == j->layers)
		memset(s->got[number], 0, sizeof(int32_t) * j->layers);
	double factor = s->factors[j->first_factor + (int64_t)w->iteration * j->workers + worker];
	w->computing = 1;
	struct event event = {.kind = COMPUTED, .job = job, .worker = worker, .seq = (uint32_t)w->generation};
	push(s, s->now + (int64_t)(factor * (double)(backward ? l->backward_ps : l->forward_ps)), event);
}

static void ring_layer(struct state *s, uint32_t job, uint32_t layer)
{
	const struct job *j = s->jobs + job;
	if (++s->ready_layers[job][layer] < j->workers)
		return;
	s->ready_layers[job][layer] = 0;
	int64_t steps = 2 * (j->workers - 1), sent = steps * s->layers[j->first_layer + layer].fragments * s->set->packet_ps / j->workers;
	int64_t delays = steps * 2 * (s->set->worker_delay_ps + (s->root ? s->set->trunk_delay_ps : 0));
	struct event event = {.kind = RING_DONE, .job = job, .seq = layer};
	push(s, over(&s->ring_busy[job], s->now, sent) + delays, event);
}

static void computed(struct state *s, struct event *e)
{
	const struct job *j = s->jobs + e->job;
	struct worker *w = s->workers + j->first_worker + e->worker;
	if (e->seq != (uint32_t)w->generation)
		return; /* it was killed meanwhile */
	w->computing = 0;
	int step = w->step++;
	if (step >= j->layers) {
		int layer = 2 * j->layers - 1 - step;
		w->ready += s->layers[j->first_layer + layer].fragments;
		if (s->set->policy == RING)
			ring_layer(s, e->job, layer);
		else
			send_more(s, e->job, e->worker);
	}
	if (w->step == 2 * j->layers) {
		w->step = 0;
		w->iteration++;
	}
	compute(s, e->job, e->worker);
}

static void ring_done(struct state *s, struct event *e)
{
	const struct job *j = s->jobs + e->job;
	int64_t fragments = s->layers[j->first_layer + e->seq].fragments;
	for (int worker = 0; worker < j->workers; worker++) {
		struct worker *w = s->workers + j->first_worker + worker;
		s->got[j->first_worker + worker][e->seq] += fragments;
		w->low += fragments;
		compute(s, e->job, worker);
		if (w->low == (uint32_t)j->iterations * j->fragments && !--s->working[e->job])
			s->finish[e->job] = s->now;
	}
}

static void arm_timeout(struct state *s, uint32_t job, uint32_t worker)
{
	struct event event = {.kind = TIMEOUT, .job = job, .worker = worker};
	push(s, s->now + s->set->timeout_ps, event);
}

/* Where nothing has come for a while, sends again, the lowest fragment at least: then more and more rarely, since it is most likely
 * another worker that is late. */
static void timed_out(struct state *s, struct event *e)
{
	struct worker *w = s->workers + s->jobs[e->job].first_worker + e->worker;
	if (!s->working[e->job])
		return;
	w->idle = w->low == w->checked && w->low < w->next ? w->idle + 1 : 0;
	if (w->idle && !(w->idle & (w->idle - 1)))
		send_again(s, e->job, e->worker);
	w->checked = w->low;
	arm_timeout(s, e->job, e->worker);
}

/* ---- on the way up ---- */

static void to_server(struct state *s, uint32_t place, struct event e)
{
	const struct job *j = s->jobs + e.job;
	if ((int32_t)place != s->root) {
		e.kind = PASS_AT_SWITCH;
		e.place = s->root;
		travel(s, over(&s->trunk_up[place], s->now, s->set->trunk_ps) + s->set->trunk_delay_ps, e);
		return;
	}
	uint32_t server = (uint32_t)(j->server + (s->set->servers > s->set->jobs ? e.seq : 0)) % (uint32_t)s->set->servers;
	e.kind = AT_SERVER;
	e.place = server;
	s->out->server_packets++;
	travel(s, over(&s->server_down[server], s->now, s->set->server_ps) + s->set->server_delay_ps, e);
}

/* Sends a sum to all workers below a switch. */
static void multicast(struct state *s, uint32_t place, struct event e)
{
	const struct job *j = s->jobs + e.job;
	if (s->root && (int32_t)place == s->root) {
		for (int rack = 0; rack < s->set->racks; rack++)
			if (s->full[(int64_t)rack * s->set->jobs + e.job]) {
				e.kind = RESULT_AT_SWITCH;
				e.place = rack;
				travel(s, over(&s->trunk_down[rack], s->now, s->set->trunk_ps) + s->set->trunk_delay_ps, e);
			}
		return;
	}
	int64_t last = 0;
	for (int worker = 0; worker < j->workers; worker++)
		if (s->rack_of[j->first_worker + worker] == (int32_t)place)
			last = later(last, over(&s->workers[j->first_worker + worker].down_busy, s->now, s->set->packet_ps));
	e.kind = RESULT_AT_WORKERS;
	e.place = place;
	push(s, last + s->set->worker_delay_ps, e); /* lost for each worker by itself */
}

/* ---- switches: each applies the rule of rule.h to what comes ---- */

/* In a switch's bitmaps a bit is a worker, or at the root of a tree a rack: gives all workers that bits stand for. */
static uint32_t workers_of(const struct state *s, uint32_t place, uint32_t job, uint32_t bits)
{
	const uint32_t *members = s->members + ((int64_t)place * s->set->jobs + job) * EK_MAX_WORKERS;
	uint32_t workers = 0;
	for (; bits; bits &= bits - 1)
		workers |= members[__builtin_ctz(bits)];
	return workers;
}

static inline int is_top(const struct state *s, uint32_t place, uint32_t job)
{
	return s->full[(int64_t)place * s->set->jobs + job] == s->full[(int64_t)s->root * s->set->jobs + job];
}

static void pass_time(struct state *s, int64_t slot)
{
	int64_t since = s->now - s->touched_ps[slot];
	s->out->useful_ps += since < s->set->useful_ps ? since : s->set->useful_ps;
	s->out->waiting_ps += since < s->set->useful_ps ? 0 : since - s->set->useful_ps;
	s->touched_ps[slot] = s->now;
}

static int64_t slot_of(const struct ek_slot *slots, int64_t first, int64_t ways, const struct ek_header *header)
{
	for (int64_t slot = first; slot < first + ways; slot++)
		if (slots[slot].bitmap && slots[slot].fragment == header->fragment && slots[slot].job == header->job &&
		    slots[slot].epoch == header->epoch)
			return slot;
	return -1;
}

/* Applies the rule; `*e` becomes the packet that leaves, if one does. */
static struct ek_sent apply(struct state *s, uint32_t place, struct event *e, uint8_t kind, uint32_t bit)
{
	struct ek_table *table = s->tables + place;
	struct ek_job *job = table->jobs + e->job;
	struct ek_sent nothing = {EK_NOBODY, 0, EK_BAD_EPOCH};
	if (e->epoch < job->epoch) {
		s->out->stale++;
		return nothing;
	}
	job->epoch = e->epoch;
	struct ek_header header = {
		.kind = kind, .lanes = EK_INTS, .priority = e->priority, .words = 1, .token = job->token, .job = e->job,
		.fragment = e->seq, .epoch = e->epoch,
		.bitmap = kind == EK_REMINDER ? 0 : kind == EK_RESULT ? ek_all(job) : 1u << bit,
	};
	const struct ek_rule *rule = &table->rule;
	int64_t first = (int64_t)ek_set_of(rule, &header) * rule->ways;
	int64_t found = slot_of(table->slots, first, rule->ways, &header);
	int held = rule->ways == 1 && table->slots[first].bitmap;
	struct ek_header out;
	uint64_t sum = 0;
	struct ek_sent sent = ek_apply(
		rule, table->jobs, table->slots + first, table->sums + first,
		table->tombs, table->counters, &header, &e->sum,
		kind == EK_GRADIENT || kind == EK_RESEND ? bit : EK_SERVER_ID, (uint64_t)s->now / 1000, &out, &sum);
	if (found >= 0)
		pass_time(s, (int64_t)place * s->slots_each + found);
	else if (sent.counted == EK_INSTALLED || sent.counted == EK_EVICTED) {
		int64_t slot = (int64_t)place * s->slots_each + slot_of(table->slots, first, rule->ways, &header);
		if (sent.counted == EK_EVICTED || held)
			pass_time(s, slot);
		s->touched_ps[slot] = s->now;
	}
	if (sent.filled) {
		e->job = (uint16_t)out.job;
		e->seq = out.fragment;
		e->epoch = (uint16_t)out.epoch;
		e->priority = out.priority;
		e->bits = workers_of(s, place, out.job, out.bitmap);
		e->sum = sum;
	}
	return sent;
}

/* A rack's part of a sum is complete: it goes on to the root as if a worker had sent it. */
static void go_up(struct state *s, uint32_t place, struct event e)
{
	e.kind = DATA_AT_SWITCH;
	e.flags = 0;
	e.place = s->root;
	travel(s, over(&s->trunk_up[place], s->now, s->set->trunk_ps) + s->set->trunk_delay_ps, e);
}

static void data_at_switch(struct state *s, struct event *e)
{
	uint32_t place = e->place;
	if (s->set->policy == NO_INA || e->flags & RESULT) {
		to_server(s, place, *e);
		return;
	}
	uint32_t bit = s->bit_of[(int64_t)s->jobs[e->job].first_worker + e->worker];
	if (s->root && (int32_t)place == s->root)
		bit = s->rack_bit[(int64_t)s->rack_of[s->jobs[e->job].first_worker + e->worker] * s->set->jobs + e->job];
	struct ek_sent sent = apply(s, place, e, e->flags & RESEND ? EK_RESEND : EK_GRADIENT, bit);
	if (sent.to == EK_NOBODY)
		return;
	if (sent.to == EK_SENDER && !is_top(s, place, e->job)) { /* the rack's part was lost, or what came of it */
		go_up(s, place, *e);
		return;
	}
	if (sent.to == EK_SENDER) {
		e->kind = RESULT_AT_WORKER;
		int64_t *busy = &s->workers[s->jobs[e->job].first_worker + e->worker].down_busy;
		travel(s, over(busy, s->now, s->set->packet_ps) + s->set->worker_delay_ps, *e);
		return;
	}
	if (sent.counted != EK_COMPLETED) {
		if (sent.counted == EK_EVICTED)
			e->flags = 0;
		to_server(s, place, *e);
		return;
	}
	if (!is_top(s, place, e->job)) {
		go_up(s, place, *e);
		return;
	}
	s->out->in_switch++;
	if (sent.to == EK_SERVER) {
		to_server(s, place, *e);
		return;
	}
	if (s->set->policy != EK_SWITCHML) {
		struct event copy = *e;
		copy.flags = RESULT;
		to_server(s, place, copy);
	}
	multicast(s, place, *e);
}

static void reminder_at_switch(struct state *s, struct event *e)
{
	struct event flushed = *e;
	if (apply(s, e->place, &flushed, EK_REMINDER, 0).counted == EK_FLUSHED)
		to_server(s, e->place, flushed);
	if (s->root && e->place == s->root)
		for (int rack = 0; rack < s->set->racks; rack++)
			if (s->full[(int64_t)rack * s->set->jobs + e->job]) {
				struct event below = *e;
				below.place = rack;
				travel(s, s->now + s->set->control_ps + s->set->trunk_delay_ps, below);
			}
}

/* What goes to the server unchanged; a resend takes along what the root has of its fragment. */
static void pass_at_switch(struct state *s, struct event *e)
{
	if (e->flags & RESEND && s->set->policy != NO_INA && s->set->policy != EK_SWITCHML) {
		struct event flushed = *e;
		if (apply(s, e->place, &flushed, EK_REMINDER, 0).counted == EK_FLUSHED) {
			flushed.flags = 0;
			to_server(s, e->place, flushed);
		}
	}
	to_server(s, e->place, *e);
}

static void result_at_switch(struct state *s, struct event *e)
{
	if (s->set->policy != NO_INA && s->set->policy != EK_SWITCHML) {
		struct event freed = *e;
		apply(s, e->place, &freed, EK_RESULT, 0);
	}
	multicast(s, e->place, *e);
}

/* ---- servers ---- */

static void remind(struct state *s, uint32_t job, struct kept *k)
{
	s->out->reminders++;
	k->reminded = s->now;
	struct event event = {.kind = REMINDER_AT_SWITCH, .job = job, .seq = k->seq, .epoch = k->epoch, .place = s->root};
	travel(s, s->now + s->set->control_ps + s->set->server_delay_ps, event);
}

static void ask_missing(struct state *s, uint32_t job, struct kept *k)
{
	const struct job *j = s->jobs + job;
	int64_t delay = s->set->control_ps + s->set->server_delay_ps + s->set->worker_delay_ps + (s->root ? s->set->trunk_delay_ps : 0);
	for (int worker = 0; worker < j->workers; worker++)
		if (!(k->bits >> worker & 1)) {
			struct event event = {.kind = NACK_AT_WORKER, .job = job, .worker = worker, .seq = k->seq, .epoch = k->epoch};
			s->out->nacks++;
			travel(s, s->now + delay, event);
		}
}

static void result_from_server(struct state *s, uint32_t server, uint32_t job, const struct kept *k)
{
	int64_t copies = s->set->policy == NO_INA ? s->jobs[job].workers : 1;
	struct event event = {.kind = RESULT_AT_SWITCH, .job = job, .seq = k->seq, .epoch = k->epoch, .sum = k->sum, .place = s->root};
	travel(s, over(&s->server_up[server], s->now, copies * s->set->server_ps) + s->set->server_delay_ps, event);
}

/* What later fragments have overtaken is most likely in two parts, of which one waits in a switch: ask for it. */
static void look_behind(struct state *s, uint32_t job, uint32_t seq)
{
	uint32_t mask = s->kept_mask[job], low = s->unfinished_low[job];
	if (low + mask < seq)
		low = seq - mask;
	struct kept *kept = s->kept[job];
	while (low < seq && kept[low & mask].seq == low && kept[low & mask].done)
		low++;
	s->unfinished_low[job] = low;
	for (uint32_t at = low; at + 4 < seq && at < low + 8; at++) {
		struct kept *k = kept + (at & mask);
		if (k->seq == at && k->bits && !k->done && s->now - k->reminded > s->set->remind_ps)
			remind(s, job, k);
	}
}

static void at_server(struct state *s, struct event *e)
{
	if (s->server_back[e->place] > s->now)
		return;
	if (e->epoch < s->known_epoch[e->job]) {
		s->out->stale++;
		return;
	}
	if (e->epoch > s->known_epoch[e->job]) {
		s->known_epoch[e->job] = e->epoch;
		s->unfinished_low[e->job] = 0;
	}
	struct kept *k = s->kept[e->job] + (e->seq & s->kept_mask[e->job]);
	if (k->epoch != e->epoch || k->seq != e->seq) {
		if (k->epoch == e->epoch && k->seq > e->seq) {
			s->out->stale++;
			return;
		}
		*k = (struct kept){.seq = e->seq, .epoch = e->epoch, .reminded = s->now};
	}
	uint32_t full = s->full[(int64_t)s->root * s->set->jobs + e->job];
	if (k->done) {
		if (e->flags & RESEND && !(e->flags & RESULT)) { /* its result was lost */
			struct event answer = {
				.kind = RESULT_AT_WORKER, .job = e->job, .worker = e->worker, .seq = k->seq, .epoch = k->epoch, .sum = k->sum,
			};
			int64_t sent = over(&s->server_up[e->place], s->now, s->set->server_ps) + s->set->server_delay_ps;
			travel(s, sent + s->set->worker_delay_ps + (s->root ? s->set->trunk_delay_ps : 0), answer);
		}
		return;
	}
	if (e->flags & RESULT) {
		int wanted = k->bits != 0;
		k->sum = e->sum;
		k->bits = full;
		k->done = 1;
		if (wanted)
			result_from_server(s, e->place, e->job, k);
	} else if (k->bits & e->bits && e->bits != full) {
		s->out->duplicates++;
		if (e->bits & ~k->bits && s->now - k->reminded > s->set->remind_ps) { /* cannot be taken apart */
			k->reminded = s->now;
			ask_missing(s, e->job, k);
		}
	} else {
		k->sum = e->bits == full ? e->sum : k->sum + e->sum;
		k->bits |= e->bits;
		if (k->bits == full) {
			k->done = 1;
			result_from_server(s, e->place, e->job, k);
		}
	}
	if (k->done) {
		if (s->set->policy != NO_INA && s->set->policy != EK_ATP)
			look_behind(s, e->job, e->seq);
	} else if (!k->armed && (s->lossy || s->set->policy != NO_INA)) {
		k->armed = 1;
		struct event event = {.kind = REMIND, .job = e->job, .seq = k->seq, .epoch = k->epoch, .place = e->place};
		push(s, s->now + s->set->remind_ps, event);
	}
}

static void remind_again(struct state *s, struct event *e)
{
	struct kept *k = s->kept[e->job] + (e->seq & s->kept_mask[e->job]);
	if (k->seq != e->seq || k->epoch != e->epoch || k->done || !k->armed || s->server_back[e->place] > s->now)
		return;
	if (s->set->policy != NO_INA)
		remind(s, e->job, k);
	if (k->tries < 200)
		k->tries++;
	if (s->lossy && k->tries > 2)
		ask_missing(s, e->job, k);
	push(s, s->now + (s->set->remind_ps << (k->tries < 4 ? k->tries : 4)), *e);
}

static void nack_at_worker(struct state *s, struct event *e)
{
	const struct job *j = s->jobs + e->job;
	uint32_t number = j->first_worker + e->worker;
	struct worker *w = s->workers + number;
	if (e->epoch != s->epoch[e->job] || e->seq >= w->next)
		return;
	if (e->seq >= w->low && !s->received[number][e->seq & s->received_mask[e->job]]) {
		s->out->resends++;
		transmit(s, e->job, e->worker, e->seq, RESEND);
		return;
	}
	/* It has the result, and answers with that. */
	struct event answer = {
		.job = e->job, .worker = e->worker, .seq = e->seq, .epoch = e->epoch, .flags = RESEND | RESULT,
		.sum = whole_sum(s, e->job, e->seq), .bits = s->full[(int64_t)s->root * s->set->jobs + e->job], .kind = DATA_AT_SWITCH,
		.place = s->rack_of[number],
	};
	travel(s, over(&w->up_busy, s->now, s->set->packet_ps) + s->set->worker_delay_ps, answer);
}

/* ---- faults ---- */

static void restart_server(struct state *s, const struct fault *fault)
{
	s->server_back[fault->worker] = s->now + fault->down_ps;
	for (int64_t job = 0; job < s->set->jobs; job++)
		if (s->set->servers > s->set->jobs || s->jobs[job].server % s->set->servers == fault->worker)
			for (uint32_t place = 0; place <= s->kept_mask[job]; place++)
				if (s->set->servers <= s->set->jobs || place % s->set->servers == (uint32_t)fault->worker)
					s->kept[job][place] = (struct kept){0};
}

/* A worker that comes back computes another gradient. All workers begin the unfinished iteration's exchange again in a new epoch. */
static void restart_worker(struct state *s, const struct fault *fault)
{
	const struct job *j = s->jobs + fault->job;
	if (!s->working[fault->job] || s->now < j->arrival_ps)
		return;
	uint32_t low = UINT32_MAX;
	for (int worker = 0; worker < j->workers; worker++)
		if (s->workers[j->first_worker + worker].low < low)
			low = s->workers[j->first_worker + worker].low;
	int32_t iteration = (int32_t)(low / j->fragments);
	uint32_t first = (uint32_t)iteration * j->fragments;
	s->epoch[fault->job]++;
	s->working[fault->job] = j->workers;
	for (int worker = 0; worker < j->workers; worker++) {
		uint32_t number = j->first_worker + worker;
		struct worker *w = s->workers + number;
		memset(s->received[number], 0, s->received_mask[fault->job] + 1);
		w->finished = 0;
		w->low = w->next = w->checked = w->highest = first;
		if (worker == fault->worker) {
			w->incarnation++;
			w->generation++;
			w->iteration = iteration;
			w->step = 0;
			w->ready = first;
			w->computing = 1; /* starts again: its first layer is done late */
			for (int layer = 0; layer < j->layers; layer++)
				s->got[number][layer] = (int32_t)s->layers[j->first_layer + layer].fragments;
			struct event event = {.kind = COMPUTED, .job = fault->job, .worker = worker, .seq = (uint32_t)w->generation};
			push(s, s->now + fault->down_ps + s->layers[j->first_layer].forward_ps, event);
			continue;
		}
		if (w->iteration > iteration) { /* has its gradient, and perhaps went on */
			w->generation++;
			w->iteration = iteration + 1;
			w->step = 0;
			w->computing = 0;
			w->ready = first + j->fragments;
		}
		if (w->iteration > iteration || w->step >= j->layers)
			memset(s->got[number], 0, sizeof(int32_t) * j->layers);
		send_more(s, fault->job, worker);
	}
}

/* ---- the run ---- */

static void arrive(struct state *s, uint32_t job)
{
	for (int worker = 0; worker < s->jobs[job].workers; worker++) {
		compute(s, job, worker);
		if (s->lossy && s->set->policy != RING)
			arm_timeout(s, job, worker);
	}
}

static void handle(struct state *s, struct event *e)
{
	switch (e->kind) {
	case DATA_AT_SWITCH:
		s->out->packets++;
		data_at_switch(s, e);
		break;
	case PASS_AT_SWITCH:
		s->out->packets++;
		pass_at_switch(s, e);
		break;
	case AT_SERVER:
		s->out->packets++;
		at_server(s, e);
		break;
	case RESULT_AT_SWITCH:
		s->out->packets++;
		result_at_switch(s, e);
		break;
	case RESULT_AT_WORKER:
	case RESULT_AT_WORKERS: {
		const struct job *j = s->jobs + e->job;
		if (e->epoch != s->epoch[e->job]) {
			s->out->stale++;
			break;
		}
		s->out->wrong += e->sum != whole_sum(s, e->job, e->seq);
		for (int worker = 0; worker < j->workers; worker++) {
			if (e->kind == RESULT_AT_WORKER ? worker != e->worker : s->rack_of[j->first_worker + worker] != e->place)
				continue;
			s->out->packets++;
			if (e->kind == RESULT_AT_WORKERS && s->lossy && happens(s, s->set->loss)) {
				s->out->lost++;
				continue;
			}
			result_at(s, e->job, worker, e->seq);
		}
		break;
	}
	case NACK_AT_WORKER:
		nack_at_worker(s, e);
		break;
	case REMINDER_AT_SWITCH:
		reminder_at_switch(s, e);
		break;
	case REMIND:
		remind_again(s, e);
		break;
	case OVERTAKEN:
		overtaken(s, e);
		break;
	case TIMEOUT:
		timed_out(s, e);
		break;
	case COMPUTED:
		computed(s, e);
		break;
	case RING_DONE:
		ring_done(s, e);
		break;
	case ARRIVAL:
		arrive(s, e->job);
		break;
	case FAULT:
		if (s->faults[e->seq].job < 0)
			restart_server(s, s->faults + e->seq);
		else
			restart_worker(s, s->faults + e->seq);
		break;
	}
}

static void *zeros(struct state *s, size_t count, size_t size)
{
	void *memory = calloc(count ? count : 1, size);
	if (!memory)
		s->failed = 1;
	return memory;
}

static uint32_t mask_above(uint32_t count)
{
	uint32_t size = 1;
	while (size < count)
		size *= 2;
	return size - 1;
}

/* Gives every switch the rule, its jobs and empty memory. */
static void set_up_switches(struct state *s, int64_t switches)
{
	const struct settings *set = s->set;
	int64_t jobs = set->jobs, workers = 0;
	for (int64_t job = 0; job < jobs; job++)
		workers += s->jobs[job].workers;
	s->tables = zeros(s, switches, sizeof *s->tables);
	s->slots = zeros(s, switches * set->slots, sizeof *s->slots);
	s->sums = zeros(s, switches * set->slots, sizeof *s->sums);
	s->touched_ps = zeros(s, switches * set->slots, sizeof *s->touched_ps);
	s->tombs = zeros(s, switches * set->tombs, sizeof *s->tombs);
	s->counters = zeros(s, switches * EK_COUNTERS, sizeof *s->counters);
	s->table_jobs = zeros(s, switches * EK_MAX_JOBS, sizeof *s->table_jobs);
	s->members = zeros(s, switches * jobs * EK_MAX_WORKERS, sizeof *s->members);
	s->bit_of = zeros(s, workers, 1);
	s->rack_bit = zeros(s, set->racks * jobs, 1);
	if (s->failed)
		return;
	for (int64_t place = 0; place < switches; place++) {
		struct ek_table *table = s->tables + place;
		*table = (struct ek_table){
			.rule = {
				.policy = (uint32_t)set->policy, .sets = (uint32_t)(set->slots / set->ways), .ways = (uint32_t)set->ways,
				.words = 1, .regions = (uint32_t)set->regions, .tombs = (uint32_t)set->tombs,
				
				.stale_ns = (uint64_t)set->stale_ns, .tomb_ns = (uint64_t)set->tomb_ns,
			},
			.jobs = s->table_jobs + place * EK_MAX_JOBS, .slots = s->slots + place * set->slots,
			.sums = s->sums + place * set->slots, .tombs = s->tombs + place * set->tombs,
			.counters = s->counters + place * EK_COUNTERS,
		};
		for (int64_t job = 0; job < jobs; job++) {
			const struct job *j = s->jobs + job;
			uint32_t *members = s->members + (place * jobs + job) * EK_MAX_WORKERS;
			uint8_t count = 0;
			if (s->root && place == s->root) {
				for (int64_t rack = 0; rack < set->racks; rack++)
					if (s->full[rack * jobs + job]) {
						s->rack_bit[rack * jobs + job] = count;
						members[count++] = s->full[rack * jobs + job];
					}
			} else {
				for (int worker = 0; worker < j->workers; worker++)
					if (s->rack_of[j->first_worker + worker] == place) {
						s->bit_of[j->first_worker + worker] = count;
						members[count++] = 1u << worker;
					}
			}
			table->jobs[job] = (struct ek_job){
				.token = (uint64_t)job + 1, .words = 1, .workers = count, .lanes = EK_INTS, .largest = 1,
			};
		}
	}
}

static void set_up(struct state *s)
{
	const struct settings *set = s->set;
	int64_t jobs = set->jobs, workers = 0, switches = set->racks > 1 ? set->racks + 1 : 1;
	s->root = set->racks > 1 ? (int32_t)set->racks : 0;
	s->lossy = set->loss || set->duplicate || set->reorder || set->faults;
	s->random = mixed((uint64_t)set->seed + 1);
	for (int64_t job = 0; job < jobs; job++)
		workers += s->jobs[job].workers;
	s->workers = zeros(s, workers, sizeof *s->workers);
	s->received = zeros(s, workers, sizeof *s->received);
	s->got = zeros(s, workers, sizeof *s->got);
	s->full = zeros(s, switches * jobs, sizeof *s->full);
	s->kept = zeros(s, jobs, sizeof *s->kept);
	s->kept_mask = zeros(s, jobs, sizeof *s->kept_mask);
	s->received_mask = zeros(s, jobs, sizeof *s->received_mask);
	s->epoch = zeros(s, jobs, sizeof *s->epoch);
	s->known_epoch = zeros(s, jobs, sizeof *s->known_epoch);
	s->unfinished_low = zeros(s, jobs, sizeof *s->unfinished_low);
	s->ready_layers = zeros(s, jobs, sizeof *s->ready_layers);
	s->ring_busy = zeros(s, jobs, sizeof *s->ring_busy);
	s->working = zeros(s, jobs, sizeof *s->working);
	s->trunk_up = zeros(s, set->racks, sizeof(int64_t));
	s->trunk_down = zeros(s, set->racks, sizeof(int64_t));
	s->server_down = zeros(s, set->servers, sizeof(int64_t));
	s->server_up = zeros(s, set->servers, sizeof(int64_t));
	s->server_back = zeros(s, set->servers, sizeof(int64_t));
	if (s->failed)
		return;
	s->slots_each = set->slots;
	for (int64_t job = 0; job < jobs; job++) {
		const struct job *j = s->jobs + job;
		s->working[job] = j->workers;
		s->finish[job] = -1;
		s->kept_mask[job] = mask_above(4 * (uint32_t)j->window + 16);
		s->received_mask[job] = mask_above((uint32_t)j->window);
		s->kept[job] = zeros(s, s->kept_mask[job] + 1, sizeof **s->kept);
		s->ready_layers[job] = zeros(s, j->layers, sizeof **s->ready_layers);
		for (int worker = 0; worker < j->workers && !s->failed; worker++) {
			int32_t number = j->first_worker + worker;
			s->received[number] = zeros(s, s->received_mask[job] + 1, 1);
			s->got[number] = zeros(s, j->layers, sizeof **s->got);
			s->full[(int64_t)s->rack_of[number] * jobs + job] |= 1u << worker;
			s->full[(int64_t)s->root * jobs + job] |= 1u << worker;
		}
		struct event event = {.kind = ARRIVAL, .job = (uint16_t)job};
		push(s, j->arrival_ps, event);
	}
	set_up_switches(s, switches);
	for (int64_t fault = 0; fault < set->faults; fault++) {
		struct event event = {.kind = FAULT, .seq = (uint32_t)fault};
		push(s, s->faults[fault].time_ps, event);
	}
}

static void tear_down(struct state *s)
{
	int64_t workers = 0;
	for (int64_t job = 0; job < s->set->jobs; job++) {
		workers += s->jobs[job].workers;
		if (s->kept)
			free(s->kept[job]);
		if (s->ready_layers)
			free(s->ready_layers[job]);
	}
	for (int64_t worker = 0; worker < workers; worker++) {
		if (s->received)
			free(s->received[worker]);
		if (s->got)
			free(s->got[worker]);
	}
	void *rest[] = {
		s->heap, s->pool, s->unused, s->workers, s->tables, s->slots, s->table_jobs, s->sums, s->tombs, s->counters,
		s->touched_ps, s->full, s->members, s->bit_of, s->rack_bit, s->kept, s->kept_mask, s->epoch, s->known_epoch, s->unfinished_low, s->received, s->received_mask, s->got, s->ready_layers, s->ring_busy, s->working,
		s->trunk_up, s->trunk_down, s->server_down, s->server_up, s->server_back,
	};
	for (size_t each = 0; each < sizeof rest / sizeof *rest; each++)
		free(rest[each]);
}

/* Runs all jobs to their end. Gives 0, or 1 where memory did not suffice, or 2 after `max_events`. */
EXPORT int evk_simulate(
	const struct settings *set, const struct job *jobs, const struct layer *layers, const float *factors, const uint8_t *priorities,
	const uint8_t *layer_of, const int32_t *rack_of, const struct fault *faults, struct totals *out, int64_t *finish)
{
	struct state state = {
		.set = set, .jobs = jobs, .layers = layers, .factors = factors, .priorities = priorities, .layer_of = layer_of,
		.rack_of = rack_of, .faults = faults, .out = out, .finish = finish,
	};
	struct state *s = &state;
	set_up(s);
	while (!s->failed && s->pending && out->events < set->max_events) {
		struct event event = pop(s);
		out->events++;
		handle(s, &event);
	}
	for (int64_t job = 0; job < set->jobs; job++) {
		out->fragments += (int64_t)jobs[job].iterations * jobs[job].fragments;
		out->unfinished += finish[job] < 0;
		if (finish[job] > out->makespan_ps)
			out->makespan_ps = finish[job];
	}
	for (int64_t at = 0; !s->failed && at < (s->root + 1) * EK_COUNTERS; at++) {
		int64_t count = (int64_t)s->counters[at];
		out->evictions += at % EK_COUNTERS == EK_EVICTED ? count : 0;
		out->bypassed += at % EK_COUNTERS == EK_BYPASSED ? count : 0;
		out->duplicates += at % EK_COUNTERS == EK_DUPLICATE ? count : 0;
	}
	int code = s->failed ? 1 : s->pending ? 2 : 0;
	tear_down(s);
	return code;
}
