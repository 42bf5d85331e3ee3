"""Rotate, round to a table's levels, and add the table's numbers without decoding them.

Source: Li, Ben Basat, Vargaftik, Lao, Xu, Mitzenmacher, Yu, "THC: Accelerating Distributed Deep Learning Using Tensor
Homomorphic Compression" (NSDI 2024). Departures, each of which lowers the error at equal bits: blocks of 4096 with a
norm for each, instead of one norm for everything; the best clipping and granularity for correlated rounding; exact
tables; noise that is private to each rank; a fresh rotation every step; rounding straight to the levels.
"""

from collections.abc import Sequence
from typing import Final
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.coding.checks import number, whole
from evenkeel.coding.sum_code import Count, Round, SumCode, count_per_granule, flat
from evenkeel.coding.sums import thc_table
from evenkeel.coding.sums.block_scales import block_count, check_scales, inverse, spread, usable
from evenkeel.coding.sums.counter_hash import Stream, key
from evenkeel.coding.sums.kernels import MOST_WORKERS, Kernels, fast
from evenkeel.coding.sums.kernels.coder import Coder, coder_of
from evenkeel.coding.sums.packing import Lanes, pack_bits, unpack_bits
from evenkeel.coding.sums.rotation import padded_length, rotate, rotate_back
from evenkeel.coding.sums.rounding import Rounding, check_rounding, float32, thresholds
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["THC"]

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


class THC(SumCode):
    """Table numbers of rotated blocks: `bits` up, and sums of numbers up to `granularity` down.

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

    name: Final = "thc"

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
        self._lanes = Lanes(self.granularity)
        self.most_workers = self._lanes.most_workers
        self._of_device: dict[torch.device, _Lookup] = {}

    def __repr__(self) -> str:
        # The table is computed by each rank for itself, so ranks compare it too.
        return (
            f"THC(bits={self.bits}, granularity={self.granularity}, p={self.p!r}, rounding={self.rounding!r}, "
            f"block={self.granule}, seed={self.seed}, table={crc32(repr(self.table).encode()):08x})"
        )

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Norm of each block, `[blocks]`. The rotation keeps norms, so it can wait until after the exchange."""
        vector = flat(vector)
        if kernels := fast(vector):
            return usable(kernels.squares(vector, None, self.granule).sqrt())
        blocks = block_count(vector.numel(), self.granule)
        # In float64, whose squares neither overflow nor vanish.
        squares = pad(vector.double().square(), (0, blocks * self.granule - vector.numel()))
        return usable(squares.view(blocks, self.granule).sum(dim=1).sqrt())

    def measure_owed(self, vector: Tensor, memory: Tensor, this_round: Round) -> Tensor:
        """The same of vector + memory, without their sum between."""
        vector = flat(vector)
        kernels = fast(vector, memory)
        if kernels is None or memory.shape != vector.shape:
            return super().measure_owed(vector, memory, this_round)
        return usable(kernels.squares(vector, memory, self.granule).sqrt())

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Table numbers, `[lanes(length)]`."""
        vector = flat(vector)
        check_scales(stats, vector.numel(), self.granule)
        lane_type = self._lanes.dtype(this_round.world)
        lanes = self.lanes(vector.numel(), this_round)
        if kernels := self._kernels(this_round, vector, stats):
            return kernels.encode(vector, inverse(stats), lanes, lane_type, self._coder(this_round))
        lookup = self._lookup(vector.device)
        # |H D (x / M)| = sqrt(size) |x| / M: near N(0, 1) for the largest of the ranks' blocks. What is not finite has
        # the inverse 0.
        shares = (vector * spread(inverse(stats), vector.numel(), self.granule)).nan_to_num(0.0)
        normal = rotate(pad(shares, (0, lanes - vector.numel())), self.granule, self._secret(this_round))
        half = self.granularity / 2
        position = (normal * float32(half / self._clip) + half).clamp(0, self.granularity)
        level = lookup.level_below[position.long().clamp(max=self.granularity - 1)]
        low, gap = lookup.table[level], lookup.gap[level]
        threshold = thresholds(self.rounding, lanes, self.seed, this_round, vector.device)
        return torch.where(position - low > threshold * gap, low + gap, low).to(lane_type)

    def encode_packed(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Levels, `bits` each, without the message between."""
        vector = flat(vector)
        kernels = self._kernels(this_round, vector, stats)
        if kernels is None:
            return super().encode_packed(vector, stats, this_round)
        check_scales(stats, vector.numel(), self.granule)
        return kernels.encode_packed(
            vector, inverse(stats), self.lanes(vector.numel(), this_round), self._coder(this_round)
        )

    def encode_owed(self, vector: Tensor, memory: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """The same of vector + memory, and what is left in memory, all in one pass."""
        vector = flat(vector)
        kernels = self._kernels(this_round, vector, memory, stats)
        if kernels is None or memory.shape != vector.shape:
            return super().encode_owed(vector, memory, stats, this_round)
        check_scales(stats, vector.numel(), self.granule)
        lanes = self.lanes(vector.numel(), this_round)
        step, _ = self._steps(stats, count_per_granule(1, stats.numel(), this_round, stats.device), lanes)
        return kernels.encode_owed(vector, memory, inverse(stats), step, lanes, self._coder(this_round))

    def decode(self, total: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """D H (2 total - granularity count), times M t / (granularity size count)."""
        check_scales(stats, length, self.granule)
        lanes = self.lanes(length, this_round)
        if total.shape != (lanes,):
            raise CodeError(f"a total of {lanes} lanes is expected, found {tuple(total.shape)}")
        counts = count_per_granule(count, stats.numel(), this_round, total.device)
        step, cleared = self._steps(stats, counts, lanes)
        if (kernels := self._kernels(this_round, stats)) and fast(total, types=(torch.uint8, torch.int32)):
            middle = self.granularity * counts
            return kernels.decode(total, middle, step, cleared, length, self.granule, self._secret(this_round))
        # Whole numbers all through the rotation: exact in float32, in any order, while block * granularity * count <
        # 2**24.
        centred = 2 * total.long() - self.granularity * spread(counts, lanes, self.granule)
        rotated = rotate_back(centred.to(torch.float32), self.granule, self._secret(this_round))[:length]
        mean = rotated * spread(step, length, self.granule)
        return mean.masked_fill(spread(cleared, length, self.granule), 0.0)

    def decode_packed(self, packed: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """The same, without the lanes between."""
        kernels = self._kernels(this_round, stats)
        lanes = self.lanes(length, this_round)
        fits = packed.shape == (self.total_bytes(lanes, this_round),) and stats.shape == (
            block_count(length, self.granule),
        )
        if kernels is None or not fits or not fast(packed, types=(torch.uint8,)):
            return super().decode_packed(packed, stats, count, length, this_round)
        counts = count_per_granule(count, stats.numel(), this_round, packed.device)
        step, cleared = self._steps(stats, counts, lanes)
        middle, width = self.granularity * counts, self.down_width(this_round)
        return kernels.decode_packed(
            packed, width, middle, step, cleared, length, self.granule, self._secret(this_round)
        )

    def lanes(self, length: int, this_round: Round) -> int:
        """One for each coordinate, and the padding of the last block."""
        return padded_length(length, self.granule)

    def up_width(self, this_round: Round) -> int:
        """`bits`."""
        return self.bits

    def down_width(self, this_round: Round) -> int:
        """Bits of world * granularity."""
        return self._lanes.width(this_round.world)

    def pack(self, message: Tensor, this_round: Round) -> Tensor:
        """Levels, `bits` each."""
        if kernels := fast(message, types=(torch.uint8, torch.int32)):
            return kernels.pack_levels(message, self.table)
        return pack_bits(self._lookup(message.device).level_of[message.long()], self.bits)

    def unpack(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The levels' table numbers."""
        if (kernels := fast(packed, types=(torch.uint8,))) and packed.shape == (self.packed_bytes(lanes, this_round),):
            return kernels.add_packed([packed], lanes, self._lanes.dtype(this_round.world), self.table)
        levels = unpack_bits(packed, self.bits, lanes)
        return self._lookup(packed.device).table[levels.long()].to(self._lanes.dtype(this_round.world))

    def add_packed(self, parts: Sequence[Tensor], lanes: int, this_round: Round) -> Tensor:
        """Sums of table numbers, without the messages between."""
        kernels = fast(*parts, types=(torch.uint8,))
        if kernels is None or any(part.shape != (self.packed_bytes(lanes, this_round),) for part in parts):
            return super().add_packed(parts, lanes, this_round)
        return kernels.add_packed(parts, lanes, self._lanes.dtype(this_round.world), self.table)

    def pack_total(self, total: Tensor, this_round: Round) -> Tensor:
        """Sums of `down_width` bits."""
        return self._lanes.pack(total, this_round.world)

    def unpack_total(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The sums again."""
        return self._lanes.unpack(packed, lanes, this_round.world)

    def _steps(self, stats: Tensor, counts: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
        """What a block's rotated sum is multiplied by, and whether it is cleared instead, both `[blocks]`."""
        size = torch.full_like(stats, self.granule)
        size[-1:] = lanes - (stats.numel() - 1) * self.granule
        step = stats * float32(self._clip / self.granularity) / size / counts.clamp(min=1)
        # Infinity times zero must stay what it is, so only finite blocks that nothing arrived of are cleared.
        return step, (counts == 0) & stats.isfinite()

    def _kernels(self, this_round: Round, *tensors: Tensor) -> Kernels | None:
        kernels = fast(*tensors)
        fits = kernels is not None and self.granule <= kernels.LARGEST_BLOCK and this_round.world <= MOST_WORKERS
        return kernels if fits else None

    def _coder(self, this_round: Round) -> Coder:
        return coder_of(self.table, self._clip, self.rounding, self.granule, self.seed, this_round)

    def _secret(self, this_round: Round) -> int:
        return key(self.seed, this_round.step, this_round.bucket, Stream.SIGNS)

    def _lookup(self, device: torch.device) -> "_Lookup":
        if device not in self._of_device:
            self._of_device[device] = _Lookup(self.table, device)
        return self._of_device[device]


class _Lookup:
    """The table as tensors of one device.

    Attributes:
        table: number of each level, `[levels]`.
        gap: from each level to the next one's number, `[levels - 1]`.
        level_below: the highest level whose number is not above k, for k = 0..granularity - 1.
        level_of: the level of a number; of numbers that are none, the one below.
    """

    def __init__(self, table: tuple[int, ...], device: torch.device) -> None:
        self.table = torch.tensor(table, device=device, dtype=torch.int32)
        self.gap = self.table.diff()
        self.level_of = torch.arange(len(table), device=device).repeat_interleave(
            torch.cat((self.gap, self.gap.new_ones(1)))
        )
        self.level_below = self.level_of[:-1]
