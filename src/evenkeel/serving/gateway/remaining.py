"""Estimates how much of a service time is left when a part of it has passed."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["Remaining"]

_NEVER = float("inf")
_FEW = 0.05  # of the samples: an age that fewer reach is too late to wait for, whatever is gained there


class Remaining:
    """Holds the mean excess of a sample of service times: what those beyond t exceed t by, in the mean.

    It falls where every time is near to the others, rises before a slow mode, and rises for ever in a heavy tail. So
    it says when another attempt, which takes about a median, is worth more than waiting on, and for which item most.

    Args:
        ordered: the samples, seconds, ascending; only the upper quarter is looked at.
    """

    def __init__(self, ordered: Sequence[float]) -> None:
        count = len(ordered)
        self._fresh_s = ordered[count // 2]
        self._upper = ordered[count * 3 // 4 :]
        self._totals = [0.0, *accumulate(reversed(self._upper))]  # of the n longest
        self._few = max(1, int(_FEW * count))

    def left_s(self, age_s: float) -> float:
        """Gives the seconds that an item of this age is expected to go on; its age again if no sample was as long."""
        count = len(self._upper) - bisect_right(self._upper, age_s)
        return self._totals[count] / count - age_s if count else age_s

    def pays(self, age_s: float) -> bool:
        """Tells whether another attempt is expected to be quicker than waiting on."""
        return self.left_s(age_s) >= self._fresh_s

    def first_paying_s(self, from_s: float) -> float:
        """Gives the first age from there on at which another attempt pays; infinite if at none."""
        if self.pays(from_s):
            return from_s
        start = bisect_right(self._upper, from_s)
        return next((age_s for age_s in self._upper[start:-1] if self.pays(age_s)), _NEVER)

    def most_s(self, from_s: float) -> float:
        """Gives the age from there on at which most is left, and another attempt gains most."""
        ages = [age_s for age_s in self._upper[: len(self._upper) - self._few] if age_s > from_s]
        return max([from_s, *ages], key=self.left_s)
