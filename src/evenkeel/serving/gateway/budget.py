"""Limits hedges, and approximate answers, to a share of the items, by budgets of tokens.

Every item earns a fraction of a token, every hedge costs one. When the whole fleet is slow the bucket runs dry and
hedging stops, so that it can never turn a slowdown into a storm (Finagle's retry budget; Envoy and gRPC throttle on
failures instead, which does not bound hedges of calls that are slow but succeed).

Items that come when the bucket is dry wait for tokens, and the one that gains most gets the next. In a heavy tail that
is the oldest; where stragglers all take about as long it is not, since the oldest is nearly done.
"""

from collections.abc import Callable
from itertools import islice

from evenkeel.serving.gateway.item import Item

__all__ = ["Budget", "Rationed"]

_MEMORY = 512  # items over which the share that spent a token is averaged
_COMPARED = 64  # items that wait, the first of them; more would cost more than they are worth


class Budget:
    """Holds the tokens that hedges spend.

    Args:
        share: tokens that one item earns; `inf` never refuses.
        burst: how many tokens can be saved up, at least 1.

    Attributes:
        spent: share of the last items, or so many tokens for each, that were spent; a moving average.
    """

    def __init__(self, share: float, burst: float = 30.0) -> None:
        self.spent = 0.0
        self._share = share
        self._burst = burst
        self._tokens = 1.0 if share > 0 else 0.0  # one slow reply may be hedged before there was time to earn

    @property
    def saved(self) -> float | None:
        """Gives the share of the tokens that can be saved up which is there, 0..1; None where nothing is refused."""
        return None if self._share == float("inf") else self._tokens / self._burst

    def earn(self) -> None:
        """Adds an item's share of a token."""
        self.spent -= self.spent / _MEMORY
        tokens = self._tokens + self._share
        self._tokens = tokens if tokens < self._burst else self._burst

    @property
    def plenty(self) -> bool:
        """Tells whether at least half of what can be saved up is there."""
        return self._tokens >= self._burst / 2 or self._share == float("inf")

    @property
    def has_token(self) -> bool:
        """Tells whether a token can be spent."""
        return self._tokens >= 1.0 or self._share == float("inf")

    def spend(self) -> bool:
        """Spends a token; False if there is none."""
        if self._share != float("inf"):
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
        self.spent += 1.0 / _MEMORY
        return True


class Rationed:
    """Gives the tokens of a budget to the items that gain most.

    Args:
        budget: holds the tokens.
        gain_s: seconds that an item that waits would gain by a token now; not above 0: it has no use for one now.
        use: called with an item that gets one.
    """

    def __init__(self, budget: Budget, gain_s: Callable[[Item], float], use: Callable[[Item], object]) -> None:
        self.budget = budget
        self._gain_s = gain_s
        self._use = use
        self._waiting: dict[int, Item] = {}

    def spend(self, item: Item) -> bool:
        """Spends a token on `item` if there is one, else has it wait for one."""
        if self.budget.spend():
            return True
        self._waiting[item.number] = item
        return False

    def forget(self, item: Item) -> None:
        """Has the item wait no longer. Ignores those that do not."""
        self._waiting.pop(item.number, None)

    def earn(self) -> None:
        """Adds an item's share of a token, and gives whole tokens to those that wait."""
        self.budget.earn()
        while self._waiting and self.budget.has_token:
            best = max(islice(self._waiting.values(), _COMPARED), key=self._gain_s)
            if self._gain_s(best) <= 0:
                return
            del self._waiting[best.number]
            self.budget.spend()
            self._use(best)
