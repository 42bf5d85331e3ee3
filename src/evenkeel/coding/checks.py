"""What every code demands of its group and of the numbers of its replies."""

from collections.abc import Iterable, Sequence

from evenkeel.coding.code import Array
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["at_least_one", "check_count", "check_group", "check_numbers"]


def at_least_one(name: str, value: int) -> int:
    """`value`, when it is a whole number above zero; otherwise ConfigurationError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number above zero, found {value!r}")
    return value


def check_count(count: int, most_items: int) -> None:
    """CodeError unless a group may hold `count` items."""
    if not 1 <= count <= most_items:
        raise CodeError(f"a group of this code holds 1 to {most_items} items, found {count}")


def check_group(prepared: Sequence[Array], most_items: int) -> None:
    """CodeError unless there are 1..`most_items` items, all of one shape and datatype."""
    check_count(len(prepared), most_items)
    first = prepared[0]
    for number, item in enumerate(prepared):
        if item.shape != first.shape or item.dtype != first.dtype:
            raise CodeError(
                f"items of one group must be alike: item 0 is {first.dtype} {first.shape}, "
                f"item {number} is {item.dtype} {item.shape}"
            )


def check_numbers(numbers: Iterable[int], tasks: int) -> None:
    """CodeError unless every number belongs to one of `tasks` tasks."""
    for number in numbers:
        if not 0 <= number < tasks:
            raise CodeError(f"a reply to task {number}, but the group has tasks 0 to {tasks - 1} only")
