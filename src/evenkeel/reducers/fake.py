"""Adds messages in one process, with losses as a script says."""

from collections.abc import Callable

import torch
from torch import Tensor

from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.reducer import Reducer

__all__ = ["FakeReducer", "Losses"]

Losses = Callable[[Round, int], Tensor]


class FakeReducer(Reducer):
    """Gives every rank every message, and adds those that are not lost: the reducer that others are compared with.

    Args:
        over: the ranks, e.g. one of `thread_collectives(world)`.
        losses: of a sender's place and its number of granules, booleans `[granules]`, true for those that are lost;
            must say the same on all ranks. Default: nothing is.
    """

    def __init__(self, over: Collectives, losses: Losses | None = None) -> None:
        self.ranks = over
        self._losses = losses

    def total(self, wire: Wire, message: Tensor, lanes: int, this_round: Round) -> Total:
        """Adds all ranks' messages, but for those that are lost; gives lanes."""
        world = self.ranks.world
        messages = [wire.unpack(each, lanes) for each in self.ranks.gather(message)]
        wide = torch.float32 if messages[0].is_floating_point() else torch.int64
        if self._losses is None:
            return Total(torch.stack(messages).sum(0, dtype=wide), world)
        granules = -(-lanes // wire.granule)
        lost = [self._losses(Round(rank, world, this_round.step, this_round.bucket), granules) for rank in range(world)]
        arrived = ~torch.stack(lost)
        kept = arrived.repeat_interleave(wire.granule, 1)[:, :lanes]
        total = torch.where(kept, torch.stack(messages), 0).sum(0, dtype=wide)
        own = lost[self.ranks.rank]
        return Total(total, arrived.sum(0), lost=own if bool(own.any()) else None)
