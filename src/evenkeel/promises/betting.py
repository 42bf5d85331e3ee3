"""Tests means by betting: the wealth of a bettor against a claim grows only where the claim is wrong.

A bettor who starts with 1 and plays games that are fair, or worse, while the claim holds ever reaches 1 / delta with
probability `delta` at most (Ville). So the claim may be tested after every sample, and the test stopped at any time.
Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting.
"""

from math import exp, log

__all__ = ["RateTest"]

_MAX_BET = 0.75  # of the way to the rate 1
_RATIOS = (1.2, 1.5, 2.0, 3.0, 6.0)  # of the true rate to the claimed one, that a rate's test looks for


class RateTest:
    """Watches the claim that a rate is at most `rate`, sample by sample, and says when it is shown to be wrong.

    Args:
        rate: that is claimed, above 0 and below 1.
        false_alarm: probability that it ever gives an alarm although the claim holds.
    """

    def __init__(self, rate: float, false_alarm: float = 0.01) -> None:
        self.rate = rate
        self.samples = 0
        self.hits = 0
        self._limit = log(1 / false_alarm)
        # Against the rate q: a hit multiplies the wealth by q / rate, a miss by (1 - q) / (1 - rate); at most even.
        rivals = [rate + (1 - rate) * min(_MAX_BET, (ratio - 1) * rate / (1 - rate)) for ratio in _RATIOS]
        self._hit = [log(rival / rate) for rival in rivals]
        self._miss = [log((1 - rival) / (1 - rate)) for rival in rivals]
        self._logs = [0.0] * len(rivals)
        self.max_log_wealth = 0.0

    def add(self, hit: bool) -> bool:
        """Takes a sample into account; gives True from the moment on when the claim is shown to be wrong."""
        self.samples += 1
        self.hits += hit
        steps = self._hit if hit else self._miss
        self._logs = logs = [one + step for one, step in zip(self._logs, steps, strict=True)]
        if hit:  # wealth only grows with a hit
            largest = max(logs)
            now = largest + log(sum([exp(one - largest) for one in logs]) / len(logs))
            self.max_log_wealth = max(self.max_log_wealth, now)
        return self.max_log_wealth >= self._limit

    @property
    def alarm(self) -> bool:
        """Tells whether the claim was shown to be wrong."""
        return self.max_log_wealth >= self._limit
