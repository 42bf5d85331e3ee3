"""Gives fragments their priority: ESA's three factors, measured by the host, on a logarithmic scale of 8 bits.

A fragment is urgent if its job is nearly done, if its job waits for the network more than it computes, and if its layer
is needed soon: the first layers' gradients come last and are needed first in the next step. The score is

    (1 / remaining) * (communication / computation) * (1 / layer)

and the priority 128 + 16 log2(score / reference), from 1 to 255: 16 points are a factor of two, and the scale spans
2**16. A linear scale of 8 bits would lose everything, as remaining times alone span a factor of 10,000. All hosts of a
switch use one reference. The workers of a job should stamp one priority on a fragment; a slot takes the largest.
"""

import math
from collections import deque
from dataclasses import dataclass

from evenkeel.errors import ConfigurationError

__all__ = ["LEAST", "MOST", "JobClock", "PriorityMeter", "Urgency", "priority"]

LEAST, MOST = 1, 255
_MIDDLE = 128
_PER_DOUBLING = 16
_REFERENCE = 1 / 3600  # a job with an hour left that communicates as long as it computes; per second
_STEPS = 32  # that measurements are means of


@dataclass(frozen=True, slots=True)
class Urgency:
    """Holds what is measured of a job.

    Attributes:
        remaining_s: time until it is done; where that is not known, the time taken so far (least attained service).
        communication_s: of a step.
        computation_s: of a step.
    """

    remaining_s: float
    communication_s: float
    computation_s: float


def priority(urgency: Urgency, layer: int = 1, reference_per_s: float = _REFERENCE) -> int:
    """Gives a fragment's priority.

    Args:
        urgency: of its job.
        layer: that it belongs to, counted from the input, from 1 on.
        reference_per_s: score in the middle of the scale, the same for all jobs of a switch.

    Raises:
        ConfigurationError: a number that no job or layer has.
    """
    if layer < 1:
        raise ConfigurationError(f"layer: counts from 1, found {layer}")
    values = (urgency.remaining_s, urgency.communication_s, urgency.computation_s, reference_per_s)
    if not all(math.isfinite(value) and value >= 0 for value in values) or reference_per_s == 0:
        raise ConfigurationError(f"urgency: times must be finite and not negative, found {urgency}")
    if urgency.communication_s == 0:
        return LEAST  # whoever does not communicate waits for nobody
    if urgency.computation_s == 0 or urgency.remaining_s == 0:
        return MOST
    score = math.log2(urgency.communication_s / urgency.computation_s)
    score -= math.log2(urgency.remaining_s) + math.log2(layer) + math.log2(reference_per_s)
    return min(max(round(_MIDDLE + _PER_DOUBLING * score), LEAST), MOST)


class JobClock:
    """Measures a job's urgency from its steps: how long they are, how much of them is communication, how many are left.

    Args:
        steps: of the whole training; None where that is not known.
    """

    def __init__(self, steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise ConfigurationError(f"steps: must be at least 1, found {steps}")
        self._steps = steps
        self._done = 0
        self._taken_s = 0.0
        self._latest: deque[tuple[float, float]] = deque(maxlen=_STEPS)

    def step(self, communication_s: float, computation_s: float) -> None:
        """Takes note of one step.

        Raises:
            ConfigurationError: a time that is negative or not finite.
        """
        if not all(math.isfinite(value) and value >= 0 for value in (communication_s, computation_s)):
            raise ConfigurationError(f"step: times must be finite, found {communication_s} and {computation_s}")
        self._done += 1
        self._taken_s += communication_s + computation_s
        self._latest.append((communication_s, computation_s))

    @property
    def urgency(self) -> Urgency | None:
        """Gives what has been measured; None before the first step."""
        if not self._latest:
            return None
        communication, computation = (sum(times) / len(self._latest) for times in zip(*self._latest, strict=True))
        if self._steps is None:
            return Urgency(self._taken_s, communication, computation)
        left = max(self._steps - self._done, 0)
        return Urgency(left * (communication + computation), communication, computation)


class PriorityMeter:
    """Gives each exchange of a training its priority, from what was measured in the steps before.

    Gradients of the last layers are exchanged first. So the layer of a step's n-th exchange is counted from the end: of
    as many as the step before had. An exchange lasts until its last worker is there: where workers are uneven, the
    quick ones measure more communication than the slow ones, and slots take the largest of their priorities.

    Args:
        steps: of the whole training; None where that is not known.
    """

    def __init__(self, steps: int | None = None) -> None:
        self._clock = JobClock(steps)
        self._step: int | None = None
        self._began_s = self._exchanging_s = 0.0
        self._exchanges = self._exchanges_before = 0

    def begin(self, step: int, now_s: float) -> int:
        """Gives the priority of an exchange that begins.

        Args:
            step: number of the training step that it belongs to.
            now_s: the time.
        """
        if step != self._step:
            if self._step is not None:
                whole_s = max(now_s - self._began_s, 0.0)
                communication_s = min(self._exchanging_s, whole_s)
                self._clock.step(communication_s, whole_s - communication_s)
            self._step, self._began_s, self._exchanging_s = step, now_s, 0.0
            self._exchanges_before, self._exchanges = self._exchanges, 0
        layer = max(self._exchanges_before - self._exchanges, 1)
        self._exchanges += 1
        urgency = self._clock.urgency
        return _MIDDLE if urgency is None else priority(urgency, layer)

    def end(self, took_s: float) -> None:
        """Takes note of how long an exchange lasted."""
        self._exchanging_s += max(took_s, 0.0)
