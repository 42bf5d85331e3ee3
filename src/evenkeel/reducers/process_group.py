"""Messages added by the all-reduce of a process group."""

import torch
import torch.distributed as dist
from torch import Tensor

from evenkeel.coding.sum_code import Round, SumCode
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import collectives_over
from evenkeel.reducers.reducer import Reducer, Total

__all__ = ["ProcessGroup"]


class ProcessGroup(Reducer):
    """One all-reduce of the lanes, unpacked again, in the smallest type that can hold their sums.

    The plainest reducer, and the one with the most bytes: a sum of 4-bit indices takes a whole byte in both directions.

    Args:
        over: the ranks, or their group (see GroupCollectives); default: all ranks.
        timeout_s: how long a peer may stay silent; for a group.
    """

    def __init__(self, over: Collectives | dist.ProcessGroup | None = None, *, timeout_s: float = 300.0) -> None:
        self.ranks = collectives_over(over, timeout_s)

    def total(self, code: SumCode, packed: Tensor, lanes: int, this_round: Round) -> Total:
        """The sum of all ranks' messages, as lanes."""
        message = code.unpack(packed, lanes, this_round)
        if not message.is_floating_point():
            message = message.to(_type_for(code, this_round))
        return Total(self.ranks.add(message), packed=False, count=this_round.world)


def _type_for(code: SumCode, this_round: Round) -> torch.dtype:
    # Gloo adds no 16-bit integers. One bit of the signed types is the sign.
    width = code.down_width(this_round)
    for bits, dtype in ((8, torch.uint8), (31, torch.int32), (63, torch.int64)):
        if width <= bits:
            return dtype
    raise ConfigurationError(
        f"{code!r} has sums of {width} bits for {this_round.world} ranks, more than the 63 that fit"
    )
