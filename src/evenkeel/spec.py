"""Short texts such as `two-mode:scale=0.3,seed=7`: how delays and faults are written on a command line."""

import math
from collections.abc import Sequence

from evenkeel.errors import ConfigurationError

__all__ = ["read_count", "read_duration_s", "read_number", "split_spec", "unknown"]

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def split_spec(text: str, what: str) -> tuple[str, dict[str, str]]:
    """The name and the fields of `name:field=value,field=value`.

    Args:
        text: what the user wrote.
        what: what the text describes, for messages ("delay", "fault").

    Raises:
        ConfigurationError: no name, a part that is not `field=value`, or a field given twice.
    """
    name, colon, rest = text.strip().partition(":")
    if not name or (colon and not rest):
        raise ConfigurationError(f"{what} {text!r} is not of the form name:field=value,field=value")
    fields: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        field, equals, value = part.partition("=")
        field, value = field.strip(), value.strip()
        if not (field and equals and value):
            raise ConfigurationError(f"{what} {text!r}: {part!r} is not of the form field=value")
        if field in fields:
            raise ConfigurationError(f"{what} {text!r}: field {field!r} is given twice")
        fields[field] = value
    return name.strip(), fields


def read_number(text: str, where: str) -> float:
    """A finite number; `where` names the field in the message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"{where} must be a number, found {text!r}")
    return value


def read_count(text: str, where: str) -> int:
    """A whole number; `where` names the field in the message."""
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{where} must be a whole number, found {text!r}") from None


def read_duration_s(text: str, where: str) -> float:
    """Seconds from `0.2`, `0.2s`, `200ms`, `50us` or `2min`."""
    for unit in sorted(_UNITS_S, key=len, reverse=True):
        if text.endswith(unit):
            return read_number(text.removesuffix(unit), where) * _UNITS_S[unit]
    try:
        return read_number(text, where)
    except ConfigurationError:
        raise ConfigurationError(f"{where} must be a time such as 0.2, 2s or 200ms, found {text!r}") from None


def unknown(what: str, name: str, allowed: Sequence[str]) -> ConfigurationError:
    """The error for a word that is none of `allowed`."""
    return ConfigurationError(f"{what} {name!r} is unknown; allowed are {', '.join(allowed)}")
