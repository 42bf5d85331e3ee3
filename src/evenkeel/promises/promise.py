"""Defines what a caller may ask for: an accuracy, a drop of accuracy, or an agreement, each with its guarantee."""

from dataclasses import dataclass, replace
from typing import Literal

from evenkeel.errors import ConfigurationError

__all__ = ["KINDS", "NEVER", "Promise", "PromiseKind"]

PromiseKind = Literal["min_accuracy", "max_accuracy_drop", "min_agreement", "min_fill_agreement"]
KINDS: tuple[PromiseKind, ...] = ("min_accuracy", "max_accuracy_drop", "min_agreement", "min_fill_agreement")
NEVER = 2.0  # a threshold that no score reaches: everything goes to the data centre
_LEAST_GUARANTEE = 0.5
_MAX_GUARANTEE = 0.9999


@dataclass(frozen=True, order=True)
class Promise:
    """Holds what is promised of all answers together, and how surely the threshold that keeps it was found.

    `min_accuracy`: at least so many answers are right. `max_accuracy_drop`: at most so many fewer are right than if the
    accurate model had answered all of them. `min_agreement`: at least so many say what the accurate model would say;
    nobody needs to know what is right. `min_fill_agreement`: the same, of those answers alone that the light model
    gives.

    Attributes:
        kind: which of the three.
        level: the accuracy, the drop or the agreement, 0..1.
        guarantee: probability, over calibration sets, that the threshold found keeps the promise.
    """

    kind: PromiseKind
    level: float
    guarantee: float = 0.95

    def __post_init__(self) -> None:
        """Refuses what cannot be promised."""
        if self.kind not in KINDS:
            raise ConfigurationError(f"promise: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        for name, value, low, high in (
            (self.kind, self.level, 0.0, 1.0),
            ("guarantee", self.guarantee, _LEAST_GUARANTEE, _MAX_GUARANTEE),
        ):
            inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
            if not inside or (name == self.kind and not low < value < high):
                raise ConfigurationError(
                    f"{name}: must be a number {'between' if name == self.kind else 'from'} {low:g} "
                    f"{'and' if name == self.kind else 'to'} {high:g}, found {value!r}"
                )

    @property
    def delta(self) -> float:
        """Gives the probability that a calibration may be misleading."""
        return 1.0 - self.guarantee

    @property
    def needs_labels(self) -> bool:
        """Tells whether it can only be shown with the right answers."""
        return self.kind in ("min_accuracy", "max_accuracy_drop")

    @property
    def allowed(self) -> float:
        """Gives the share of the answers that may be wrong, or worse, or different."""
        return self.level if self.kind == "max_accuracy_drop" else 1.0 - self.level

    def stricter(self, by: float) -> "Promise | None":
        """Gives the promise that allows so much less; None where there is none."""
        level = self.level - by if self.kind == "max_accuracy_drop" else self.level + by
        return replace(self, level=level) if 0 < level < 1 else None

    def __str__(self) -> str:
        return f"{self.kind} {self.level:g} (guarantee {self.guarantee:g})"

    def covers(self, wanted: "Promise") -> bool:
        """Tells whether keeping this promise keeps the one that is wanted."""
        if self.guarantee < wanted.guarantee - 1e-12:
            return False
        if self.kind == wanted.kind:
            stricter = wanted.level - self.level if self.kind == "max_accuracy_drop" else self.level - wanted.level
            return stricter >= -1e-12
        # Answers that agree with the accurate model are as right as its own.
        agrees = self.kind == "min_agreement" and wanted.kind == "max_accuracy_drop"
        return agrees and 1.0 - self.level <= wanted.level + 1e-12
