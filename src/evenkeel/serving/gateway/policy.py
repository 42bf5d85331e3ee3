"""Describes, as data, what the gateway does about a late replica.

One dispatch rule serves every policy, so a policy is only a set of numbers: how many copies go out at once, when a
fill may answer, when a second attempt starts and how much extra load that may cost, and when to give up.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from evenkeel.errors import ConfigurationError
from evenkeel.settings import Form, Seconds, bounds, check_fields, one_of, setting, shown
from evenkeel.text_values import read_duration_s

__all__ = ["AUTO_FILL", "AUTO_HEDGE", "POLICIES", "Policy", "Trigger", "parse_trigger", "preset"]

_MAX_WAIT_S = 60.0


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
    floor_s: Seconds = setting(0.001, "Never sooner; more: fewer fills and hedges when replicas are very fast.", low=0)
    ceiling_s: Seconds = setting(60.0, "Never later; less: acts earlier when most of the fleet is slow.", low=0)
    initial_s: Seconds = setting(1.0, "Used until enough replies are in to know the quantile.", low=0)

    def __str__(self) -> str:
        if self.auto is not None:
            return "auto"
        if self.quantile is not None:
            return f"p{self.quantile * 100:g}"
        return f"{(self.fixed_s or 0.0) * 1e3:g}ms"


_ON_MISS = one_of({"degrade": True, "reject": False})


def _trigger_of(field_name: str) -> Form:
    """Tells how files write a trigger: `auto`, `p95`, `25ms` or `never`, or fields of which one is `at`."""

    def read(raw: Any, plain: Any, folder: Path) -> Any:
        if raw == "never" or isinstance(raw, Trigger):
            return None if raw == "never" else raw
        given = raw if isinstance(raw, Mapping) else {"at": raw}
        at = parse_trigger(given.get("at", "auto"), f"policy.{field_name}")
        limits = plain({name: value for name, value in given.items() if name != "at"})
        return replace(limits, fixed_s=at.fixed_s, quantile=at.quantile, auto=at.auto)

    forms: tuple[dict[str, Any], ...] = ({"type": "string", "minLength": 1}, {"type": "number", "minimum": 0})
    at = {"description": "When: `auto` (learned), a live quantile such as `p95`, or a time.", "anyOf": list(forms)}
    return Form(read, forms, extra={"at": at}, hidden=("fixed_s", "quantile", "auto"))


def _check_wait(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_WAIT_S:
        raise ConfigurationError(f"expected a number{bounds(0, _MAX_WAIT_S)} (seconds), found {shown(value)}")


def _learned() -> Form:
    """Tells how files write a time that the gateway may learn: `auto`, or the time."""

    def read(raw: Any, plain: Any, folder: Path) -> Any:
        if raw in ("auto", None):
            return None
        value = plain(raw)
        _check_wait(value)
        return value

    return Form(read, ({"const": "auto"},))


@dataclass(frozen=True)
class Policy:
    """Holds the numbers that steer the dispatch rule. `None` switches a mechanism off, or has a time learned."""

    name: str = setting("none", "What the rest begins with: none, replicate, ... or cascade.")
    copies: int = setting(1, "Replicas that get an item at once; 2 is full replication.", low=1, high=5)
    fill_after: Annotated[Trigger, _trigger_of("fill_after")] | None = setting(
        None, "When an answer from a spare may be used: auto (learned), a live quantile (p95), a time, or never."
    )
    min_confidence: float = setting(
        0.0, "Fills below it are not used, and hedged instead; a card may ask for more.", low=0, high=1
    )
    group_wait_s: Annotated[Seconds, _learned()] | None = setting(
        None,
        "How long an idle backup waits for fuller groups: auto (just in time for the oldest item), or a time; "
        "longer: less backup work, later fills.",
        shown_default="auto",
    )
    hedge_after: Annotated[Trigger, _trigger_of("hedge_after")] | None = setting(
        None, "When a second replica gets the item: auto (learned), a live quantile (p95), a time, or never."
    )
    max_extra_load: float = setting(0.1, "Hedges as a share of all items; .inf: no budget.", low=0)
    max_approximate: float = setting(
        1.0, "Approximate answers as a share of all items; 0: backups do exact passes only.", low=0, high=1
    )
    max_attempts: int = setting(
        2,
        "Replicas that one item may be sent to by choice, so not after a loss; 3 hedges a late hedge too.",
        low=1,
        high=5,
    )
    deadline_s: Seconds = setting(
        30.0, "Time for an item in all; then comes the default answer, or an error (504).", low=1e-3, high=86400
    )
    light_first: bool = False  # a light model is asked before any replica, which answers what it is not sure of
    default_label: int | None = setting(
        None, "Number of the class that is answered at the deadline instead of an error.", low=0, high=1 << 30
    )
    degrade: Annotated[bool, _ON_MISS] = setting(
        False,
        "With a cascade: degrade gives the light model's answer rather than none. A request may say else.",
        name="on_miss",
        shown_default="reject",
    )

    def __post_init__(self) -> None:
        """Refuses numbers out of range, so that every policy that exists can be run."""
        check_fields(self, "policy")
        if self.group_wait_s is not None:
            try:
                _check_wait(self.group_wait_s)
            except ConfigurationError as error:
                raise ConfigurationError(f"policy.group_wait_s: {error}") from None
        for name in ("fill_after", "hedge_after"):
            if not isinstance(getattr(self, name), Trigger | None):
                raise ConfigurationError(f"policy.{name}: expected a Trigger or None, found {getattr(self, name)!r}")

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


def parse_trigger(text: Any, field_name: str = "trigger") -> Trigger:
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
