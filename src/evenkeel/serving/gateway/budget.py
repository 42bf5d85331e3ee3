"""Limits hedges, and approximate answers, to a share of the items, by budgets of tokens.

Every item earns a fraction of a token, every hedge costs one. When the whole fleet is slow the bucket runs dry and
hedging stops, so that it can never turn a slowdown into a storm (Finagle's retry budget; Envoy and gRPC throttle on
failures instead, which does not bound hedges of calls that are slow but succeed).

Items that come when the bucket is dry queue for tokens, the oldest first: it has the most to gain.
"""

from collections.abc import Callable
from heapq import heappop, heappush

from evenkeel.serving.gateway.item import Item

__all__ = ["Budget", "Rationed"]


class Budget:
    """Holds the tokens that hedges spend.

    Args:
        share: tokens that one item earns; `inf` never refuses.
        burst: how many tokens can be saved up, at least 1.
    """

    def __init__(self, share: float, burst: float = 30.0) -> None:
        self._share = share
        self._burst = burst
        self._tokens = 1.0 if share > 0 else 0.0  # one slow reply may be hedged before there was time to earn

    def earn(self) -> None:
        """Adds an item's share of a token."""
        tokens = self._tokens + self._share
        self._tokens = tokens if tokens < self._burst else self._burst

    @property
    def plenty(self) -> bool:
        """Tells whether at least half of what can be saved up is there."""
        return self._tokens >= self._burst / 2 or self._share == float("inf")

    def spend(self) -> bool:
        """Spends a token; False if there is none."""
        if self._share == float("inf"):
            return True
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self) -> None:
        """Takes a token back that was not used."""
        if self._share != float("inf"):
            self._tokens += 1.0


class Rationed:
    """Gives the tokens of a budget to items, the oldest first.

    Args:
        budget: holds the tokens.
        use: called with an item whose turn has come while it was waiting; False: it has no use for its token now.
    """

    def __init__(self, budget: Budget, use: Callable[[Item], bool]) -> None:
        self.budget = budget
        self._use = use
        self._waiting: list[tuple[int, Item]] = []  # a heap by number; those that are done are dropped on their turn

    def spend(self, item: Item) -> bool:
        """Spends a token on `item` if there is one, else has it wait for one."""
        # While others wait there is no token: what is earned is given to them at once.
        if self.budget.spend():
            return True
        heappush(self._waiting, (item.number, item))
        return False

    def earn(self) -> None:
        """Adds an item's share of a token, and gives whole tokens to those that wait."""
        self.budget.earn()
        waiting = self._waiting
        while waiting:
            item = waiting[0][1]
            if not item.done:
                if not self.budget.spend():
                    return
                if not self._use(item):
                    self.budget.give_back()
            heappop(waiting)
