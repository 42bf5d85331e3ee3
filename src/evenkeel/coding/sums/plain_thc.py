"""Rotates, rounds to a table's levels, and adds the table's numbers without decoding them.

Source: Li, Ben Basat, Vargaftik, Lao, Xu, Mitzenmacher, Yu, "THC: Accelerating Distributed Deep Learning Using Tensor
Homomorphic Compression" (NSDI 2024). Departures, each of which lowers the error at equal bits: blocks of 4096 with a
norm for each, instead of one norm for everything; the best clipping and granularity for correlated rounding; exact
tables; noise that is private to each rank; a fresh rotation every step; rounding straight to the levels.

This is the readable form, in plain torch. `thc.THC` gives the same bits faster.
"""

from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.coding.checks import number, whole
from evenkeel.coding.sum_code import SumCode, count_per_granule, flat
from evenkeel.coding.sums import thc_table
from evenkeel.coding.sums.integer_lanes import (
    IntegerWire,
    block_count,
    check_scales,
    inverse,
    max_workers,
    pack_bits,
    spread,
    unpack_bits,
    usable,
)
from evenkeel.coding.sums.rotation import padded_length, rotate, rotate_back, signs_key
from evenkeel.coding.sums.rounding import Rounding, check_rounding, float32, thresholds
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError

__all__ = ["PlainTHC", "TableWire"]

# Granularity and p with the least error of the mean of 8 uncorrelated workers, correlated rounding, by simulation.
# Other granularities than 2**bits - 1 are here only where they pay for the wider sums, or, for 4 bits, for the lowest
# error.
_BEST = {
    1: (1, 2**-1.25),
    2: (3, 1 / 8),
    3: (7, 1 / 32),
    4: (17, 1 / 128),
    5: (31, 1 / 256),
    6: (63, 1 / 1024),
    7: (127, 1 / 4096),
    8: (255, 1 / 16384),
}


class PlainTHC(SumCode):
    """Sends places in a table for rotated blocks, `bits` each, and sums of the table's numbers down.

    Stated error, for what the rotation makes normal (most gradients; one-hot blocks are not): a vector's squared error
    is M^2 (rounding_error + clamp_error) a block (`thc_table`), M the largest norm of that block over the ranks. The
    rounding part averages out over n ranks, to 1/n and better (`rounding`); the clamped part does not. Always: every
    rotated coordinate within -t..t is off by less than one level.

    Blocks that are shorter than `block`, at the end of a vector, are padded to a power of two; the padding is sent.

    Args:
        bits: sent up for each coordinate, 1 to 8.
        granularity: largest number of the table, at least 2**bits - 1. More: finer choice of levels, wider sums. None:
            a good one for `bits`.
        p: share of coordinates that are clipped. More: finer levels, more bias. None: a good one for `bits`.
        rounding: see `rounding.thresholds`.
        block: coordinates rotated together, a power of two from 8. More: closer to normal, fewer norms; slower.
        seed: of all randomness; the same on all ranks.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name = "plain_thc"

    def __init__(
        self,
        bits: int = 4,
        granularity: int | None = None,
        p: float | None = None,
        rounding: Rounding = "correlated",
        block: int = 4096,
        seed: int = 0,
    ) -> None:
        check_rounding(rounding)
        self.bits = whole("bits", bits, 1, 8)
        self.granule = whole("block", block)
        if self.granule < 8 or self.granule & (self.granule - 1):
            raise ConfigurationError(f"block: must be a power of two from 8, found {block}")
        default_granularity, default_p = _BEST[self.bits]
        self.granularity = default_granularity if granularity is None else whole("granularity", granularity)
        self.p = default_p if p is None else number("p", p)
        self.rounding = rounding
        self.seed = whole("seed", seed)
        self.table = thc_table.table(self.bits, self.granularity, self.p)
        self._clip = thc_table.clip(self.p)
        self.max_workers = max_workers(self.granularity)

    def __repr__(self) -> str:
        # The table is computed by each rank for itself, so ranks compare it too.
        return (
            f"{type(self).__name__}(bits={self.bits}, granularity={self.granularity}, p={self.p!r}, "
            f"rounding={self.rounding!r}, block={self.granule}, seed={self.seed}, "
            f"table={crc32(repr(self.table).encode()):08x})"
        )

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives each block's norm, `[blocks]`. The rotation keeps norms, so it can wait until after the exchange."""
        vector = flat(vector)
        blocks = block_count(vector.numel(), self.granule)
        # In float64, whose squares neither overflow nor vanish.
        squares = pad(vector.double().square(), (0, blocks * self.granule - vector.numel()))
        return usable(squares.view(blocks, self.granule).sum(dim=1).sqrt())

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Rotates, scales to N(0, 1), rounds to levels of the table and sends their places in it, `bits` each."""
        vector = flat(vector)
        check_scales(stats, vector.numel(), self.granule)
        self.wire(this_round.world)  # refuses a world that is too large
        lanes = self.lanes(vector.numel(), this_round)
        # |H D (x / M)| = sqrt(size) |x| / M: near N(0, 1) for the largest of the ranks' blocks. What is not finite has
        # the inverse 0.
        shares = (vector * spread(inverse(stats), vector.numel(), self.granule)).nan_to_num(0.0)
        normal = rotate(pad(shares, (0, lanes - vector.numel())), self.granule, signs_key(self.seed, this_round))
        # -t..t becomes 0..granularity; beyond is clipped.
        half = self.granularity / 2
        position = (normal * float32(half / self._clip) + half).clamp(0, self.granularity)
        lookup = _lookup(self.table, vector.device)
        level = lookup.level_below[position.long().clamp(max=self.granularity - 1)]
        above = position - lookup.table[level]
        up = above > thresholds(self.rounding, lanes, self.seed, this_round, vector.device) * lookup.gap[level]
        return pack_bits((level + up).to(torch.uint8), self.bits)

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives D H (2 sums - granularity count), times M t / (granularity size count)."""
        check_scales(stats, length, self.granule)
        lanes = self.lanes(length, this_round)
        sums = self.wire(this_round.world).lanes_of(total, lanes)
        counts = count_per_granule(total.count, stats.numel(), this_round, sums.device)
        # Whole numbers all through the rotation: exact in float32, in any order, while block * granularity * count <
        # 2**24.
        centred = 2 * sums.long() - self.granularity * spread(counts, lanes, self.granule)
        secret = signs_key(self.seed, this_round)
        rotated = rotate_back(centred.to(torch.float32), self.granule, secret)[:length]
        step, cleared = self._steps(stats, counts, lanes)
        mean = rotated * spread(step, length, self.granule)
        return mean.masked_fill(spread(cleared, length, self.granule), 0.0)

    def lanes(self, length: int, this_round: Round) -> int:
        """Counts one for each coordinate, and the padding of the last block."""
        return padded_length(length, self.granule)

    def wire(self, world: int) -> IntegerWire:
        """Gives a wire with places in the table up and sums of the table's numbers down."""
        return TableWire(self.table, self.granule, world)

    def _steps(self, stats: Tensor, counts: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
        """Gives what a block's rotated sum is multiplied by, and whether it is cleared instead, both `[blocks]`."""
        size = torch.full_like(stats, self.granule)
        size[-1:] = lanes - (stats.numel() - 1) * self.granule
        step = stats * float32(self._clip / self.granularity) / size / counts.clamp(min=1)
        # Infinity times zero must stay what it is, so only finite blocks that nothing arrived of are cleared.
        return step, (counts == 0) & stats.isfinite()


class TableWire(IntegerWire):
    """Carries places in a table, whose numbers are what is added: whoever adds looks them up, and decodes nothing.

    Args:
        table: 2**bits rising numbers from 0 on.
        granule: see `Wire`.
        world: how many messages a sum holds at most.
    """

    def __init__(self, table: tuple[int, ...], granule: int, world: int) -> None:
        super().__init__(len(table).bit_length() - 1, table[-1], granule, world)
        self.table: tuple[int, ...] = table

    def unpack(self, message: Tensor, lanes: int) -> Tensor:
        """Looks the numbers up."""
        places = unpack_bits(message, self.up_width, lanes)
        return _lookup(self.table, message.device).table[places.long()].to(self.lane_type)


class _Lookup(NamedTuple):
    """Holds the table as tensors of one device.

    Attributes:
        table: number of each level, `[levels]`.
        gap: from each level to the next one's number, `[levels - 1]`.
        level_below: the highest level whose number is not above k, for k = 0..granularity - 1.
    """

    table: Tensor
    gap: Tensor
    level_below: Tensor


@lru_cache(maxsize=64)
def _lookup(table: tuple[int, ...], device: torch.device) -> _Lookup:
    numbers = torch.tensor(table, device=device, dtype=torch.int32)
    gap = numbers.diff()
    return _Lookup(numbers, gap, torch.arange(len(table) - 1, device=device).repeat_interleave(gap))
