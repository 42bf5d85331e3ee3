/* The rule as a library for Python. */
#include "rule.h"

int ek_check_packet(const void *packet, uint32_t length)
{
	return ek_parse(packet, length);
}

/* Steps once; `out` has room for a header and rule.words words. Gives to | filled << 8 | counted << 16. */
uint32_t ek_switch_step(struct ek_table *table, const void *packet, uint32_t length, uint32_t sender,
				  uint64_t now, void *out)
{
	struct ek_header *header = out;
	struct ek_sent sent = ek_step(table, packet, length, sender, now, header, (uint64_t *)(header + 1));

	return sent.to | (uint32_t)sent.filled << 8 | (uint32_t)sent.counted << 16;
}

/* Sizes of the structures that Python mirrors. */
uint32_t ek_sizes(uint32_t which)
{
	const uint32_t sizes[] = {sizeof(struct ek_job), sizeof(struct ek_slot), sizeof(struct ek_rule),
				  sizeof(struct ek_table), EK_COUNTERS};

	return sizes[which];
}
