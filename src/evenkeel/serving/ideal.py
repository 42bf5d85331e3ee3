"""Bounds what any policy could reach that knows every draw in advance: no queues, the same budgets."""

import numpy as np

from evenkeel.delays.laws import Delay, attempt_key
from evenkeel.errors import ConfigurationError

__all__ = ["ideal_quantile"]


def ideal_quantile(
    delay: Delay, quantile: float, *, hedges: float, approximate: float, fill_cost: float = 1.0, items: int = 20_000
) -> float:
    """Gives the seconds below which no policy with these budgets can bring the quantile.

    It knows how long an item's first attempt, a further one, and a backup's pass would take, begins all of them at
    once, and never waits for a worker. Within the budgets it helps those items that need it. So it is a bound and not
    a policy: a real one learns that an item is late only when it is.

    Args:
        delay: the law of task times; workers are alike.
        quantile: of the latency, such as .99.
        hedges: further attempts as a share of the items.
        approximate: answers of backups as a share of the items.
        fill_cost: of a backup's pass, relative to a replica's.
        items: how many are drawn.
    """
    if not 0 < quantile < 1:
        raise ConfigurationError(f"quantile: must be between 0 and 1, found {quantile:g}")
    first, again, fill = (
        np.array([delay.draw(attempt_key(number, attempt), 0, 0.0) for number in range(items)]) for attempt in (0, 1, 2)
    )
    fill = fill * fill_cost
    allowed = int((1 - quantile) * items)

    def reaches(limit_s: float) -> bool:
        """Tells whether all but the allowed number of items can be answered by then."""
        late = first > limit_s
        by_hedge, by_fill = late & (again <= limit_s), late & (fill <= limit_s)
        both = int((by_hedge & by_fill).sum())
        room_h, room_f = hedges * items, approximate * items
        only_h = min(float(by_hedge.sum() - both), room_h)
        only_f = min(float(by_fill.sum() - both), room_f)
        helped = only_h + only_f + min(float(both), room_h - only_h + room_f - only_f)
        return float(late.sum()) - helped <= allowed

    times = np.sort(np.concatenate([first, again, fill]))
    low, high = 0, len(times) - 1
    while low < high:  # the least time that is enough
        middle = (low + high) // 2
        if reaches(float(times[middle])):
            high = middle
        else:
            low = middle + 1
    return float(times[low])
