"""Measures how many rows a model should take in one pass."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from evenkeel.backends.worker.model import Model

__all__ = ["MAX_BATCH", "with_batching"]

MAX_BATCH = 64
_GAIN = 0.8  # a further doubling must bring the time of a row below this share of what it was
_LONGEST = 4.0  # a pass may take this many times as long as one of a single row: nobody waits longer because of others
_BUDGET_S = 1.0  # for measuring; a model whose single pass takes longer is not measured
_TIMES = 3


def with_batching(model: Model, max_batch: int = MAX_BATCH, clock: Callable[[], float] = time.perf_counter) -> Model:
    """Gives the model with the number of rows that one pass should take at most.

    Doubles the rows as long as a row gains by it. Most networks on one thread of a processor gain nothing; on a GPU,
    or where a pass has a large cost of its own, they do. Nothing is measured of a model of unknown shape.

    Args:
        model: to be measured; it is run on zeros.
        max_batch: at most so many; 1 leaves every task a pass of its own.
        clock: in seconds.
    """
    if model.input_shape is None or model.dtype is None or model.one_by_one:
        return model
    ends_at = clock() + _BUDGET_S
    single_s = last_s = _pass_s(model, 1, clock)
    rows = 1
    while rows * 2 <= max_batch and clock() + 2 * _TIMES * last_s < ends_at:
        pass_s = _pass_s(model, rows * 2, clock)
        if pass_s / 2 > _GAIN * last_s or pass_s > _LONGEST * single_s:
            break
        rows, last_s = rows * 2, pass_s
    return replace(model, batch=rows)


def _pass_s(model: Model, rows: int, clock: Callable[[], float]) -> float:
    """Times a pass, the shortest of a few."""
    zeros = np.zeros((rows, *(model.input_shape or ())), model.dtype)
    times = []
    for _ in range(_TIMES):
        began = clock()
        try:
            model.run(zeros)
        except Exception:  # it cannot take so many rows, whatever it says of it
            return float("inf")
        times.append(clock() - began)
    return min(times)
