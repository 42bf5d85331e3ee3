"""Sends float32 numbers as they are: no code at all, with which every other code is compared."""

import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode, count_per_granule, flat
from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.errors import CodeError

__all__ = ["FloatWire", "Plain"]


class Plain(SumCode):
    """Gives the mean to within float32's rounding, which alone depends on the order. Measures nothing."""

    name = "plain"
    granule = 1

    def __repr__(self) -> str:
        return "Plain()"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives nothing, `[0]`. What is not finite travels in the sum itself."""
        return flat(vector)[:0]

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Copies the vector's float32 numbers."""
        return flat(vector).clone(memory_format=torch.contiguous_format).view(torch.uint8)

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives sum / count."""
        sums = self.wire(this_round.world).lanes_of(total, length)
        counts = count_per_granule(total.count, length, this_round, sums.device)
        return torch.where(counts > 0, sums / counts.clamp(min=1), 0.0)

    def lanes(self, length: int, this_round: Round) -> int:
        """Counts one for each coordinate."""
        return length

    def wire(self, world: int) -> "FloatWire":
        """Gives the numbers' own bytes, whatever the world."""
        return FloatWire()


class FloatWire(Wire):
    """Writes float32 lanes and sums as their own bytes."""

    granule = 1
    up_width = down_width = 32

    def unpack(self, message: Tensor, lanes: int) -> Tensor:
        """Gives the numbers again."""
        if message.shape != (4 * lanes,):
            raise CodeError(f"{lanes} numbers of 32 bits take {4 * lanes} bytes, found {tuple(message.shape)}")
        return message.clone().view(torch.float32)

    def pack_total(self, total: Tensor) -> Tensor:
        """Gives the numbers' own bytes."""
        return total.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    def unpack_total(self, packed: Tensor, lanes: int) -> Tensor:
        """Gives the numbers again."""
        return self.unpack(packed, lanes)
