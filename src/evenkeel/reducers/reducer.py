"""Defines what every reducer does: it adds."""

from abc import ABC, abstractmethod

from torch import Tensor

from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.reducers.ranks.collectives import Collectives

__all__ = ["Reducer"]


class Reducer(ABC):
    """Adds the ranks' messages, of which it knows nothing but their `Wire`.

    Laws, tested over every reducer:

    - all ranks get the same total and count, bit for bit, and the total is the exact sum of the messages counted;
    - a granule is left out as a whole, and `Total.lost` says so to the rank whose it was;
    - `ranks.sent_bytes` grows by what this rank has sent;
    - a peer that goes away or stays silent is a ReducerError within the timeout, on every rank, and so is every call
      after that.

    All ranks call it in the same order, each from one thread.

    Attributes:
        ranks: the group of ranks, for statistics and for what is not coded.
        waits: whether a round waits for all ranks. If not, nothing else may wait for them either.
        fell_back: rounds that had to be added in another way, since what adds was away.
    """

    ranks: Collectives
    waits: bool = True
    fell_back: int = 0

    @abstractmethod
    def total(self, wire: Wire, message: Tensor, lanes: int, this_round: Round) -> Total:
        """Adds all ranks' messages.

        Args:
            wire: how messages and their sums are written.
            message: this rank's; only read.
            lanes: how many it has, the same on every rank.
            this_round: this rank's.

        Raises:
            ReducerError: a peer is gone or silent.
        """

    def close(self) -> None:
        """Lets go of the connections."""
        self.ranks.close()
