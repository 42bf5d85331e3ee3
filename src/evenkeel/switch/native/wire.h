/* Sends and receives many datagrams at a time: what the host's side and the server's have in common.
 *
 * One sendmsg carries up to 64 packets of one size (UDP_SEGMENT), one recvmmsg several runs of them (UDP_GRO): the
 * kernel then goes through its layers once for a run. Where the kernel has no UDP_SEGMENT, each packet is sent alone.
 *
 * This is all that host and server know of sockets and time. With EK_VIRTUAL both are somebody else's: a test's.
 */
#ifndef EVENKEEL_WIRE_H
#define EVENKEEL_WIRE_H

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef SOL_UDP
#define SOL_UDP 17
#endif

#define RUNS 16            /* of packets, taken in at a time */
#define RUN_BYTES 65536
#define MAX_SEGMENTS 64   /* of the kernel: UDP_MAX_SEGMENTS */
#define MAX_RUN_BYTES 60000

struct inbox {
	struct mmsghdr messages[RUNS];
	struct iovec pieces[RUNS];
	struct sockaddr_in from[RUNS];
	char control[RUNS][64];
	uint8_t *bytes;
};

#ifdef EK_VIRTUAL
uint64_t virtual_now(void);
int virtual_take(int fd, uint32_t *address, uint16_t *port, uint8_t *bytes, int room); /* size; -1: nothing is there */
void virtual_give(int fd, uint32_t address, uint16_t port, const uint8_t *bytes, int size);
#endif

static inline uint64_t now_ns(void)
{
#ifdef EK_VIRTUAL
	return virtual_now();
#endif
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Gives a number that looks random and depends on nothing but its arguments. */
static inline uint64_t mixed(uint64_t seed, uint64_t count)
{
	uint64_t x = seed + 0x9e3779b97f4a7c15ull * (count + 1);

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* Decides on a loss: `share` of 2**32. */
static inline int lost(uint64_t share, uint64_t seed, uint64_t *count)
{
	return share && (mixed(seed, (*count)++) >> 32) < share;
}

static inline int inbox_open(struct inbox *box)
{
	box->bytes = malloc((size_t)RUNS * RUN_BYTES);
	return box->bytes ? 0 : -1;
}

/* Makes buffers as large as the kernel lets us, and asks for runs of packets. */
static inline void socket_tune(int fd, int bytes)
{
	int on = 1;

#ifdef EK_VIRTUAL
	return;
#endif
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
	setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof on);
}

/* Takes in what is there, without waiting. Gives the number of runs; 0: nothing. */
static inline int inbox_fill(struct inbox *box, int fd)
{
	int count;

	for (int i = 0; i < RUNS; i++) {
		struct msghdr *message = &box->messages[i].msg_hdr;

		box->pieces[i] = (struct iovec){box->bytes + (size_t)i * RUN_BYTES, RUN_BYTES};
		*message = (struct msghdr){
			.msg_name = &box->from[i],
			.msg_namelen = sizeof box->from[i],
			.msg_iov = &box->pieces[i],
			.msg_iovlen = 1,
			.msg_control = box->control[i],
			.msg_controllen = sizeof box->control[i],
		};
	}
#ifdef EK_VIRTUAL
	for (count = 0; count < RUNS; count++) {
		struct sockaddr_in *from = &box->from[count];
		int size = virtual_take(fd, &from->sin_addr.s_addr, &from->sin_port, box->pieces[count].iov_base, RUN_BYTES);

		if (size < 0)
			return count;
		from->sin_family = AF_INET;
		box->messages[count].msg_len = size;
		box->messages[count].msg_hdr.msg_controllen = 0;
	}
	return count;
#endif
	count = recvmmsg(fd, box->messages, RUNS, MSG_DONTWAIT, NULL);
	return count < 0 ? 0 : count;
}

/* Gives the size of each packet of a run but the last, which may be shorter. */
static inline int run_segment(struct inbox *box, int i)
{
	struct msghdr *message = &box->messages[i].msg_hdr;
	int size = box->messages[i].msg_len;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c))
		if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO)
			memcpy(&size, CMSG_DATA(c), sizeof size);
	return size > 0 ? size : (int)box->messages[i].msg_len;
}

/* Waits until something can be read, or the time is over. */
static inline void wait_readable(int fd, uint64_t wait_ns)
{
#ifdef EK_VIRTUAL
	return;
#endif
	struct pollfd one = {fd, POLLIN, 0};
	struct timespec t = {wait_ns / 1000000000ull, wait_ns % 1000000000ull};

	ppoll(&one, 1, &t, NULL);
}

/* Sends one packet, or loses it where the socket is full. */
static inline void send_one(int fd, const struct sockaddr_in *to, const void *bytes, int size)
{
#ifdef EK_VIRTUAL
	virtual_give(fd, to->sin_addr.s_addr, to->sin_port, bytes, size);
	return;
#endif
	sendto(fd, bytes, size, MSG_DONTWAIT, (const void *)to, sizeof *to);
}

/* Sends `packets` packets of `size` bytes, each of `parts` pieces in a row, to one address. Blocks while the socket is
 * full. Gives 0, or -1 where the kernel refused. */
static inline int send_run(int fd, const struct sockaddr_in *to, struct iovec *pieces, int parts, int packets, int size,
			   int *segments)
{
#ifdef EK_VIRTUAL
	for (; packets > 0; packets--, pieces += parts) {
		uint8_t whole[RUN_BYTES];
		int at = 0;

		for (int i = 0; i < parts; at += pieces[i++].iov_len)
			memcpy(whole + at, pieces[i].iov_base, pieces[i].iov_len);
		virtual_give(fd, to->sin_addr.s_addr, to->sin_port, whole, at);
	}
	return 0;
#endif
	while (packets > 0) {
		int some = packets, most = MAX_RUN_BYTES / size;
		char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
		struct msghdr message = {.msg_name = (void *)to, .msg_namelen = sizeof *to, .msg_iov = pieces};

		if (some > most)
			some = most;
		if (some > MAX_SEGMENTS)
			some = MAX_SEGMENTS;
		if (!*segments || some < 1)
			some = 1;
		message.msg_iovlen = (size_t)some * parts;
		if (some > 1) {
			struct cmsghdr *c;
			uint16_t segment = size;

			message.msg_control = control;
			message.msg_controllen = sizeof control;
			c = CMSG_FIRSTHDR(&message);
			c->cmsg_level = SOL_UDP;
			c->cmsg_type = UDP_SEGMENT;
			c->cmsg_len = CMSG_LEN(sizeof segment);
			memcpy(CMSG_DATA(c), &segment, sizeof segment);
		}
		if (sendmsg(fd, &message, 0) < 0) {
			if (errno == EINTR)
				continue;
			if (some > 1 && (errno == EINVAL || errno == EIO || errno == EOPNOTSUPP || errno == EMSGSIZE)) {
				*segments = 0;
				continue;
			}
			if (errno != ENOBUFS && errno != ECONNREFUSED)
				return -1;
		}
		pieces += (size_t)some * parts;
		packets -= some;
	}
	return 0;
}

#endif
