"""Reads short texts such as `two-mode:scale=0.3,seed=7`: how delays, faults and codes are written on a command line.

Also JSON that users edit, with what would be misread silently refused.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from evenkeel.errors import ConfigurationError

__all__ = [
    "is_text",
    "read_count",
    "read_duration_s",
    "read_fraction",
    "read_json",
    "read_number",
    "read_quantity",
    "read_rate_bps",
    "read_share",
    "read_truth",
    "split_spec",
    "unknown",
    "without_password",
]

_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def is_text(name: str) -> bool:
    """Tells whether `name` can be written as UTF-8; a file's name need not be text at all."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(text: str | bytes) -> Any:
    """Reads JSON, and refuses a key that is given twice in an object, numbers that are not finite, and deep nesting.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is no finite number")
    return value


def without_password(text: str) -> str:
    """Gives a URL, or a text with URLs, as logs and messages may show it.

    What stands before an `@` of its host is left out, and what follows a `?`, which may be a token. A `/`, `?` or `#`
    in a password should have been escaped: what follows a colon and is no port is taken for such a password.
    """
    text = re.sub(r"(?<=//)(?:[^/?#\s]*|[^/?#\s:]*:(?!\d*[/?#])\S*)@", "", text)
    return re.sub(r"(//[^\s?#]*)\?[^\s'\"]*", r"\1", text)


def split_spec(text: str, what: str) -> tuple[str, dict[str, str]]:
    """Splits `name:field=value,field=value` into the name and the fields.

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
    """Reads a finite number; `where` names the field in the message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"{where} must be a number, found {text!r}")
    return value


def read_count(text: str, where: str) -> int:
    """Reads a whole number; `where` names the field in the message."""
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{where} must be a whole number, found {text!r}") from None


def read_truth(text: str, where: str) -> bool:
    """Reads `true` or `false`; `where` names the field in the message."""
    if text not in ("true", "false"):
        raise ConfigurationError(f"{where} must be true or false, found {text!r}")
    return text == "true"


def read_fraction(text: str, where: str) -> float:
    """Reads a number such as `1/32` or `0.03`; `where` names the field in the message."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"{where}: must be a number such as 0.03 or 1/32, found {text!r}")
    return value


def read_duration_s(text: str, where: str) -> float:
    """Reads a duration such as `0.2`, `0.2s`, `200ms`, `50us` or `2min` as seconds."""
    for unit in sorted(_UNITS_S, key=len, reverse=True):
        if text.endswith(unit):
            return read_number(text.removesuffix(unit), where) * _UNITS_S[unit]
    try:
        return read_number(text, where)
    except ConfigurationError:
        raise ConfigurationError(f"{where} must be a time such as 0.2, 2s or 200ms, found {text!r}") from None


def read_rate_bps(text: str, where: str) -> float:
    """Reads bits per second, such as `100mbit`, `2.5Gbit/s` or `unlimited` (infinite); `where` names the field."""
    word = text.strip().lower().removesuffix("/s").removesuffix("ps")
    if word == "unlimited":
        return math.inf
    if word.endswith("bit") and (value := _multiple(word.removesuffix("bit"))) is not None and value > 0:
        return value
    raise ConfigurationError(f"{where} must be a rate such as 100mbit, 2.5gbit or unlimited, found {text!r}")


def read_quantity(text: str, where: str) -> int:
    """Reads a whole number of 1 or more such as `25000`, `300k` or `11.7M`; `where` names the field in the message."""
    value = _multiple(text.strip().lower())
    if value is None or round(value) < 1:
        raise ConfigurationError(f"{where} must be a number of 1 or more such as 25000 or 11.7M, found {text!r}")
    return round(value)


def read_share(text: str, where: str) -> float:
    """Reads a share from 0 to 1, such as `0.001` or `0.1%`; `where` names the field in the message."""
    word = text.strip()
    value = read_number(word.removesuffix("%"), where) / (100 if word.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{where} must be a share such as 0.001 or 0.1%, found {text!r}")
    return value


def _multiple(word: str) -> float | None:
    """Reads `2.5m` as a number; None if it is none."""
    prefix = word[-1:] if word[-1:] in _MULTIPLES else ""
    try:
        value = float(word.removesuffix(prefix)) * _MULTIPLES[prefix]
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def unknown(what: str, name: str, allowed: Sequence[str]) -> ConfigurationError:
    """Makes the error for a word that is none of `allowed`."""
    return ConfigurationError(f"{what} {name!r} is unknown; allowed are {', '.join(allowed)}")
