"""Defines the exchanges that reducers are built from, over a group of ranks.

All ranks call them in the same order, with tensors of the same shape and type, and get the same bits back. They block.
Each counts the bytes that its rank puts on the wire. A peer that goes away or stays silent surfaces as ReducerError
within the timeout; from then on every call raises it, since nobody knows any more what the peers have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Collectives", "broadcast_sends", "ring_bytes", "swap_bytes"]


class Collectives(ABC):
    """Exchanges tensors between the ranks of one group.

    Attributes:
        sent_bytes: what this rank has sent so far, as the algorithm sends it (a ring for `largest` and `add`, direct
            messages for `swap`, either for `gather`, a binomial tree for `broadcast`), without headers.
        exchanged_s: time that exchanges have taken so far, waiting for slower ranks included.
    """

    sent_bytes: int
    exchanged_s: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """Gives the number of this rank in the group, 0 up."""

    @property
    @abstractmethod
    def world(self) -> int:
        """Counts the ranks of the group."""

    @abstractmethod
    def largest(self, values: Tensor) -> Tensor:
        """Gives the largest of all ranks' `values`, elementwise. NaN may or may not win: send something that orders."""

    @abstractmethod
    def add(self, values: Tensor) -> Tensor:
        """Adds all ranks' `values`, elementwise, in their own type."""

    @abstractmethod
    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Gives what every rank has for this one.

        Args:
            parts: one row for each rank, all of one type; part r goes to rank r. Some may be empty.
            sizes: length of the row that each rank has for this one.
        """

    @abstractmethod
    def broadcast(self, values: Tensor) -> None:
        """Overwrites `values` with those of rank 0."""

    def gather(self, row: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Gives all ranks' rows.

        Args:
            row: this rank's.
            sizes: length of each rank's row; default: as long as this one.
        """
        return self.swap([row] * self.world, sizes or [row.numel()] * self.world)

    @abstractmethod
    def close(self) -> None:
        """Lets go of the connections. Peers that still wait get an error."""


def ring_bytes(values: Tensor, world: int) -> int:
    """Counts what a rank sends when a ring of `world` ranks reduces `values` on all of them."""
    size: int = values.numel() * values.element_size()
    return 2 * (world - 1) * size // world


def swap_bytes(parts: Sequence[Tensor], rank: int) -> int:
    """Counts what `rank` sends in a swap: all parts but its own."""
    return sum(part.numel() * part.element_size() for to, part in enumerate(parts) if to != rank)


def broadcast_sends(rank: int, world: int) -> int:
    """Counts the ranks to which `rank` passes on what rank 0 broadcasts along a binomial tree."""
    return sum(rank < 1 << bit and rank + (1 << bit) < world for bit in range(world.bit_length()))
