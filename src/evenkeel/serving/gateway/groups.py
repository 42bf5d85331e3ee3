"""Forms groups of the items that wait, and decodes a group's replies."""

from collections.abc import Callable

from evenkeel.arrays import Array
from evenkeel.clock import Clock, Timer
from evenkeel.coding.code import Answer, Code
from evenkeel.errors import CodeError
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.stats import Stats

__all__ = ["PASS_KEYS", "Group", "OnAnswer", "Waiting"]

OnAnswer = Callable[[Item, Answer, str], object]  # item, answer, name of the code it comes from

# Passes for groups are pieces of work of their own; their keys lie out of the items' way.
PASS_KEYS = 1 << 48
_NEVER = float("inf")
_AT_ONCE = -_NEVER
_SOON_S = 5e-4  # event loops count in milliseconds, and may call half of one too early


class Waiting:
    """Holds items without a group, oldest first, and calls when a group is due.

    An item whose user has an answer leaves through `forget`, so no more wait here than are in flight.

    Args:
        clock: where to wait.
        full: how many items never wait for more.
        on_due: called, never from inside a method of this class, when a group should be taken.

    Attributes:
        wait_s: how long the oldest item waits for others now; it may change at any time.
        gap_s: until the next item is expected: a group that would be due before need not wait any more.
    """

    def __init__(self, clock: Clock, full: int, on_due: Callable[[], object], wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        self.gap_s = 0.0
        self._clock = clock
        self._full = full
        self._on_due = on_due
        self._items: dict[int, Item] = {}
        self._due_at = _NEVER
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: Item) -> bool:
        return item.number in self._items

    def is_due_before(self, others: dict[int, Item]) -> bool:
        """Tells whether a group is due whose oldest item came before the first of `others`."""
        return (
            bool(self._items)
            and next(iter(self._items)) < next(iter(others))
            and self._next_due_at() <= self._clock.time()
        )

    def add(self, item: Item) -> None:
        """Adds an item that waits; one that is late already goes before all others."""
        if item.late and self._items:
            self._items = {item.number: item, **self._items}
        else:
            self._items[item.number] = item

    def forget(self, item: Item) -> None:
        """Removes the item, if it waits."""
        self._items.pop(item.number, None)

    def take(self, count: int) -> list[Item]:
        """Takes out up to `count` items, the oldest first."""
        items = list(self._items.values())[:count]
        for item in items:
            del self._items[item.number]
        return items

    def wake(self) -> None:
        """Has `on_due` called as soon as a group is due: a worker could take one."""
        if not self._items:
            return
        due_at = self._next_due_at()
        if due_at >= self._due_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_at = due_at
        if due_at <= self._clock.time() + self.gap_s:
            # Soon, not now: items of one request, and of requests read in one turn of the loop, share a group.
            self._timer = self._clock.call_soon(self._due)
        else:
            self._timer = self._clock.call_at(due_at, self._due)

    def _next_due_at(self) -> float:
        if self.wait_s <= 0 or len(self._items) >= self._full:
            return _AT_ONCE
        oldest = next(iter(self._items.values()))
        return _AT_ONCE if oldest.late else oldest.since_s + self.wait_s

    def _due(self) -> None:
        self._timer = None
        self._due_at = _NEVER
        # The item that was due may have been answered meanwhile.
        if self._items and self._next_due_at() > self._clock.time() + max(self.gap_s, _SOON_S):
            self.wake()
        else:
            self._on_due()


class Group:
    """Holds the items that one encoding covers, and the replies so far."""

    __slots__ = ("code", "items", "open_spares", "replies")

    def __init__(self, code: Code, items: list[Item]) -> None:
        self.code = code
        self.items = items
        self.open_spares = 0  # spare tasks whose replies are not in
        self.replies: dict[int, Array] = {}

    @property
    def done(self) -> bool:
        """Tells whether all its items are answered or gone."""
        return all(item.done for item in self.items)

    def replied(self, number: int, outputs: Array, stats: Stats, on_answer: OnAnswer) -> None:
        """Reports every answer that follows, now that task `number` gave `outputs`; drops outputs that do not fit."""
        self.replies[number] = outputs
        try:
            answers = self.code.decode(len(self.items), self.replies)
        except CodeError:
            del self.replies[number]
            stats.bad_replies += 1
            return
        for place, answer in answers.items():
            item = self.items[place]
            if not item.done:
                on_answer(item, answer, self.code.name)
