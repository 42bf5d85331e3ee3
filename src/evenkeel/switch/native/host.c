/* Sends a message's fragments to whoever adds, and takes in the sums: a worker's side of the transport.
 *
 * A window of fragments is under way. It grows while results come back quickly; it shrinks when they wait longer in
 * queues than TARGET_NS, and when losses come with such waiting. Losses alone do not shrink it: a bad cable is no queue.
 * A fragment whose result is overdue is asked for in a QUERY of a few bytes; the server answers with the result, or with
 * a NACK if it lacks our part, and only then is that sent again.
 */
#include "wire.h"
#include "control.h"

#define MAX_SERVERS 16
#define MAX_BATCH 64
#define MAX_RESENDS 4096
#define FIRST_WINDOW 64
#define LEAST_WINDOW 8
#define TARGET_NS 8000000ull  /* in queues on top of the bare round trip */
#define SLOWEST_NS 25000000ull /* from one QUERY of a fragment to the next, on top of the round trip */

enum { FINISHED, GOES_ON, SILENT, UNKNOWN };
enum { UNSENT, SENT, HERE };
enum counter {
	SENT_PACKETS, SENT_BYTES, RECEIVED_PACKETS, RECEIVED_BYTES, RESENT, QUERIES, STALE, BAD, WINDOW, ROUND_TRIP_NS, COUNTERS
};

struct terms {
	uint32_t job, epoch, worker, world, lane_type, up_bytes, down_bytes, at_least, window, span;
	uint64_t token, silence_ns;
};

struct host {
	int fd, servers, segments;
	struct sockaddr_in server[MAX_SERVERS];
	struct terms terms;
	struct inbox inbox;
	uint64_t counters[COUNTERS];
	/* the call under way */
	const uint8_t *message;
	uint8_t *totals;
	uint32_t *bitmaps;
	uint32_t first, fragments, unsent, low, highest, here, under_way;
	uint8_t priority;
	uint8_t *state;
	uint64_t *sent_ns, *asked_ns;
	uint8_t *asked, *resent;
	uint32_t room;
	uint8_t *headers;
	struct iovec *pieces;
	uint32_t *resend, resends;
	/* the window */
	double window;
	uint64_t base_ns, round_sum_ns, trip_ns, checked_ns, result_ns, heard_ns[MAX_SERVERS];
	uint32_t round_end, round_lost, round_sent, round_trips, tainted;
	int growing_fast;
};

struct host *host_open(int fd, const uint32_t *addresses, const uint16_t *ports, int servers, const struct terms *terms)
{
	struct host *h = calloc(1, sizeof *h);

	if (!h || servers < 1 || servers > MAX_SERVERS || inbox_open(&h->inbox)) {
		free(h);
		return NULL;
	}
	h->fd = fd;
	h->servers = servers;
	h->segments = 1;
	h->terms = *terms;
	for (int i = 0; i < servers; i++)
		h->server[i] = (struct sockaddr_in){
			.sin_family = AF_INET, .sin_port = htons(ports[i]), .sin_addr.s_addr = htonl(addresses[i])};
	h->headers = malloc((size_t)MAX_BATCH * EK_HEADER_BYTES);
	h->pieces = malloc(2 * MAX_BATCH * sizeof *h->pieces);
	h->resend = malloc(MAX_RESENDS * sizeof *h->resend);
	h->window = FIRST_WINDOW;
	h->growing_fast = 1;
	socket_tune(fd, 8 << 20);
	if (!h->headers || !h->pieces || !h->resend) {
		free(h->headers);
		free(h->pieces);
		free(h->resend);
		free(h->inbox.bytes);
		free(h);
		return NULL;
	}
	return h;
}

void host_close(struct host *h)
{
	free(h->state);
	free(h->sent_ns);
	free(h->asked_ns);
	free(h->asked);
	free(h->resent);
	free(h->headers);
	free(h->pieces);
	free(h->resend);
	free(h->inbox.bytes);
	free(h);
}

/* Has the job's packets go by another number. */
void host_renumber(struct host *h, uint32_t job) { h->terms.job = job; }

static void all_heard(struct host *h)
{
	for (int i = 0; i < h->servers; i++)
		h->heard_ns[i] = now_ns();
}

/* Begins an exchange of so many fragments.
 *
 * message: fragments * up_bytes; totals: fragments * down_bytes, written; bitmaps: who is in each fragment, written. All
 * three must stay until the exchange is over. Gives -1 where memory is short. */
int host_begin(struct host *h, const uint8_t *message, uint8_t *totals, uint32_t *bitmaps, uint32_t first, uint32_t fragments,
	       uint32_t priority)
{
	if (fragments > h->room) {
		free(h->state);
		free(h->sent_ns);
		free(h->asked_ns);
		free(h->asked);
		free(h->resent);
		h->state = malloc(fragments);
		h->asked = malloc(fragments);
		h->resent = malloc(fragments);
		h->sent_ns = malloc(fragments * sizeof(uint64_t));
		h->asked_ns = malloc(fragments * sizeof(uint64_t));
		h->room = fragments;
		if (!h->state || !h->asked || !h->resent || !h->sent_ns || !h->asked_ns) {
			h->room = 0;
			return -1;
		}
	}
	memset(h->state, UNSENT, fragments);
	memset(h->asked, 0, fragments);
	memset(h->resent, 0, fragments);
	h->priority = priority;
	h->message = message;
	h->totals = totals;
	h->bitmaps = bitmaps;
	h->first = first;
	h->fragments = fragments;
	h->unsent = h->low = h->highest = h->here = h->under_way = h->resends = 0;
	h->round_sum_ns = 0;
	h->round_end = h->round_lost = h->round_sent = h->round_trips = h->tainted = 0;
	h->result_ns = now_ns();
	all_heard(h);
	return 0;
}

/* Sends everything anew that has no result yet: the server has forgotten it. */
void host_anew(struct host *h, uint32_t epoch)
{
	h->terms.epoch = epoch;
	for (uint32_t i = 0; i < h->fragments; i++)
		if (h->state[i] == SENT)
			h->state[i] = UNSENT;
	h->unsent = h->low;
	h->under_way = h->resends = 0;
	all_heard(h);
}

static void header_of(struct host *h, struct ek_header *p, int kind, int lanes, int bytes)
{
	*p = (struct ek_header){
		.magic = EK_MAGIC,
		.version = EK_VERSION,
		.kind = kind,
		.lanes = lanes,
		.priority = h->priority,
		.words = bytes / 8,
		.token = h->terms.token,
		.job = h->terms.job,
		.bitmap = 1u << h->terms.worker,
		.epoch = h->terms.epoch,
	};
}

/* Sends these fragments (numbers within the exchange), all of one server. */
static int send_fragments(struct host *h, const uint32_t *list, int count, int server, int kind, uint64_t now)
{
	int size = EK_HEADER_BYTES + h->terms.up_bytes;

	for (int i = 0; i < count; i++) {
		struct ek_header *p = (void *)(h->headers + i * EK_HEADER_BYTES);

		header_of(h, p, kind, h->terms.lane_type, h->terms.up_bytes);
		p->fragment = h->first + list[i];
		h->pieces[2 * i] = (struct iovec){p, EK_HEADER_BYTES};
		h->pieces[2 * i + 1] =
			(struct iovec){(void *)(h->message + (size_t)list[i] * h->terms.up_bytes), h->terms.up_bytes};
		h->sent_ns[list[i]] = now;
	}
	h->counters[SENT_PACKETS] += count;
	h->counters[SENT_BYTES] += (uint64_t)count * size;
	return send_run(h->fd, &h->server[server], h->pieces, 2, count, size, &h->segments);
}

static void send_more(struct host *h, uint64_t now)
{
	uint32_t batch[MAX_BATCH];

	for (int server = 0; server < h->servers && h->resends; server++) {
		int count = 0;

		for (uint32_t i = 0; i < h->resends; i++) {
			uint32_t f = h->resend[i];

			if ((h->first + f) % h->servers != (uint32_t)server || h->state[f] == HERE)
				continue;
			batch[count++] = f;
			if (count == MAX_BATCH) {
				send_fragments(h, batch, count, server, EK_RESEND, now);
				count = 0;
			}
		}
		if (count)
			send_fragments(h, batch, count, server, EK_RESEND, now);
	}
	h->counters[RESENT] += h->resends;
	h->round_lost += h->resends;
	h->resends = 0;
	while (h->unsent < h->fragments && h->under_way < h->window && h->unsent - h->low < h->terms.span) {
		uint32_t from = h->unsent, to = from;

		if (h->servers == 1) {
			int count = 0;

			while (to < h->fragments && to - h->low < h->terms.span && count < MAX_BATCH &&
			       h->under_way < h->window) {
				if (h->state[to] == UNSENT) {
					batch[count++] = to;
					h->state[to] = SENT;
					h->under_way++;
				}
				to++;
			}
			if (count)
				send_fragments(h, batch, count, 0, EK_GRADIENT, now);
			h->round_sent += count;
		} else {
			int counts[MAX_SERVERS] = {0};
			uint32_t lists[MAX_SERVERS][MAX_BATCH];

			while (to < h->fragments && to - h->low < h->terms.span && to - from < MAX_BATCH &&
			       h->under_way < h->window) {
				if (h->state[to] == UNSENT) {
					int server = (h->first + to) % h->servers;

					lists[server][counts[server]++] = to;
					h->state[to] = SENT;
					h->under_way++;
					h->round_sent++;
				}
				to++;
			}
			for (int server = 0; server < h->servers; server++)
				if (counts[server])
					send_fragments(h, lists[server], counts[server], server, EK_GRADIENT, now);
		}
		h->unsent = to;
	}
}

/* Sets the window after a round of it. */
static void end_round(struct host *h)
{
	double most = h->terms.window, target = h->base_ns + TARGET_NS;

	h->round_end = h->unsent;
	if (h->round_trips) {
		double trip = (double)h->round_sum_ns / h->round_trips;
		int losing = h->round_lost * 20 > h->round_sent + 20;

		h->trip_ns = trip;
		if (trip > target) {
			double factor = target / trip;

			h->window *= factor < .5 ? .5 : factor;
			h->growing_fast = 0;
		} else if (losing && trip > h->base_ns + TARGET_NS / 2) {
			h->window *= .7;
			h->growing_fast = 0;
		} else {
			h->window += h->growing_fast ? h->window : h->window / 8 + 1;
		}
	}
	if (h->window > most)
		h->window = most;
	if (h->window < LEAST_WINDOW)
		h->window = LEAST_WINDOW;
	h->round_sum_ns = 0;
	h->round_lost = h->round_sent = h->round_trips = 0;
}

/* Puts a result in its place; what it holds is there before anyone sees that it is. */
static void settle(struct host *h, uint32_t f, uint32_t bitmap, const uint8_t *total)
{
	memcpy(h->totals + (size_t)f * h->terms.down_bytes, total, h->terms.down_bytes);
	h->bitmaps[f] = bitmap;
	__atomic_store_n(&h->state[f], HERE, __ATOMIC_RELEASE);
	h->here++;
	while (h->low < h->fragments && h->state[h->low] == HERE)
		h->low++;
}

static void take_result(struct host *h, const struct ek_header *p, int size, uint64_t now)
{
	uint32_t f = p->fragment - h->first, full = h->terms.world >= 32 ? ~0u : (1u << h->terms.world) - 1;

	if (f >= h->fragments) {
		h->counters[STALE]++;
		return;
	}
	if (size != EK_HEADER_BYTES + (int)h->terms.down_bytes || p->lanes != h->terms.lane_type || p->bitmap & ~full ||
	    (p->bitmap != full && (!h->terms.at_least || (uint32_t)__builtin_popcount(p->bitmap) < h->terms.at_least))) {
		h->counters[BAD]++;
		return;
	}
	if (h->state[f] == HERE) {
		h->counters[STALE]++;
		return;
	}
	if (h->state[f] == SENT) {
		uint64_t trip = now - h->sent_ns[f];

		h->under_way--;
		/* Where nothing came at all for a while, it was no queue that held us up but another worker. */
		if (now - h->result_ns > 2 * TARGET_NS)
			h->tainted = h->unsent;
		if (!h->resent[f] && f >= h->tainted) { /* of what was sent twice nobody knows which one came back */
			if (!h->base_ns || trip < h->base_ns)
				h->base_ns = trip;
			h->round_sum_ns += trip;
			h->round_trips++;
		}
		if (f >= h->round_end)
			end_round(h);
	}
	settle(h, f, p->bitmap, (const uint8_t *)p + EK_HEADER_BYTES);
	h->result_ns = now;
	if (f + 1 > h->highest)
		h->highest = f + 1;
}

/* Says whether a server that owes us something has been silent for too long. */
static int is_silent(struct host *h, uint64_t now)
{
	for (int i = 0; i < h->servers; i++) {
		if (now - h->heard_ns[i] <= h->terms.silence_ns)
			continue;
		for (uint32_t f = h->low; f < h->unsent; f++)
			if (h->state[f] == SENT && (h->first + f) % h->servers == (uint32_t)i)
				return 1;
		h->heard_ns[i] = now;
	}
	return 0;
}

static void send_again(struct host *h, uint32_t fragment, uint64_t now)
{
	uint32_t f = fragment - h->first;

	/* Not what was sent again a moment ago: who lacks it said so before that came. */
	if (f >= h->fragments || h->state[f] != SENT || h->resends >= MAX_RESENDS ||
	    (h->resent[f] && now - h->sent_ns[f] <= h->base_ns))
		return;
	h->asked[f] = h->resent[f] = 1;
	h->sent_ns[f] = now;
	h->resend[h->resends++] = f;
}

static int take_packet(struct host *h, const struct sockaddr_in *from, const uint8_t *bytes, int size, uint64_t now)
{
	const struct ek_header *p = (const void *)bytes;

	h->counters[RECEIVED_PACKETS]++;
	h->counters[RECEIVED_BYTES] += size;
	if (ek_parse(p, size) || p->job != h->terms.job || p->token != h->terms.token || p->epoch != h->terms.epoch) {
		h->counters[BAD]++;
		return GOES_ON;
	}
	for (int i = 0; i < h->servers; i++)
		if (p->kind == EK_RESULT ? p->fragment % h->servers == (uint32_t)i
				      : from->sin_port == h->server[i].sin_port &&
						from->sin_addr.s_addr == h->server[i].sin_addr.s_addr)
			h->heard_ns[i] = now;
	if (p->kind == EK_RESULT) {
		take_result(h, p, size, now);
	} else if (p->kind == EK_NACK) {
		if (p->bitmap >> h->terms.worker & 1)
			send_again(h, p->fragment, now);
	} else if (p->kind == EK_CONTROL && size >= EK_CONTROL_BYTES) {
		const struct ek_control *c = (const void *)(p + 1);

		if (c->word == EK_REFUSED)
			return UNKNOWN;
		if (c->word == EK_LACKING)
			for (uint32_t i = 0; i < c->count && EK_CONTROL_BYTES + 4 * (int)(i + 1) <= size; i++) {
				uint32_t fragment;

				memcpy(&fragment, bytes + EK_CONTROL_BYTES + 4 * i, 4);
				send_again(h, fragment, now);
			}
	}
	return GOES_ON;
}

/* Asks for what is overdue. */
static void ask(struct host *h, uint64_t now)
{
	uint64_t trip = h->trip_ns, gap = trip + trip / 2 + 2000000, late = 2 * trip + 5000000;
	uint8_t bytes[EK_CONTROL_BYTES + 4 * EK_MAX_LISTED] = {0};
	uint32_t end = h->unsent;

	if (now - h->checked_ns < 1000000)
		return;
	h->checked_ns = now;
	for (int server = 0; server < h->servers; server++) {
		uint32_t count = 1, low = h->first + h->low;

		memcpy(bytes + EK_CONTROL_BYTES, &low, 4);
		for (uint32_t f = h->low; f < end && count < EK_MAX_LISTED; f++) {
			uint64_t since, wait = f < h->highest ? gap : late;

			if (h->state[f] != SENT || (h->first + f) % h->servers != (uint32_t)server)
				continue;
			since = h->asked[f] && h->asked_ns[f] > h->sent_ns[f] ? h->asked_ns[f] : h->sent_ns[f];
			wait <<= h->asked[f] > 4 ? 4 : h->asked[f];
			if (now - since < (wait < SLOWEST_NS + 2 * trip ? wait : SLOWEST_NS + 2 * trip))
				continue;
			h->asked_ns[f] = now;
			if (h->asked[f] < 255)
				h->asked[f]++;
			f += h->first;
			memcpy(bytes + EK_CONTROL_BYTES + 4 * count++, &f, 4);
			f -= h->first;
		}
		if (count > 1) {
			int words = (sizeof(struct ek_control) + 4 * count + 7) / 8;
			struct ek_control c = {EK_QUERY, count};

			header_of(h, (void *)bytes, EK_CONTROL, EK_NO_LANES, 8 * words);
			memcpy(bytes + EK_HEADER_BYTES, &c, sizeof c);
			h->counters[QUERIES]++;
			send_one(h->fd, &h->server[server], bytes, EK_HEADER_BYTES + 8 * words);
		}
	}
}

/* Tells servers that we have caught up, where all sums were there before we had sent our part: we are late no more. */
static void tell_low(struct host *h)
{
	uint8_t bytes[EK_CONTROL_BYTES + 8] = {0};
	struct ek_control c = {EK_QUERY, 1};
	uint32_t low = h->first + h->low;

	if (h->unsent == h->fragments)
		return;
	h->unsent = h->fragments;
	header_of(h, (void *)bytes, EK_CONTROL, EK_NO_LANES, 16);
	memcpy(bytes + EK_HEADER_BYTES, &c, sizeof c);
	memcpy(bytes + EK_CONTROL_BYTES, &low, 4);
	for (int i = 0; i < h->servers; i++)
		send_one(h->fd, &h->server[i], bytes, sizeof bytes);
}

/* Goes on with the exchange for so long. */
int host_step(struct host *h, uint64_t slice_ns)
{
	uint64_t now = now_ns(), end = now + slice_ns;

	for (;;) {
		int runs = inbox_fill(&h->inbox, h->fd);

		now = now_ns();
		for (int i = 0; i < runs; i++) {
			int size = h->inbox.messages[i].msg_len, segment = run_segment(&h->inbox, i);
			const uint8_t *bytes = h->inbox.pieces[i].iov_base;

			for (int at = 0; at < size; at += segment)
				if (take_packet(h, &h->inbox.from[i], bytes + at, size - at < segment ? size - at : segment, now) ==
				    UNKNOWN)
					return UNKNOWN;
		}
		h->counters[WINDOW] = h->window;
		h->counters[ROUND_TRIP_NS] = h->trip_ns;
		if (h->here == h->fragments) {
			tell_low(h);
			return FINISHED;
		}
		send_more(h, now);
		ask(h, now);
		if (is_silent(h, now))
			return SILENT;
		if (now >= end)
			return GOES_ON;
		if (!runs)
			wait_readable(h->fd, 1000000);
	}
}

/* Puts a result in place that came another way; 1 if it was missing. */
int host_put(struct host *h, uint32_t fragment, uint32_t bitmap, const uint8_t *total)
{
	uint32_t f = fragment - h->first;

	if (f >= h->fragments || h->state[f] == HERE)
		return 0;
	if (h->state[f] == SENT)
		h->under_way--;
	settle(h, f, bitmap, total);
	return 1;
}

/* Copies a result that is here; 0 if it is not. May be called while another thread goes on with the exchange. */
int host_get(struct host *h, uint32_t fragment, uint32_t *bitmap, uint8_t *total)
{
	uint32_t f = fragment - h->first;

	if (f >= h->fragments || __atomic_load_n(&h->state[f], __ATOMIC_ACQUIRE) != HERE)
		return 0;
	*bitmap = h->bitmaps[f];
	memcpy(total, h->totals + (size_t)f * h->terms.down_bytes, h->terms.down_bytes);
	return 1;
}

/* Reads numbers of `bits` bits, and gives what each stands for. */
void host_unpack(const uint8_t *packed, const uint8_t *table, int bits, uint8_t *lanes, uint64_t count)
{
	uint64_t whole = count / 8, mask = (1u << bits) - 1;

	for (uint64_t i = 0; i < whole; i++) { /* eight numbers are `bits` whole bytes */
		uint64_t word = 0;

		memcpy(&word, packed + i * bits, bits);
		for (int k = 0; k < 8; k++)
			lanes[8 * i + k] = table[word >> (k * bits) & mask];
	}
	for (uint64_t i = 8 * whole; i < count; i++) {
		uint64_t at = i * bits;
		uint32_t word = packed[at >> 3] | (uint32_t)packed[(at + bits - 1) >> 3] << 8;

		lanes[i] = table[word >> (at & 7) & ((1u << bits) - 1)];
	}
}

/* Lists fragments of the exchange whose results are missing; gives how many were written. */
int host_missing(struct host *h, uint32_t *list, int most)
{
	int count = 0;

	for (uint32_t f = h->low; f < h->fragments && count < most; f++)
		if (h->state[f] != HERE)
			list[count++] = h->first + f;
	return count;
}

/* Says below which fragment all results are here. */
uint32_t host_low(struct host *h) { return h->first + h->low; }

const uint64_t *host_counters(struct host *h, int *count)
{
	*count = COUNTERS;
	return h->counters;
}
