/* The switch in the kernel: an XDP program on the ports through which workers and servers speak to each other.
 *
 * It sits in the path. Workers and server address one another as if it was not there, and whatever it does not add goes
 * on to where it was sent. What it makes itself, it addresses: sums to the server, results to everyone in the job.
 *
 * Compiled for one set-up, by `switch/kernel.py`: EK_WORDS, EK_POLICY, EK_SETS, EK_WAYS, EK_REGIONS, EK_TOMBS,
 * EK_STALE_NS, EK_TOMB_NS, EK_PORT (of the server, UDP); EK_TEST_CLOCK where a test sets the time.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "rule.h"

#define BYTES_OF(words) ((words) * 8u)

/* One set of slots, and the lock under which it changes. */
struct bucket {
	struct bpf_spin_lock lock;
	uint32_t unused;
	struct ek_slot slots[EK_WAYS];
	uint64_t sums[EK_WAYS * EK_WORDS];
};

struct jobs {
	struct ek_job of[EK_MAX_JOBS];
};

struct tombs {
	uint64_t at[EK_TOMBS ? EK_TOMBS : 1];
};

struct counters {
	uint64_t of[EK_COUNTERS];
};

struct words {
	uint64_t of[EK_WORDS];
};

/* Who sends from an address in a job, and through which port; 0: any. */
struct sender_key {
	uint32_t job;
	uint32_t address;
};

struct sender {
	uint32_t number;
	uint32_t port;
};

/* Where packets of a job go that leave through a port. */
struct receiver_key {
	uint32_t job;
	uint32_t port;
};

struct receiver {
	uint32_t address;
	uint32_t from_address; /* 0: whoever sent it */
	uint16_t udp;
	uint16_t from_udp;
	uint8_t mac[6];
	uint8_t unused[2];
};

struct server {
	uint32_t address;
	uint32_t port; /* of the switch; 0: there is no such job */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EK_SETS);
	__type(key, uint32_t);
	__type(value, struct bucket);
} buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE); /* one job is written while others run */
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct jobs);
} jobs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct tombs);
} tombs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, struct words);
} scratch SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, EK_MAX_JOBS * 33);
	__type(key, struct sender_key);
	__type(value, struct sender);
} senders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, EK_MAX_JOBS * 33);
	__type(key, struct receiver_key);
	__type(value, struct receiver);
} receivers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EK_MAX_JOBS);
	__type(key, uint32_t);
	__type(value, struct server);
} servers SEC(".maps");

/* All ports, by their interface's number; each runs `ek_leave`. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, 256);
	__type(key, uint32_t);
	__type(value, struct bpf_devmap_val);
} ports SEC(".maps");

#ifdef EK_TEST_CLOCK
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, uint32_t);
	__type(value, uint64_t);
} clock SEC(".maps");
#endif

static const struct ek_rule rule = {
	.policy = EK_POLICY,
	.sets = EK_SETS,
	.ways = EK_WAYS,
	.words = EK_WORDS,
	.regions = EK_REGIONS,
	.tombs = EK_TOMBS,
	.stale_ns = EK_STALE_NS,
	.tomb_ns = EK_TOMB_NS,
};

/* The headers in front of a packet. */
struct frame {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	struct ek_header packet;
} __attribute__((packed));

EK_INLINE uint64_t time_ns(void)
{
#ifdef EK_TEST_CLOCK
	uint32_t zero = 0;
	uint64_t *now = bpf_map_lookup_elem(&clock, &zero);

	return now ? *now : 0;
#else
	/* The time of the last tick, milliseconds old, costs a tenth: enough to find what is stale, not to order slots. */
	return EK_POLICY == EK_ASSOC ? bpf_ktime_get_ns() : bpf_ktime_get_coarse_ns();
#endif
}

EK_INLINE uint16_t folded(uint64_t sum)
{
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

EK_INLINE int is_ours(const struct frame *frame)
{
	return frame->eth.h_proto == bpf_htons(ETH_P_IP) && frame->ip.version == 4 && frame->ip.ihl == 5 &&
	       frame->ip.protocol == 17 && !(frame->ip.frag_off & bpf_htons(0x3fff)) &&
	       (frame->udp.dest == bpf_htons(EK_PORT) || frame->udp.source == bpf_htons(EK_PORT));
}

/* Writes lengths and checksums for a packet of the job's full length. UDP's is not optional here: without it the receiver
 * cannot join packets (GRO). */
EK_INLINE void seal(struct frame *frame, const uint64_t *payload)
{
	const uint32_t udp_length = sizeof(struct udphdr) + EK_HEADER_BYTES + BYTES_OF(EK_WORDS);
	const uint64_t *header = (const uint64_t *)&frame->packet;
	uint64_t sum = 0, other = 0;
	uint32_t i;

	frame->udp.len = bpf_htons(udp_length);
	frame->ip.tot_len = bpf_htons(sizeof(struct iphdr) + udp_length);
	frame->ip.ttl = 64;
	frame->ip.check = 0;
	for (i = 0; i < sizeof(struct iphdr) / 2; i++)
		sum += ((const uint16_t *)&frame->ip)[i];
	frame->ip.check = ~folded(sum);
	sum = bpf_htons(17) + (uint64_t)frame->udp.len + frame->udp.len + frame->udp.source + frame->udp.dest +
	      frame->ip.saddr + (uint64_t)frame->ip.daddr;
	for (i = 0; i < EK_HEADER_BYTES / 8; i++) {
		uint64_t word = ek_load(header + i);

		sum += (word & 0xffffffffu) + (word >> 32);
	}
	EK_UNROLLED
	for (i = 0; i < EK_WORDS; i++) {
		uint64_t word = ek_load(payload + i);

		sum += word & 0xffffffffu;
		other += word >> 32;
	}
	sum = folded(sum + other);
	frame->udp.check = sum == 0xffff ? 0xffff : ~sum;
}

SEC("xdp")
int ek_switch(struct xdp_md *ctx)
{
	void *end = (void *)(long)ctx->data_end;
	struct frame *frame = (void *)(long)ctx->data;
	struct ek_sent sent = {};
	struct ek_header header, out = {};
	struct sender_key from;
	struct sender *sender;
	struct server *server;
	struct bucket *bucket;
	struct counters *counts;
	struct words *made;
	struct jobs *all;
	struct tombs *buried;
	struct ek_job *job;
	uint64_t *in, now;
	uint32_t zero = 0, length, set, number, raw, doubles, size, copied = 0;
	enum ek_reason reason;

	/* The shortest datagrams, which do not reach to the end of `frame`, are no packets. */
	if ((void *)&frame->packet > end || !is_ours(frame))
		return XDP_PASS;
	length = bpf_ntohs(frame->udp.len) - sizeof(struct udphdr);
	size = end - (void *)frame;
	if (bpf_ntohs(frame->udp.len) < sizeof(struct udphdr) ||
	    bpf_ntohs(frame->ip.tot_len) != bpf_ntohs(frame->udp.len) + sizeof(struct iphdr) ||
	    size < sizeof(struct ethhdr) + bpf_ntohs(frame->ip.tot_len))
		return XDP_PASS; /* not what it says: the host that gets it drops it */
	counts = bpf_map_lookup_elem(&counters, &zero);
	all = bpf_map_lookup_elem(&jobs, &zero);
	made = bpf_map_lookup_elem(&scratch, &zero);
	buried = bpf_map_lookup_elem(&tombs, &zero);
	if (!counts || !all || !made || !buried)
		return XDP_ABORTED;
	if (length < EK_HEADER_BYTES || (void *)(frame + 1) > end) {
		counts->of[EK_BAD_SHORT]++;
		return XDP_DROP;
	}
	reason = ek_parse(&frame->packet, length);
	if (!reason && frame->packet.kind == EK_CONTROL)
		return XDP_PASS;
	header = frame->packet;
	if (!reason && header.job >= EK_MAX_JOBS)
		reason = EK_BAD_JOB;
	if (reason)
		goto dropped;
	job = &all->of[header.job & (EK_MAX_JOBS - 1)];
	from.job = header.job;
	from.address = frame->ip.saddr;
	sender = bpf_map_lookup_elem(&senders, &from);
	server = bpf_map_lookup_elem(&servers, &header.job);
	number = sender && (!sender->port || sender->port == ctx->ingress_ifindex) ? sender->number : 255;
	/* A worker speaks to the server only: nobody else takes a result from it. */
	if (!server || (number != EK_SERVER_ID && frame->ip.daddr != server->address))
		number = 255;
	reason = ek_admit(job, &header, number);
	if (reason)
		goto dropped;
	raw = header.kind == EK_GRADIENT || header.kind == EK_RESEND;
	doubles = ek_doubles(job->lanes);
	in = (uint64_t *)(frame + 1);
	if (raw && !doubles) {
		if ((void *)(in + EK_WORDS) > end)
			return XDP_ABORTED;
		if (!ek_in_bound(job->lanes, job->largest, EK_WORDS, in)) {
			reason = EK_BAD_BOUND;
			goto dropped;
		}
	}
	if (header.epoch > job->epoch)
		job->epoch = header.epoch;
	set = ek_set_of(&rule, &header);
	bucket = bpf_map_lookup_elem(&buckets, &set);
	if (!bucket)
		return XDP_ABORTED;
	now = time_ns();
	if (!raw) {
		bpf_spin_lock(&bucket->lock);
		sent = ek_signal(&rule, all->of, bucket->slots, bucket->sums, buried->at, counts->of, &header, number, now,
				 &out, made->of);
		bpf_spin_unlock(&bucket->lock);
		copied = 1;
	} else if (doubles) {
		if ((void *)(in + EK_WORDS / 2) > end)
			return XDP_ABORTED;
		bpf_spin_lock(&bucket->lock);
		sent = ek_gradient(&rule, all->of, bucket->slots, bucket->sums, buried->at, counts->of, &header, in, 1, now,
				   &out, made->of);
		bpf_spin_unlock(&bucket->lock);
		copied = 1;
	} else {
		if ((void *)(in + EK_WORDS) > end)
			return XDP_ABORTED;
		bpf_spin_lock(&bucket->lock);
		sent = ek_gradient(&rule, all->of, bucket->slots, bucket->sums, buried->at, counts->of, &header, in, 0, now,
				   &out, in);
		bpf_spin_unlock(&bucket->lock);
	}
	if (sent.to == EK_NOBODY)
		return XDP_DROP;
	if (!sent.filled && header.kind != EK_REMINDER)
		return XDP_PASS;

	/* From here on the packet is one of the switch's own. A reminder goes back to the server whence it came. */
	if (number == EK_SERVER_ID) {
		uint32_t address = frame->ip.saddr;
		uint16_t port = frame->udp.source;

		frame->ip.saddr = frame->ip.daddr;
		frame->ip.daddr = address;
		frame->udp.source = frame->udp.dest;
		frame->udp.dest = port;
	}
	if (sent.filled) {
		if (copied) {
			if (bpf_xdp_adjust_tail(ctx, (int)(sizeof(struct frame) + BYTES_OF(EK_WORDS)) - (int)size)) {
				counts->of[EK_LOST]++; /* as on a link: its workers will be asked */
				return XDP_DROP;
			}
			end = (void *)(long)ctx->data_end;
			frame = (void *)(long)ctx->data;
			in = (uint64_t *)(frame + 1);
			if ((void *)(in + EK_WORDS) > end)
				return XDP_ABORTED;
			ek_take(EK_WORDS, made->of, in);
		}
		frame->packet = out;
		seal(frame, in);
		header.job = out.job;
	} else {
		frame->udp.check = 0; /* a host's own may be half done, to be finished by a network card that is none */
	}
	if (sent.to == EK_ALL)
		return bpf_redirect_map(&ports, 0, BPF_F_BROADCAST);
	server = bpf_map_lookup_elem(&servers, &header.job); /* that of an evicted sum may be another */
	if (!server)
		return XDP_ABORTED;
	return bpf_redirect_map(&ports, server->port, XDP_DROP);

dropped:
	counts->of[reason % EK_REASONS]++;
	/* Of a job that was not registered here its server knows, or drops it. */
	return reason == EK_BAD_JOB ? XDP_PASS : XDP_DROP;
}

EK_INLINE void replace(uint64_t *sum, uint16_t *field, uint16_t value)
{
	*sum += (uint16_t)~*field;
	*sum += value;
	*field = value;
}

/* Addresses a packet of the switch's own to the member of its job behind the port that it leaves through. */
SEC("xdp/devmap")
int ek_leave(struct xdp_md *ctx)
{
	void *end = (void *)(long)ctx->data_end;
	struct frame *frame = (void *)(long)ctx->data;
	struct receiver_key key;
	struct receiver *to;
	uint64_t sum;
	uint16_t *ip, check;

	if ((void *)(frame + 1) > end)
		return XDP_DROP;
	key.job = frame->packet.job;
	key.port = ctx->egress_ifindex;
	to = bpf_map_lookup_elem(&receivers, &key);
	if (!to)
		return XDP_DROP; /* nobody in this job is there */
	__builtin_memcpy(frame->eth.h_source, frame->eth.h_dest, ETH_ALEN);
	__builtin_memcpy(frame->eth.h_dest, to->mac, ETH_ALEN);
	/* Addresses and ports change, and both checksums with them (RFC 1624). */
	ip = (uint16_t *)&frame->ip;
	sum = 0;
	if (to->from_address) {
		replace(&sum, ip + 6, to->from_address & 0xffff);
		replace(&sum, ip + 7, to->from_address >> 16);
	}
	replace(&sum, ip + 8, to->address & 0xffff);
	replace(&sum, ip + 9, to->address >> 16);
	frame->ip.check = ~folded(sum + (uint16_t)~frame->ip.check);
	if (to->from_address)
		replace(&sum, &frame->udp.source, to->from_udp);
	replace(&sum, &frame->udp.dest, to->udp);
	if (!frame->udp.check)
		return XDP_PASS;
	check = ~folded(sum + (uint16_t)~frame->udp.check);
	frame->udp.check = check ? check : 0xffff;
	return XDP_PASS;
}

char _license[] SEC("license") = "Apache-2.0";
