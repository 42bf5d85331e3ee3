"""One item on its way through the gateway, what its request asked for, and how it ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenkeel.clock import Timer
from evenkeel.coding.code import Answer, Array
from evenkeel.errors import EvenkeelError

if TYPE_CHECKING:
    from evenkeel.serving.groups import Group
    from evenkeel.serving.replicas import Replica

__all__ = ["NO_OPTIONS", "Item", "OnOutcome", "Options", "Outcome"]


@dataclass(frozen=True, slots=True)
class Options:
    """What one request may ask for: never a fill, a total deadline, a confidence that fills must reach."""

    exact: bool = False
    timeout_s: float | None = None
    min_confidence: float | None = None


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one item ended: an answer or an error, and how long it took."""

    answer: Answer | None
    error: EvenkeelError | None
    latency_s: float


OnOutcome = Callable[[Outcome], object]


class Item:
    """One item on its way. A record of its state; the rules stand in `gateway.py` and `groups.py`."""

    __slots__ = (
        "array",
        "attempts",
        "deadline_timer",
        "done",
        "fill",
        "groups",
        "hedge_timer",
        "key",
        "late",
        "late_timer",
        "min_confidence",
        "number",
        "on_outcome",
        "open_attempts",
        "prepared",
        "retries",
        "since_s",
        "tried",
    )

    def __init__(self, number: int, array: Array, on_outcome: OnOutcome, key: int, since_s: float) -> None:
        self.number = number
        self.array = array
        self.on_outcome = on_outcome
        self.key = key  # names the piece of work for injected delays
        self.since_s = since_s
        self.done = False
        self.late = False  # `fill_after` has passed
        self.fill: tuple[Answer, str] | None = None  # best answer from a spare, and its code's name
        self.min_confidence = 0.0
        self.attempts = 0
        self.retries = 0  # attempts that replaced lost ones
        self.tried: list[Replica] = []
        self.open_attempts: list[tuple[Replica, int]] = []  # replica, ticket
        self.groups: list[tuple[Group, int]] = []  # groups whose decoding needs this item's own reply
        self.prepared: dict[str, Array] | None = None  # code name -> what that code keeps of the item
        self.late_timer: Timer | None = None
        self.hedge_timer: Timer | None = None
        self.deadline_timer: Timer | None = None
