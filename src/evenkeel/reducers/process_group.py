"""Adds messages by the all-reduce of a process group."""

import torch.distributed as dist
from torch import Tensor

from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import collectives_over
from evenkeel.reducers.reducer import Reducer

__all__ = ["ProcessGroup"]


class ProcessGroup(Reducer):
    """Adds the lanes in one all-reduce, unpacked, in the smallest type that can hold their sums.

    The plainest reducer, and the one with the most bytes: a sum of 4-bit indices takes a whole byte in both directions.

    Args:
        over: the ranks, or their group (see GroupCollectives); default: all ranks.
        timeout_s: how long a peer may stay silent; for a group, whose own time it is by default.
    """

    def __init__(self, over: Collectives | dist.ProcessGroup | None = None, *, timeout_s: float | None = None) -> None:
        self.ranks = collectives_over(over, timeout_s)

    def total(self, wire: Wire, message: Tensor, lanes: int, this_round: Round) -> Total:
        """Adds all ranks' messages; gives lanes."""
        return Total(self.ranks.add(wire.unpack(message, lanes)), this_round.world)
