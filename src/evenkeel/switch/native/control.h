/* What hosts and servers say to each other in CONTROL packets: no part of the rule, and no switch looks inside.
 * `switch/control.py` writes and reads the same in Python.
 */
#ifndef EVENKEEL_CONTROL_H
#define EVENKEEL_CONTROL_H

#include "packet.h"

enum ek_word {
	EK_HELLO = 1,   /* worker to server: these are my job's terms; for `job` stands its name among workers */
	EK_WELCOME = 2, /* server to worker: you are in */
	EK_REFUSED = 3, /* server to worker: you are not; a text says why */
	EK_QUERY = 4,   /* worker to server: these results are overdue */
	EK_LACKING = 5, /* server to worker: of these fragments your part is missing */
	EK_ALIVE = 6,   /* server to worker: here I am, and have no more than you */
	EK_ASK = 7,     /* anybody to server: what must fragments be like? */
	EK_SHAPE = 8,   /* the answer */
};

/* Begins the payload of a CONTROL packet. `count` bytes or numbers follow, padded with zeros to whole words. */
struct ek_control {
	uint32_t word;
	uint32_t count;
};

#define EK_NO_NUMBER 0xffffffffu

struct ek_hello {
	uint32_t world, worker, lanes, lane_type, sum_bits, mapped, at_least, window;
	uint64_t deadline_ns;
	uint32_t sent, low;     /* the worker has sent no fragment from the first on; below the second it has all results */
	uint32_t shards, shard; /* fragments f with f % shards == shard are this server's */
	uint32_t number;        /* by which the job's packets go, if a server has said so; EK_NO_NUMBER */
	uint32_t unused;
	uint8_t map[256];       /* of a sum, to what is written for it */
};

struct ek_welcome {
	uint64_t boot;     /* changes when a server is started again */
	uint32_t span;     /* how far a worker may be ahead of its first missing result, in fragments */
	uint32_t sum_bits; /* in which sums come; 0: as lanes */
	uint32_t job;      /* by which number packets of the job go from now on */
	uint32_t unused;
};

struct ek_shape {
	uint32_t words;      /* that the sums of a fragment must have; 0: any number */
	uint32_t bytes_only; /* lanes of 4 bits cannot be added, as their sums are longer */
};

#define EK_CONTROL_BYTES (EK_HEADER_BYTES + 8)
#define EK_MAX_LISTED 256 /* fragments in one QUERY or LACKING; a QUERY's first is where the worker's gaps begin */

#endif
