"""Checks the settings of every code, its groups, and the numbers of its replies."""

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from numbers import Integral, Real

from evenkeel.arrays import Array
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["at_least_one", "check_count", "check_group", "check_numbers", "number", "whole"]


def at_least_one(name: str, value: int) -> int:
    """Gives `value` if it is a whole number above zero; otherwise raises ConfigurationError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number above zero, found {value!r}")
    return value


def check_count(count: int, max_items: int) -> None:
    """Raises CodeError unless a group may hold `count` items."""
    if not 1 <= count <= max_items:
        raise CodeError(f"a group of this code holds 1 to {max_items} items, found {count}")


def check_group(prepared: Sequence[Array], max_items: int) -> None:
    """Raises CodeError unless there are 1..`max_items` items, all of one shape and datatype."""
    check_count(len(prepared), max_items)
    first = prepared[0]
    for number, item in enumerate(prepared):
        if item.shape != first.shape or item.dtype != first.dtype:
            raise CodeError(
                f"items of one group must be alike: item 0 is {first.dtype} {first.shape}, "
                f"item {number} is {item.dtype} {item.shape}"
            )


def check_numbers(numbers: Iterable[int], tasks: int) -> None:
    """Raises CodeError unless every number belongs to one of `tasks` tasks."""
    for number in numbers:
        if not 0 <= number < tasks:
            raise CodeError(f"a reply to task {number}, but the group has tasks 0 to {tasks - 1} only")


def whole(name: str, value: object, low: float = -inf, high: float = inf) -> int:
    """Gives `value` if it is a whole number from `low` to `high`; otherwise raises ConfigurationError."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise ConfigurationError(f"{name}: must be a whole number{_range(low, high)}, found {value!r}")


def number(name: str, value: object, low: float = -inf) -> float:
    """Gives `value` if it is a finite number of `low` or more; otherwise raises ConfigurationError."""
    if isinstance(value, Real) and not isinstance(value, bool) and isfinite(value) and low <= float(value):
        return float(value)
    raise ConfigurationError(f"{name}: must be a finite number{_range(low, inf)}, found {value!r}")


def _range(low: float, high: float) -> str:
    if high < inf:
        return f" from {low} to {high}"
    return f" of {low} or more" if low > -inf else ""
