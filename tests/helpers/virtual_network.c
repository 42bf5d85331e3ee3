/* The sockets and the clock of `native/wire.h` where a test provides both. */
#include <stdint.h>

typedef int (*taker)(int fd, uint32_t *address, uint16_t *port, uint8_t *bytes, int room);
typedef void (*giver)(int fd, uint32_t address, uint16_t port, const uint8_t *bytes, int size);

static uint64_t clock_ns;
static taker take;
static giver give;

void virtual_network(taker to_take, giver to_give)
{
	take = to_take;
	give = to_give;
}

void virtual_clock(uint64_t now) { clock_ns = now; }

uint64_t virtual_now(void) { return clock_ns; }

int virtual_take(int fd, uint32_t *address, uint16_t *port, uint8_t *bytes, int room)
{
	return take(fd, address, port, bytes, room);
}

void virtual_give(int fd, uint32_t address, uint16_t port, const uint8_t *bytes, int size)
{
	give(fd, address, port, bytes, size);
}
