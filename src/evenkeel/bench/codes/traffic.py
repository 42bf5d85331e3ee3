"""Counts the bits that each rank sends to learn the mean, by the way the messages take.

What a rank receives is as much, on average over the ranks. With one worker there is nobody to send to; then the size of
the one message stands for it, one way.
"""

from dataclasses import dataclass

__all__ = ["TOPOLOGIES", "Traffic", "gathered", "ring", "sharded"]

_NUMBER = 32  # bits

# What each topology is, with n workers: for the notes below a table.
TOPOLOGIES = {
    "one message": "n = 1 has nobody to send to: the size of a message, one way",
    "ring": "ring all-reduce: 2 (n-1)/n of the vector",
    "sharded": "all-to-all of messages, all-gather of their sums: (n-1)/n of each; scales max-reduced over a ring",
    "requantised": "as sharded, but messages cannot be added: owners decode, add, and encode the mean again",
    "fp32 down": "as requantised, but the means go out as float32: from some n on cheaper than the all-gather",
    "all-gather": "messages cannot be added, so all of them go to all: n-1 times a message, and more with every worker",
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Says which way the messages take, and counts the bits that a rank sends: the mean over ranks."""

    topology: str
    bits: float


def ring(workers: int, bits: float) -> Traffic:
    """Counts vectors of so many bits, added on a ring."""
    return _unless_alone(workers, bits, "ring", 2 * (workers - 1) / workers * bits)


def sharded(workers: int, up_bits: float, down_bits: float, scales: int = 0, *, topology: str = "sharded") -> Traffic:
    """Counts messages of `up_bits` to the owners of their shares, and `down_bits` for the whole mean back.

    Args:
        workers: how many ranks.
        up_bits: of a message without its shared scales.
        down_bits: of all shares of the sum together.
        scales: float32 numbers that are agreed on before, over a ring.
        topology: what to call it.
    """
    share = (workers - 1) / workers
    sent = share * (up_bits + down_bits) + 2 * share * scales * _NUMBER
    return _unless_alone(workers, up_bits + scales * _NUMBER, topology, sent)


def gathered(workers: int, bits: float, length: int) -> Traffic:
    """Counts messages of so many bits that are not added: to all, or to owners that send float32 means if cheaper."""
    to_all = (workers - 1) * bits
    to_owners = sharded(workers, bits, length * _NUMBER, topology="fp32 down")
    if workers > 1 and to_owners.bits < to_all:
        return to_owners
    return _unless_alone(workers, bits, "all-gather", to_all)


def _unless_alone(workers: int, message_bits: float, topology: str, sent_bits: float) -> Traffic:
    return Traffic("one message", message_bits) if workers == 1 else Traffic(topology, sent_bits)
