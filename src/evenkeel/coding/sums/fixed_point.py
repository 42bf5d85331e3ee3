"""Sends numbers as whole multiples of a step that all ranks share."""

from typing import Final

import torch
from torch import Tensor

from evenkeel.coding.checks import whole
from evenkeel.coding.sum_code import SumCode, count_per_granule, flat
from evenkeel.coding.sums.integer_lanes import (
    IntegerWire,
    block_count,
    check_scales,
    inverse,
    max_workers,
    pack_bits,
    spread,
    usable,
)
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError

__all__ = ["FixedPoint"]


class FixedPoint(SumCode):
    """Sends integers of `bits` bits: round(x / step), where step = largest |x| of the block over all ranks / top.

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
        self.max_workers = max_workers(2 * self._top)

    def __repr__(self) -> str:
        return f"FixedPoint(bits={self.bits}, block={self.granule})"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives the largest magnitude of each block, `[blocks]`."""
        vector = flat(vector)
        blocks = block_count(vector.numel(), self.granule)
        padded = torch.nn.functional.pad(vector.abs(), (0, blocks * self.granule - vector.numel()))
        return usable(padded.view(blocks, self.granule).amax(dim=1))

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Writes multiples of the step, shifted by top, in `bits` bits each."""
        vector = flat(vector)
        check_scales(stats, vector.numel(), self.granule)
        wire = self.wire(this_round.world)
        # First to -1..1, as top / scale may be too large for float32. What is not finite has the inverse 0.
        share = (vector * spread(inverse(stats), vector.numel(), self.granule)).nan_to_num(0.0).clamp(-1, 1)
        return pack_bits(((share * self._top).round() + self._top).to(wire.lane_type), self.bits)

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives (sum / count - top) * step."""
        check_scales(stats, length, self.granule)
        sums = self.wire(this_round.world).lanes_of(total, length)
        counts = count_per_granule(total.count, stats.numel(), this_round, sums.device)
        centred = sums.long() - self._top * spread(counts, length, self.granule)
        step = stats / self._top / counts.clamp(min=1)
        mean = centred.to(torch.float32) * spread(step, length, self.granule)
        # Infinity times zero must stay what it is, so only finite blocks that nothing arrived of are cleared.
        return mean.masked_fill(spread((counts == 0) & stats.isfinite(), length, self.granule), 0.0)

    def lanes(self, length: int, this_round: Round) -> int:
        """Counts one for each coordinate."""
        return length

    def wire(self, world: int) -> IntegerWire:
        """Gives lanes of `bits` bits, up to 2 * top."""
        return IntegerWire(self.bits, 2 * self._top, self.granule, world)
