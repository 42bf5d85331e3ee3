"""Says which devices are away or slow in each round, and how long their tasks take: the same for all codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.delays.laws import Delay, attempt_key

__all__ = ["BIASES", "SLOWNESS", "DeviceFleet", "FleetSettings", "TaskTimes"]

Bias = Literal["random", "biased", "permanent"]
Slowness = Literal["persistent", "per-task"]
BIASES: tuple[Bias, ...] = ("random", "biased", "permanent")
SLOWNESS: tuple[Slowness, ...] = ("persistent", "per-task")

_MAX_DEVICES = 4096  # extra ones included; a number for each in every round
_BIASED = 0.8  # share of the rounds in which devices of one class are away, where absence is biased
_LEAVE = (0.1, 0.2, 0.3)  # of all rounds: when one device each leaves for good
_STREAMS = 1 << 32


@dataclass(frozen=True)
class FleetSettings:
    """Holds how devices behave.

    Attributes:
        absence: probability of a device to be away in a round.
        bias: `random`; `biased`: devices that hold the rarer class are away in 80 % of the rounds; `permanent`: three
            of those leave for good, one after the other.
        slowness: `persistent`: a device is slow in all tasks of a round or in none; `per-task`: each task is drawn.
        law: of task times; what counts is how many times its median a draw is.
        away: how many times the usual a task takes on a device that is away; who waits for all waits so long.
    """

    absence: float
    bias: Bias
    slowness: Slowness
    law: Delay
    away: float = 20.0


@dataclass(frozen=True)
class TaskTimes:
    """Holds how long parts of a task take on a device that is not slow, in seconds."""

    product_s: float  # a partition times a vector
    transpose_s: float  # its transpose times a vector
    latency_s: float  # of sending the task and its reply
    number_s: float  # of sending one number, either way

    def task_s(self, products: float, transposes: float, numbers: float) -> float:
        """Gives the time of a task that computes so much, and moves so many numbers."""
        return self.latency_s + products * self.product_s + transposes * self.transpose_s + numbers * self.number_s


class DeviceFleet:
    """Draws what happens in each round, by hashing: whatever is asked, in whatever order, the answer is the same.

    Args:
        settings: how devices behave.
        one_class: numbers of the devices that hold the rarer class.
        rounds: of training.
        seed: of all draws.
    """

    def __init__(self, settings: FleetSettings, one_class: Sequence[int], rounds: int, seed: int = 0) -> None:
        self.settings = settings
        self.one_class = tuple(one_class)
        self.seed = seed
        usual = median(settings.law.draw(-1 - key, 0, 0.0) for key in range(999))
        self._usual = usual if usual > 0 else 1.0
        leaving = self.one_class[: len(_LEAVE)] if settings.bias == "permanent" else ()
        self._leaves = {max(1, round(share * rounds)): device for share, device in zip(_LEAVE, leaving, strict=False)}

    def leaving(self, number: int) -> tuple[int, ...]:
        """Names the devices that leave for good in a round."""
        return (self._leaves[number],) if number in self._leaves else ()

    def left(self, number: int) -> tuple[int, ...]:
        """Names the devices that have left in this round or an earlier one."""
        return tuple(device for when, device in self._leaves.items() if when <= number)

    def away(self, number: int, devices: int) -> Array:
        """Tells for each of so many devices whether it is away in a round; those that have left are not counted."""
        chances = np.full(devices, self.settings.absence)
        if self.settings.bias == "biased":
            chances[list(self.one_class)] = _BIASED
        draws = np.random.default_rng([self.seed, number]).random(_MAX_DEVICES)[:devices]
        away: Array = draws < chances
        away[list(self.leaving(number))] = True  # who is to take their places comes in the next round
        return away

    def factors(self, number: int, devices: int, attempt: int = 0) -> FloatArray:
        """Gives how many times the usual each device's task takes in a round.

        Args:
            number: of the round.
            devices: how many there are.
            attempt: 0, 1, ... for the tasks that a device gets one after the other.
        """
        part = attempt if self.settings.slowness == "per-task" else 0
        law, seed = self.settings.law, self.seed * _STREAMS
        keys = [seed + number * _MAX_DEVICES + device for device in range(devices)]
        drawn = np.array([law.draw(attempt_key(key, part), place, float(number)) for place, key in enumerate(keys)])
        return np.where(self.away(number, devices), self.settings.away, np.maximum(drawn, 0.0) / self._usual)
