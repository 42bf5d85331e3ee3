"""Carries one code's messages as another code's."""

from collections.abc import Sequence

from torch import Tensor

from evenkeel.coding.sum_code import Round, SumCode

__all__ = ["Carried"]


class Carried(SumCode):
    """A code that changes what is coded, and leaves the wire to another one.

    Args:
        inner: whose messages, sums and bytes these are.

    Attributes:
        inner: as given.
    """

    def __init__(self, inner: SumCode) -> None:
        self.inner = inner
        self.granule = inner.granule
        self.most_workers = inner.most_workers

    def add_packed(self, parts: Sequence[Tensor], lanes: int, this_round: Round) -> Tensor:
        """The inner code's sums."""
        return self.inner.add_packed(parts, lanes, this_round)

    def lanes(self, length: int, this_round: Round) -> int:
        """The inner code's."""
        return self.inner.lanes(length, this_round)

    def up_width(self, this_round: Round) -> int:
        """The inner code's."""
        return self.inner.up_width(this_round)

    def down_width(self, this_round: Round) -> int:
        """The inner code's."""
        return self.inner.down_width(this_round)

    def pack(self, message: Tensor, this_round: Round) -> Tensor:
        """The inner code's bytes."""
        return self.inner.pack(message, this_round)

    def unpack(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The inner code's lanes."""
        return self.inner.unpack(packed, lanes, this_round)

    def pack_total(self, total: Tensor, this_round: Round) -> Tensor:
        """The inner code's bytes."""
        return self.inner.pack_total(total, this_round)

    def unpack_total(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The inner code's sums."""
        return self.inner.unpack_total(packed, lanes, this_round)
