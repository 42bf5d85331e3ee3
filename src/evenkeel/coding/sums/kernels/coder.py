"""Holds all that a kernel has to know to encode for a THC code in one round, as plain numbers."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from evenkeel.coding.sums.counter_hash import Stream, key
from evenkeel.coding.sums.rotation import signs_key
from evenkeel.coding.sums.rounding import Rounding, float32, rank_order
from evenkeel.coding.wire import Round

__all__ = ["Coder", "coder_of"]


class Coder(NamedTuple):
    """Holds the code's settings and the round's keys.

    Attributes:
        block: coordinates rotated together.
        bits: of a level.
        granularity: largest number of the table.
        factor: granularity / 2 / clip, in float32: rotated * factor + half is a position on 0..granularity.
        half: granularity / 2.
        steps: for the position's whole part k = 0..granularity - 1: the number at or below it, the gap to the next
            number << 11, the level << 22.
        rounding: 0 nearest, 1 stochastic, 2 correlated.
        signs: key of the rotation.
        strata: key of the words that all ranks share.
        private: key of the rank's own words.
        world: how many workers there are.
        order: where this rank stands in the round's order of ranks.
        share: 1 / world, in float32.
    """

    block: int
    bits: int
    granularity: int
    factor: float
    half: float
    steps: tuple[int, ...]
    rounding: int
    signs: int
    strata: int
    private: int
    world: int
    order: int
    share: float


def coder_of(
    table: tuple[int, ...], clip: float, rounding: Rounding, block: int, seed: int, this_round: Round
) -> Coder:
    """Gives what to encode with, from a THC code's settings and whose turn it is."""
    granularity = table[-1]
    half = granularity / 2
    return Coder(
        block=block,
        bits=len(table).bit_length() - 1,
        granularity=granularity,
        factor=float32(half / clip),
        half=half,
        steps=_steps(table),
        rounding=("nearest", "stochastic", "correlated").index(rounding),
        signs=signs_key(seed, this_round),
        strata=key(seed, this_round.step, this_round.bucket, Stream.STRATA),
        private=key(seed, this_round.step, this_round.bucket, Stream.PRIVATE, this_round.rank),
        world=this_round.world,
        order=rank_order(seed, this_round) if rounding == "correlated" else 0,
        share=float32(1 / this_round.world),
    )


@lru_cache(maxsize=64)
def _steps(table: tuple[int, ...]) -> tuple[int, ...]:
    steps = []
    for level, (low, above) in enumerate(pairwise(table)):
        steps += [low | (above - low) << 11 | level << 22] * (above - low)
    return tuple(steps)
