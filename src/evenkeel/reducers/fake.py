"""Messages added in one process, with losses as a script says."""

from collections.abc import Callable

import torch
from torch import Tensor

from evenkeel.coding.sum_code import Round, SumCode
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.reducer import Reducer, Total

__all__ = ["FakeReducer", "Losses"]

Losses = Callable[[Round, int], Tensor]


class FakeReducer(Reducer):
    """Every rank gets every packed message and adds those that are not lost: the reducer that others are compared with.

    Args:
        over: the ranks, e.g. one of `thread_collectives(world)`.
        losses: of a sender's place and its number of granules, booleans `[granules]`, true for those that are lost;
            must say the same on all ranks. Default: nothing is.
    """

    def __init__(self, over: Collectives, losses: Losses | None = None) -> None:
        self.ranks = over
        self._losses = losses

    def total(self, code: SumCode, packed: Tensor, lanes: int, this_round: Round) -> Total:
        """The sum of all ranks' messages, but for those that are lost, as lanes."""
        world = self.ranks.world
        messages = [code.unpack(each, lanes, this_round) for each in self.ranks.gather(packed)]
        wide = torch.float32 if messages[0].is_floating_point() else torch.int64
        if self._losses is None:
            return Total(torch.stack(messages).sum(0, dtype=wide), packed=False, count=world)
        granules = -(-lanes // code.granule)
        lost = [self._losses(Round(rank, world, this_round.step, this_round.bucket), granules) for rank in range(world)]
        arrived = ~torch.stack(lost)
        kept = arrived.repeat_interleave(code.granule, 1)[:, :lanes]
        total = torch.where(kept, torch.stack(messages), 0).sum(0, dtype=wide)
        own = lost[self.ranks.rank]
        return Total(total, packed=False, count=arrived.sum(0), lost=own if bool(own.any()) else None)
