/* The packets of in-network aggregation and their parser; `switch/packet.py` is the same in Python, and says what the
 * fields are. Compiles for user space and for BPF: no libc, no floating point. */
#ifndef EVENKEEL_PACKET_H
#define EVENKEEL_PACKET_H

#ifndef __bpf__
#include <stdint.h>
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packets are little-endian, and so must the processor be"
#endif

#define EK_INLINE static inline __attribute__((always_inline, unused))

#define EK_MAGIC 0x4b45
#define EK_VERSION 1
#define EK_HEADER_BYTES 32
#define EK_MAX_WORKERS 32
#define EK_MAX_JOBS 256
#define EK_MAX_WORDS 428 /* of payload: an IP packet of 3,498 bytes */

enum ek_kind {
	EK_GRADIENT = 1,
	EK_RESEND = 2,
	EK_REMINDER = 3,
	EK_NACK = 4,
	EK_RESULT = 5,
	EK_PARTIAL = 6,
	EK_CONTROL = 7,
};

enum ek_lanes {
	EK_NO_LANES = 0,
	EK_NIBBLES = 1,
	EK_THC = 2,
	EK_BYTES = 3,
	EK_SHORTS = 4,
	EK_INTS = 5,
};

/* Why a packet was dropped; 0 where it was not. */
enum ek_reason {
	EK_OK = 0,
	EK_BAD_SHORT = 1,
	EK_BAD_MAGIC = 2,
	EK_BAD_VERSION = 3,
	EK_BAD_KIND = 4,
	EK_BAD_LANE_TYPE = 5,
	EK_BAD_LENGTH = 6,
	EK_BAD_BITMAP = 7,
	EK_BAD_JOB = 8,
	EK_BAD_TOKEN = 9,
	EK_BAD_SENDER = 10,
	EK_BAD_EPOCH = 11,
	EK_BAD_BOUND = 12,
	EK_DUPLICATE = 13,
	EK_STALE = 14,
	EK_REASONS = 15,
};

struct ek_header {
	uint16_t magic;
	uint8_t version;
	uint8_t kind;
	uint8_t lanes;
	uint8_t priority;
	uint16_t words;
	uint64_t token;
	uint32_t job;
	uint32_t fragment;
	uint32_t bitmap;
	uint32_t epoch;
} __attribute__((packed));

_Static_assert(sizeof(struct ek_header) == EK_HEADER_BYTES, "the header's layout");

EK_INLINE int ek_one_bit(uint32_t bits)
{
	return bits && !(bits & (bits - 1));
}

EK_INLINE uint32_t ek_count(uint32_t bits)
{
	bits = bits - (bits >> 1 & 0x55555555u);
	bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
	bits = (bits + (bits >> 4)) & 0x0f0f0f0fu;
	return bits * 0x01010101u >> 24;
}

/* Are these a packet's bytes? `header` must be readable only where `length` says so. */
EK_INLINE enum ek_reason ek_parse(const struct ek_header *header, uint32_t length)
{
	int raw, control;

	if (length < EK_HEADER_BYTES)
		return EK_BAD_SHORT;
	if (header->magic != EK_MAGIC)
		return EK_BAD_MAGIC;
	if (header->version != EK_VERSION)
		return EK_BAD_VERSION;
	if (header->kind < EK_GRADIENT || header->kind > EK_CONTROL)
		return EK_BAD_KIND;
	control = header->kind == EK_CONTROL;
	if (header->lanes > EK_INTS || (header->lanes == EK_NO_LANES) != control)
		return EK_BAD_LANE_TYPE;
	if (header->words > EK_MAX_WORDS || length != EK_HEADER_BYTES + 8u * header->words)
		return EK_BAD_LENGTH;
	if ((header->words == 0) != (header->kind == EK_NACK) && header->kind != EK_REMINDER && !control)
		return EK_BAD_LENGTH;
	raw = header->kind == EK_GRADIENT || header->kind == EK_RESEND;
	if (raw && !ek_one_bit(header->bitmap))
		return EK_BAD_BITMAP;
	if (header->kind == EK_REMINDER && header->bitmap)
		return EK_BAD_BITMAP;
	if (!raw && header->kind != EK_REMINDER && !control && !header->bitmap)
		return EK_BAD_BITMAP;
	return EK_OK;
}

#endif
