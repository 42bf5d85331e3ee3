"""Carries one code's messages as another code's."""

from collections.abc import Sequence

from torch import Tensor

from evenkeel.coding.sum_code import Place, SumCode

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

    def add_packed(self, parts: Sequence[Tensor], lanes: int, place: Place) -> Tensor:
        """The inner code's sums."""
        return self.inner.add_packed(parts, lanes, place)

    def lanes(self, length: int, place: Place) -> int:
        """The inner code's."""
        return self.inner.lanes(length, place)

    def up_width(self, place: Place) -> int:
        """The inner code's."""
        return self.inner.up_width(place)

    def down_width(self, place: Place) -> int:
        """The inner code's."""
        return self.inner.down_width(place)

    def pack(self, message: Tensor, place: Place) -> Tensor:
        """The inner code's bytes."""
        return self.inner.pack(message, place)

    def unpack(self, packed: Tensor, lanes: int, place: Place) -> Tensor:
        """The inner code's lanes."""
        return self.inner.unpack(packed, lanes, place)

    def pack_total(self, total: Tensor, place: Place) -> Tensor:
        """The inner code's bytes."""
        return self.inner.pack_total(total, place)

    def unpack_total(self, packed: Tensor, lanes: int, place: Place) -> Tensor:
        """The inner code's sums."""
        return self.inner.unpack_total(packed, lanes, place)
