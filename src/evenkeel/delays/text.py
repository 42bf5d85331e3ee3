"""Reads laws of delay from text, as command lines and configuration files hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evenkeel.delays.laws import (
    Constant,
    Delay,
    FleetSlowdown,
    MarkovBursts,
    Pareto,
    PersistentSlow,
    Scaled,
    ShiftedExponential,
    Trace,
    TwoMode,
)
from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_count, read_duration_s, read_number, split_spec, unknown

__all__ = ["parse_delay"]


def parse_delay(text: str) -> Delay:
    """Reads the law that a short text names, e.g. `two-mode:scale=0.3,seed=7`.

    A law on top of another takes the other behind a slash: `persistent:slow=0+3/pareto:shape=1.5`. Without a slash it
    stands on `two-mode` (on its quick mode alone, where the upper law brings the slowness) and takes its fields too:
    `markov:spell=3,scale=0.3`. A `seed` written so is the seed of both.

    Raises:
        ConfigurationError: names the law or field that is wrong, and what is allowed.
    """
    upper, slash, lower = text.partition("/")
    name = upper.partition(":")[0].strip()
    if slash and name in _WRAPPERS:
        _, given = split_spec(upper, "delay")
        return _build(name, given, parse_delay(lower))
    name, given = split_spec(text, "delay")
    if name == "none" and not given:
        return Constant(0.0)
    if name not in _LAWS:
        raise unknown("delay", name, ["none", *_LAWS])
    if name not in _WRAPPERS:
        return _build(name, given, None)
    own = {word: value for word, value in given.items() if word in _LAWS[name].fields}
    rest = {word: value for word, value in given.items() if word not in own or word == "seed"}
    for word in rest:
        if word not in _LAWS["two-mode"].fields:
            raise unknown(f"delay {name!r}: field", word, [*_LAWS[name].fields, *_LAWS["two-mode"].fields])
    if name in ("persistent", "markov"):
        rest.setdefault("slow-share", "0")
    return _build(name, own, _build("two-mode", rest, None))


@dataclass(frozen=True)
class _Field:
    """Names a field in the code, and reads it from text."""

    attribute: str
    read: Callable[[str, str], Any]


@dataclass(frozen=True)
class _Law:
    """Describes how a law is written as text."""

    make: Callable[..., Delay]
    fields: dict[str, _Field]


def _read_workers(text: str, where: str) -> tuple[int, ...]:
    return tuple(read_count(part, where) for part in text.split("+"))


def _read_word(text: str, where: str) -> str:
    return text


_FACTOR = {"factor": _Field("factor", read_number)}
_SCALE = {"scale": _Field("scale", read_number)}
_SEED = {"seed": _Field("seed", read_count)}
_LAWS: dict[str, _Law] = {
    "constant": _Law(Constant, {"seconds": _Field("seconds", read_duration_s)}),
    "two-mode": _Law(
        TwoMode,
        {
            **_SCALE,
            "slow-share": _Field("slow_share", read_number),
            "mu": _Field("mu", read_number),
            "sigma": _Field("sigma", read_number),
            "slow-mean": _Field("slow_mean_s", read_duration_s),
            "slow-sd": _Field("slow_sd_s", read_duration_s),
            **_SEED,
        },
    ),
    "persistent": _Law(PersistentSlow, {**_FACTOR, "slow": _Field("slow_workers", _read_workers)}),
    "markov": _Law(
        MarkovBursts,
        {"spell": _Field("spell_s", read_duration_s), "duty": _Field("duty", read_number), **_FACTOR, **_SEED},
    ),
    "pareto": _Law(
        Pareto, {"shape": _Field("shape", read_number), "scale": _Field("scale_s", read_duration_s), **_SEED}
    ),
    "shifted-exponential": _Law(
        ShiftedExponential,
        {"shift": _Field("shift_s", read_duration_s), "rate": _Field("rate_per_s", read_number), **_SEED},
    ),
    "trace": _Law(Trace, {"path": _Field("path", _read_word), "order": _Field("order", _read_word), **_SCALE, **_SEED}),
    "fleet": _Law(
        FleetSlowdown,
        {**_FACTOR, "from": _Field("from_s", read_duration_s), "to": _Field("to_s", read_duration_s)},
    ),
    "scaled": _Law(Scaled, dict(_FACTOR)),
}
_WRAPPERS = ("persistent", "markov", "fleet", "scaled")


def _build(name: str, given: dict[str, str], inner: Delay | None) -> Delay:
    law = _LAWS[name]
    arguments: dict[str, Any] = {} if inner is None else {"inner": inner}
    for word, text in given.items():
        if word not in law.fields:
            raise unknown(f"delay {name!r}: field", word, list(law.fields))
        arguments[law.fields[word].attribute] = law.fields[word].read(text, f"delay {name!r}: field {word!r}")
    if law.make is Trace and "path" not in arguments:
        raise ConfigurationError("delay 'trace': field 'path' is missing; write trace:path=FILE")
    return law.make(**arguments)
