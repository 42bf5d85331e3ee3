"""Holds one item on its way through the gateway, the options of its request, and how it ended."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenkeel.arrays import Array
from evenkeel.clock import Timer
from evenkeel.coding.code import Answer
from evenkeel.errors import EvenkeelError
from evenkeel.promises.promise import Promise

if TYPE_CHECKING:
    from evenkeel.serving.gateway.node import Attempt
    from evenkeel.serving.gateway.promise_gate import Grant
    from evenkeel.serving.gateway.replicas import Replica

__all__ = ["NO_OPTIONS", "Item", "OnOutcome", "Options", "Outcome"]

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Options:
    """Holds what one request may ask for.

    Attributes:
        exact: never a fill.
        timeout_s: total deadline.
        min_confidence: that fills must reach.
        promise: that the answers must keep; refused where it cannot be shown.
        max_cost: most that an answer may cost on average, in passes of the accurate model.
        degrade: rather the light model's answer, although it is not sure, than none; None: as the policy says.
        loss: share of the packets that were lost on the way of the item, 0..1.
        parent: the header `traceparent` of whoever asks; heeded where items are traced.
    """

    exact: bool = False
    timeout_s: float | None = None
    min_confidence: float | None = None
    promise: Promise | None = None
    max_cost: float | None = None
    degrade: bool | None = None
    loss: float = 0.0
    parent: str = ""


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Says how one item ended: an answer or an error, and how long it took."""

    answer: Answer | None
    error: EvenkeelError | None
    latency_s: float
    certificate: str = ""  # of the promise that the answer is part of


OnOutcome = Callable[[Outcome], object]


class Item:
    """Holds the state of one item on its way; the rules are in `gateway.py` and `backups.py`."""

    __slots__ = (
        "array",
        "attempts",
        "audited",
        "blamed_at_s",
        "cleared",
        "cross_check_open",
        "cross_checked",
        "deadline_at",
        "degrade",
        "done",
        "error",
        "exact",
        "failures",
        "fill",
        "filled_at_s",
        "grant",
        "hedge_at",
        "hedges",
        "key",
        "late",
        "late_at",
        "light",
        "lost_a_pass",
        "lost_alone",
        "min_confidence",
        "number",
        "on_outcome",
        "on_own_reply",
        "open_attempts",
        "passes",
        "patient_until_s",
        "prepared",
        "since_s",
        "suspect",
        "timer",
        "tried",
        "tried_again",
        "uncovered",
        "unsure",
    )

    def __init__(self, number: int, array: Array, on_outcome: OnOutcome, key: int, since_s: float) -> None:
        self.number = number
        self.array = array
        self.on_outcome = on_outcome
        self.key = key  # names the piece of work for injected delays
        self.since_s = since_s
        self.done = False
        self.exact = False  # its user wants no fill
        self.grant: Grant | None = None  # of the promise that its user wants
        self.audited = False  # both models are to answer it
        self.degrade = False  # its user takes the light model's answer where there is no other
        self.light: Answer | None = None  # which the light model gave, and was not sure of

        # What is still to happen; one timer, set for the earliest of the three, serves them all.
        self.late_at = _NEVER
        self.hedge_at = _NEVER
        self.deadline_at = _NEVER
        self.timer: Timer | None = None

        self.attempts = 0  # tasks sent to replicas for this item
        self.hedges = 0
        self.failures = 0  # passes for it that ended in an error, or that their worker did not survive
        self.error: EvenkeelError | None = None  # of the last of these
        self.suspect = False  # a worker died or stopped replying while it worked on this item
        self.cleared = False  # of the suspicion: another worker was lost or fell silent without it
        self.blamed_at_s = 0.0  # when that was seen last
        self.tried_again = False  # a suspect had its second attempt, or what is known of it does for one
        self.cross_checked = False  # where two workers were lost with it at once, another one is looked at, once
        self.cross_check_open = False
        self.patient_until_s = 0.0  # a suspect waits as long for a second replica to be there
        self.tried: list[Replica] = []
        self.open_attempts: list[Attempt] = []

        self.late = False  # `fill_after` has passed
        self.min_confidence = 0.0
        self.fill: tuple[Answer, str] | None = None  # best sure answer from a spare, and its code's name
        self.filled_at_s = 0.0  # when that was its answer
        self.uncovered = False  # to be handed to the backups only when it is late
        self.passes = 0  # of backups that may still answer it
        self.lost_a_pass = False  # a backup died or stopped replying with it, so no other gets it
        self.lost_alone = False  # the same, and no other item was in that pass
        self.unsure = False  # a spare answered, but below `min_confidence`
        self.on_own_reply: Callable[[Array], object] | None = None  # of the group whose decoding needs that reply
        self.prepared: dict[Hashable, Array] = {}  # form -> what codes of that form keep of the item

    @property
    def workers(self) -> int:
        """Counts the workers that are, or will be, at work on it; not those that fell silent over something else."""
        waits = [one for one in self.open_attempts if one.node.health.stalled and one not in one.node.at_work]
        return len(self.open_attempts) - len(waits) + self.passes
