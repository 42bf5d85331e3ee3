"""Numbers as whole multiples of a step that all ranks share."""

from typing import Final

import torch
from torch import Tensor

from evenkeel.coding.checks import whole
from evenkeel.coding.sum_code import Count, Round, SumCode, count_per_granule, flat
from evenkeel.coding.sums.block_scales import block_count, check_scales, inverse, spread, usable
from evenkeel.coding.sums.packing import Lanes, pack_bits, unpack_bits
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["FixedPoint"]


class FixedPoint(SumCode):
    """Integers of `bits` bits: x becomes round(x / step), with step = largest |x| of the block over all ranks / top.

    Stated error: every coordinate of the mean is within half a step of the true mean (and float32's rounding), where
    top = 2**(bits - 1) - 1. Lanes are shifted by top, so that they are never negative. What ATP and SwitchML send.

    Args:
        bits: of one lane, 2 to 16. More: finer steps, more bytes.
        block: coordinates that share one step, a multiple of 8. Fewer: finer steps where sizes differ, more statistics.

    Raises:
        ConfigurationError: bits or block out of range.
    """

    name: Final = "fixed_point"

    def __init__(self, bits: int = 8, block: int = 4096) -> None:
        self.bits = whole("bits", bits, 2, 16)
        self.granule = whole("block", block)
        if self.granule < 8 or self.granule % 8:
            raise ConfigurationError(f"block: must be a multiple of 8, found {block}")
        self._top = (1 << (self.bits - 1)) - 1
        self._lanes = Lanes(2 * self._top)
        self.most_workers = self._lanes.most_workers

    def __repr__(self) -> str:
        return f"FixedPoint(bits={self.bits}, block={self.granule})"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Largest magnitude of each block, `[blocks]`."""
        vector = flat(vector)
        blocks = block_count(vector.numel(), self.granule)
        padded = torch.nn.functional.pad(vector.abs(), (0, blocks * self.granule - vector.numel()))
        return usable(padded.view(blocks, self.granule).amax(dim=1))

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Multiples of the step, shifted by top, `[length]`."""
        vector = flat(vector)
        check_scales(stats, vector.numel(), self.granule)
        lane_type = self._lanes.dtype(this_round.world)
        # First to -1..1, as top / scale may be too large for float32. What is not finite has the inverse 0.
        share = (vector * spread(inverse(stats), vector.numel(), self.granule)).nan_to_num(0.0).clamp(-1, 1)
        return ((share * self._top).round() + self._top).to(lane_type)

    def decode(self, total: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """(total / count - top) * step."""
        check_scales(stats, length, self.granule)
        if total.shape != (length,):
            raise CodeError(f"a total of {length} lanes is expected, found {tuple(total.shape)}")
        counts = count_per_granule(count, stats.numel(), this_round, total.device)
        centred = total.long() - self._top * spread(counts, length, self.granule)
        step = stats / self._top / counts.clamp(min=1)
        mean = centred.to(torch.float32) * spread(step, length, self.granule)
        # Infinity times zero must stay what it is, so only finite blocks that nothing arrived of are cleared.
        return mean.masked_fill(spread((counts == 0) & stats.isfinite(), length, self.granule), 0.0)

    def lanes(self, length: int, this_round: Round) -> int:
        """One for each coordinate."""
        return length

    def up_width(self, this_round: Round) -> int:
        """`bits`."""
        return self.bits

    def down_width(self, this_round: Round) -> int:
        """Bits of world * 2 * top."""
        return self._lanes.width(this_round.world)

    def pack(self, message: Tensor, this_round: Round) -> Tensor:
        """Lanes of `bits` bits."""
        return pack_bits(message, self.bits)

    def unpack(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The lanes again."""
        return unpack_bits(packed, self.bits, lanes).to(self._lanes.dtype(this_round.world))

    def pack_total(self, total: Tensor, this_round: Round) -> Tensor:
        """Sums of `down_width` bits."""
        return self._lanes.pack(total, this_round.world)

    def unpack_total(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The sums again."""
        return self._lanes.unpack(packed, lanes, this_round.world)
