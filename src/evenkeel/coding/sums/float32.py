"""No code at all: float32 numbers, added as they are. What every other code is compared with."""

import torch
from torch import Tensor

from evenkeel.coding.sum_code import Count, Round, SumCode, count_per_granule, flat
from evenkeel.errors import CodeError

__all__ = ["Plain"]


class Plain(SumCode):
    """The mean to within float32's rounding, which alone depends on the order. Nothing is measured."""

    name = "plain"
    granule = 1

    def __repr__(self) -> str:
        return "Plain()"

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Nothing: `[0]`. What is not finite travels in the sum itself."""
        return flat(vector)[:0]

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """A copy of the vector as float32, since reducers may add into it."""
        return flat(vector).clone(memory_format=torch.contiguous_format)

    def decode(self, total: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """Total / count."""
        if total.shape != (length,):
            raise CodeError(f"a total of {length} lanes is expected, found {tuple(total.shape)}")
        counts = count_per_granule(count, length, this_round, total.device)
        return torch.where(counts > 0, total / counts.clamp(min=1), 0.0)

    def lanes(self, length: int, this_round: Round) -> int:
        """One for each coordinate."""
        return length

    def up_width(self, this_round: Round) -> int:
        """32 bits."""
        return 32

    def down_width(self, this_round: Round) -> int:
        """32 bits."""
        return 32

    def pack(self, message: Tensor, this_round: Round) -> Tensor:
        """The numbers' own bytes."""
        return message.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    def unpack(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The numbers again."""
        if packed.shape != (4 * lanes,):
            raise CodeError(f"{lanes} numbers of 32 bits take {4 * lanes} bytes, found {tuple(packed.shape)}")
        return packed.clone().view(torch.float32)

    def pack_total(self, total: Tensor, this_round: Round) -> Tensor:
        """The numbers' own bytes."""
        return self.pack(total, this_round)

    def unpack_total(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The numbers again."""
        return self.unpack(packed, lanes, this_round)
