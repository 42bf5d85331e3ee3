"""Reshapes at one size as a graph does at another: axes that it joins are joined, axes that it splits are split."""

import math
from itertools import pairwise

from evenkeel.errors import ConfigurationError

__all__ = ["reshaped_alike"]


def reshaped_alike(before: list[int], after: list[int], now: list[int], rows: int = 1) -> list[int]:
    """Gives the shape that `now` takes where `before` took the shape `after`.

    The axes fall into runs with as many numbers before as after; axes of one belong to the run before them. Where a
    run's size has changed, two new axes that were alike stay so, or else the first that can takes up the difference; an
    axis of one takes up `rows`.

    Args:
        before: a shape that was seen, one image perhaps.
        after: what was made of it.
        now: a shape with as many axes.
        rows: images in it.

    Raises:
        ConfigurationError: it cannot be told.
    """
    if len(before) != len(now):
        raise ConfigurationError(f"a Reshape gets {len(now)} axes where the graph's own size gives {len(before)}")
    found: list[int] = []
    source = target = 0
    while source < len(before) or target < len(after):
        first, begin = source, target
        left = right = 1
        while left != right or source == first or target == begin:
            if source < len(before) and (left <= right or target == len(after)):
                left *= before[source]
                source += 1
            elif target < len(after):
                right *= after[target]
                target += 1
            else:
                break
        while source < len(before) and before[source] == 1 and (target == len(after) or after[target] != 1):
            source += 1
        while target < len(after) and after[target] == 1 and (source == len(before) or before[source] != 1):
            target += 1
        found += _run_alike(before[first:source], after[begin:target], now[first:source], rows)
    return found


def _run_alike(before: list[int], after: list[int], now: list[int], rows: int) -> list[int]:
    was, size = math.prod(before), math.prod(now)
    if was == size:
        return list(after)
    if before == after:
        return list(now)
    grown = rows in now or size == was * rows  # or else the change is one of the side: heads of attention may be one
    if len(after) > 1 and 1 in after and size % rows == 0 and grown:
        place = after.index(1)
        rest = _run_alike(before, [*after[:place], *after[place + 1 :]], [size // rows], rows)
        return [*rest[:place], rows, *rest[place:]]
    for place, pair in enumerate(pairwise(after)):
        square, others = pair[0] == pair[1] > 1, was // (pair[0] * pair[1] or 1)
        side = math.isqrt(size // others) if others else 0
        if square and others * side**2 == size:  # tokens that become a square map again
            return [*after[:place], side, side, *after[place + 2 :]]
    for place, part in enumerate(after):
        others = was // part if part else 0
        if others and size % others == 0:
            return [*after[:place], size // others, *after[place + 1 :]]
    raise ConfigurationError(f"a Reshape makes {after} of {before}, and cannot do the like with {now}")
