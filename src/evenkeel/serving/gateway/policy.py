"""Describes, as data, what the gateway does about a late replica.

One dispatch rule serves every policy, so a policy is only a set of numbers: how many copies go out at once, when a
fill may answer, when a second attempt starts and how much extra load that may cost, and when to give up.
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Literal

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_duration_s

__all__ = ["AUTO_FILL", "AUTO_HEDGE", "POLICIES", "Policy", "Trigger", "parse_trigger", "preset"]


@dataclass(frozen=True)
class Trigger:
    """Describes a moment after an item's arrival: fixed, or learned from the replicas' service times.

    What is learned is a live quantile, or (auto) the point from which a fill or a hedge is worth while; see
    `LiveQuantiles`.

    Service time is the time a replica works on an item, not the time it waits in a queue: queueing must not push the
    trigger out just when the fleet is busy and fills are worth most.
    """

    fixed_s: float | None = None
    quantile: float | None = None
    auto: Literal["fill", "hedge"] | None = None
    floor_s: float = 0.001  # up: fewer fills and hedges when replicas are very fast
    ceiling_s: float = 60.0  # down: acts earlier than the quantile when most of the fleet is slow
    initial_s: float = 1.0  # used until enough replies are in to know the quantile

    def __str__(self) -> str:
        if self.auto is not None:
            return "auto"
        if self.quantile is not None:
            return f"p{self.quantile * 100:g}"
        return f"{(self.fixed_s or 0.0) * 1e3:g}ms"


_RANGES = (
    ("copies", 1, 5),
    ("min_confidence", 0.0, 1.0),
    ("group_wait_s", 0.0, 60.0),
    ("max_extra_load", 0.0, float("inf")),
    ("max_approximate", 0.0, 1.0),
    ("max_attempts", 1, 5),
    ("deadline_s", 1e-3, 86400.0),
)


@dataclass(frozen=True)
class Policy:
    """Holds the numbers that steer the dispatch rule. `None` switches a mechanism off."""

    name: str = "none"
    copies: int = 1  # replicas that get an item at once; 2 is full replication
    fill_after: Trigger | None = None  # when an answer from a spare may be used
    min_confidence: float = 0.0  # up: fewer, surer fills; the rest is hedged
    group_wait_s: float = 0.0  # up: fuller groups and less backup work, later fills
    hedge_after: Trigger | None = None  # when a second replica gets the item
    max_extra_load: float = 0.1  # hedges as a share of items; inf: no budget
    max_approximate: float = 1.0  # approximate answers as a share of items; 0: backups do exact passes only
    max_attempts: int = 2  # replicas that one item may be sent to by choice (retries after a loss are not counted)
    deadline_s: float = 30.0  # total; then the default answer or an error
    light_first: bool = (
        False  # a light model is asked before any replica, which then only answers what it is not sure of
    )
    default_label: int | None = None  # answered at the deadline instead of an error
    degrade: bool = False  # rather the light model's answer, although it is not sure, than none; a request may say else

    def __post_init__(self) -> None:
        """Refuses numbers out of range, so that every policy that exists can be run."""
        for name, low, high in _RANGES:
            value = getattr(self, name)
            whole = name in ("copies", "max_attempts")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not low <= value <= high
            ):
                raise ConfigurationError(
                    f"policy.{name}: must be {'a whole number' if whole else 'a number'} "
                    f"from {low:g} to {high:g}, found {value!r}"
                )
        for name in ("fill_after", "hedge_after"):
            if not isinstance(getattr(self, name), Trigger | None):
                raise ConfigurationError(f"policy.{name}: expected a Trigger or None, found {getattr(self, name)!r}")
        label = self.default_label
        if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label < 0):
            raise ConfigurationError(f"policy.default_label: must be the number of a class, found {label!r}")

    @property
    def uses_backups(self) -> bool:
        """Tells whether the policy uses spares."""
        return self.fill_after is not None


AUTO_FILL = Trigger(auto="fill")
AUTO_HEDGE = Trigger(auto="hedge")

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("none"),
        Policy("replicate", hedge_after=Trigger(fixed_s=0.3), max_extra_load=float("inf")),
        Policy("replicate-all", copies=2),
        Policy("hedge", hedge_after=AUTO_HEDGE),
        Policy("collage", fill_after=AUTO_FILL),
        Policy("collage+hedge", fill_after=AUTO_FILL, hedge_after=AUTO_HEDGE),
        Policy("cascade", fill_after=Trigger(fixed_s=0.0), light_first=True),
    )
}


def preset(name: str, **changes: object) -> Policy:
    """Gives the policy called `name`, with some fields changed.

    Raises:
        ConfigurationError: no such policy or field, or a value out of range.
    """
    if name not in POLICIES:
        raise ConfigurationError(f"policy: unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    known = {field.name for field in fields(Policy)}
    for field_name in changes:
        if field_name not in known:
            raise ConfigurationError(f"policy: unknown field {field_name!r}; known are {', '.join(sorted(known))}")
    return replace(POLICIES[name], **changes)  # type: ignore[arg-type]  # checked by the policy itself


def parse_trigger(text: str | float, field_name: str = "trigger") -> Trigger:
    """Reads a trigger: "auto", "p95" (live quantile) or "25ms" (fixed)."""
    if str(text).strip().casefold() == "auto":
        return AUTO_HEDGE if "hedge" in field_name else AUTO_FILL
    match = re.fullmatch(r"\s*p([0-9]+(?:\.[0-9]+)?)\s*", str(text))
    if not match:
        try:
            fixed_s = read_duration_s(str(text).strip(), field_name)
        except ConfigurationError:
            raise ConfigurationError(
                f"{field_name}: expected auto, a quantile like p95 or a duration like 25ms, found {text!r}"
            ) from None
        if fixed_s < 0:
            raise ConfigurationError(f"{field_name}: a duration must not be negative, found {text!r}")
        return Trigger(fixed_s=fixed_s)
    # "p999" is how people write the 99.9th percentile.
    value = float(match[1])
    while value > 100:
        value /= 10
    if not 0 < value < 100:
        raise ConfigurationError(f"{field_name}: a quantile lies between p0 and p100, found {text!r}")
    return Trigger(quantile=value / 100)
