"""Measures a model file without torch: its scores, its calibration, its time.

Everything goes through ONNX Runtime on one thread, on the file that is shipped.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import PixelArray, ScoreArray
from evenkeel.figures.estimates import share
from evenkeel.models.cards import Measured
from evenkeel.models.session import open_session

__all__ = [
    "LATENCY_ROUNDS",
    "ModelSession",
    "calibration_error",
    "fit_temperature",
    "interleaved_latencies_ms",
    "interleaved_times_ms",
    "reliability_table",
    "shuffled_groups",
    "timed_beside",
    "wilson",
]

LATENCY_ROUNDS = 200  # of a card
_MEASURED_AGAIN = 3  # times, where a pass seems to cost more than it may

_COLDEST, _HOTTEST = 0.02, 1e5  # temperatures; a card takes less than 1e6
_BINS = 15  # of confidence; as Guo et al. have it


@dataclass(frozen=True)
class ModelSession:
    """Holds a model file ready to run on one thread."""

    path: Path
    runtime: Any  # of ONNX Runtime

    @classmethod
    def open(cls, path: Path) -> "ModelSession":
        """Loads the model at `path`."""
        return cls(path, open_session(path))

    def __call__(self, images: PixelArray, batch: int = 100) -> ScoreArray:
        """Gives the scores of `images` [n, height, width, 3]."""
        parts = [images[place : place + batch] for place in range(0, len(images), batch)]
        return np.concatenate([np.asarray(self.runtime.run(["scores"], {"images": part})[0]) for part in parts])


def wilson(hits: int, count: int, how: str) -> Measured:
    """Gives the share `hits` / `count` with its 95 % Wilson score interval, as a card has it: five digits."""
    found = share(hits, count)
    return Measured(round(found.value, 5), round(found.low, 5), round(found.high, 5), count, how)


def fit_temperature(scores: ScoreArray, labels: NDArray[np.int64]) -> float:
    """Finds the temperature at which softmax(scores / temperature) gives `labels` the highest likelihood.

    `scores` [n, classes] must be of images that trained nothing. Source: Guo et al., ICML 2017, section 4.2.

    So many images show no more confidence than (n + 1) / (n + 2), which is Laplace's rule for n that are all right.
    Where they are, the likelihood alone would make every answer certain, however few they are; so the mean confidence
    is held below that.
    """

    def loss(temperature: float) -> float:
        scaled = scores.astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled).sum(axis=1))
        return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())

    # The loss has one minimum over the logarithm of the temperature, so a golden-section search finds it.
    spread = float((scores.max(axis=1) - scores.min(axis=1)).mean()) if len(scores) else 0.0
    low, high = math.log(_COLDEST), math.log(max(20.0, spread))
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(math.exp(left)) < loss(math.exp(right)):
            high = right
        else:
            low = left
    return float(f"{max(math.exp((low + high) / 2), _least_temperature(scores)):.5g}")


def _least_temperature(scores: ScoreArray) -> float:
    """Finds the temperature at which the mean confidence is the largest that so many rows can show."""
    largest = (len(scores) + 1) / (len(scores) + 2)
    tops = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)

    def mean_confidence(temperature: float) -> float:
        return float((1 / np.exp(tops / temperature).sum(axis=1)).mean())

    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    if mean_confidence(_COLDEST) <= largest:
        return _COLDEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if mean_confidence(math.exp(middle)) > largest else (low, middle)
    return math.exp(high)


def reliability_table(
    confidences: NDArray[np.floating], right: NDArray[np.floating] | NDArray[np.bool_], bins: int = _BINS
) -> tuple[tuple[float, float, int, float], ...]:
    """Gives rows `[confidence low, high, count, accuracy]` for equal steps of confidence, without empty ones.

    A confidence on a border belongs to the lower step. This is the form of `ModelCard.reliability`.
    """
    steps = _steps(confidences, bins)
    counts = np.bincount(steps, minlength=bins)
    hits = np.bincount(steps, weights=np.asarray(right, np.float64), minlength=bins)
    return tuple(
        (
            round(step / bins, 5),
            round((step + 1) / bins, 5),
            int(counts[step]),
            round(float(hits[step] / counts[step]), 5),
        )
        for step in np.flatnonzero(counts).tolist()
    )


def calibration_error(
    confidences: NDArray[np.floating], right: NDArray[np.floating] | NDArray[np.bool_], bins: int = _BINS
) -> float:
    """Gives the expected calibration error: how far accuracy is from mean confidence in `reliability_table`'s steps.

    NaN without any sample. Source: Guo et al., ICML 2017, section 2.
    """
    if not len(confidences):
        return math.nan
    gaps = np.bincount(_steps(confidences, bins), weights=np.asarray(right, np.float64) - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def _steps(confidences: NDArray[np.floating], bins: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(np.asarray(confidences, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)


def interleaved_times_ms(runs: Sequence[Callable[[], object]], rounds: int = 300) -> NDArray[np.float64]:
    """Gives ms `[rounds, runs]` of each of `runs`, called in turn, so that a disturbance strikes all of them alike.

    Processor time of the calling thread, in which a model on one thread does all its work: what else the machine does
    is not counted, and alone on its core it is the time on the clock. Each is called once before, untimed.
    """
    times = np.empty((rounds, len(runs)))
    for run in runs:
        run()
    for turn in range(rounds):
        for place, run in enumerate(runs):
            began = time.thread_time_ns()
            run()
            times[turn, place] = time.thread_time_ns() - began
    return times / 1e6


def interleaved_latencies_ms(runs: Sequence[Callable[[], object]], rounds: int = 300) -> list[float]:
    """Gives the median milliseconds of each of `runs`, from `interleaved_times_ms`."""
    return [float(value) for value in np.median(interleaved_times_ms(runs, rounds), axis=0)]


def timed_beside(runs: list[Callable[[], object]], cost: float) -> list[float]:
    """Measures the median ms of a classifier and of what is fitted to it.

    If the second seems to cost more than `cost` of the first, it takes the median of three measurements.
    """
    found = [interleaved_latencies_ms(runs, LATENCY_ROUNDS)]
    while found[0][1] > cost * found[0][0] and len(found) < _MEASURED_AGAIN:
        found.append(interleaved_latencies_ms(runs, LATENCY_ROUNDS))
    return sorted(found, key=lambda times: times[1] / times[0])[len(found) // 2]


def shuffled_groups(count: int, size: int, seed: int) -> NDArray[np.int64]:
    """Draws the images, of `count`, that stand in each group `[groups, size]`: one random permutation, classes mixed.

    No image is in two groups; what does not fill a group is left out.
    """
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // size * size].reshape(-1, size)
