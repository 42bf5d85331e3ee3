"""The seam of every reducer: something that adds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from evenkeel.coding.sum_code import Count, Round, SumCode
from evenkeel.reducers.ranks.collectives import Collectives

__all__ = ["Reducer", "Total"]


@dataclass(frozen=True, slots=True)
class Total:
    """A sum of messages.

    Attributes:
        sums: one for each lane, or those as bytes, as the code packs them; the same bits on all ranks.
        packed: true where they are bytes.
        count: how many messages they hold, or how many each granule holds.
        lost: granules of this rank's own message that were left out, booleans `[granules]`; None where all were added.
    """

    sums: Tensor
    packed: bool
    count: Count
    lost: Tensor | None = None

    def mean(self, code: SumCode, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """What `code` decodes of the sums: the mean of the vectors that were added, float32 `[length]`."""
        decode = code.decode_packed if self.packed else code.decode
        return decode(self.sums, stats, self.count, length, this_round)


class Reducer(ABC):
    """Adds the ranks' messages.

    Laws, tested over every reducer:

    - all ranks get the same total and count, bit for bit, and the total is the exact sum of the messages counted;
    - a granule is left out as a whole, and the rank whose it was is told;
    - `ranks.sent_bytes` grows by what this rank has sent;
    - a peer that goes away or stays silent is a ReducerError within the timeout, on every rank, and so is every call
      after that.

    All ranks call it in the same order, each from one thread.

    Attributes:
        ranks: the group of ranks, for statistics and for what is not coded.
    """

    ranks: Collectives

    @abstractmethod
    def total(self, code: SumCode, packed: Tensor, lanes: int, this_round: Round) -> Total:
        """The sum of all ranks' messages.

        Args:
            code: whose wire forms and sums to use.
            packed: this rank's message, as the code packs it; only read.
            lanes: how many it has, the same on every rank.
            this_round: this rank's.

        Raises:
            ReducerError: a peer is gone or silent.
            ConfigurationError: the sums do not fit any type that can be added.
        """

    def close(self) -> None:
        """Let go of the connections."""
        self.ranks.close()
