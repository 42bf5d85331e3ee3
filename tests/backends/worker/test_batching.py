"""How many rows a model is given in one pass."""

import numpy as np
import pytest

from evenkeel.backends.worker.batching import with_batching
from evenkeel.backends.worker.model import Model


def measured(pass_s, max_batch=64, **fields):
    """What is found of a model whose pass of n rows takes `pass_s(n)` seconds on a clock of its own."""
    now = 0.0

    def run(rows):
        nonlocal now
        now += pass_s(len(rows))
        return rows

    model = Model("m", run, **{"input_shape": (2,), "dtype": "float32", **fields})
    return with_batching(model, max_batch, clock=lambda: now).batch


@pytest.mark.parametrize(
    ("pass_s", "batch"),
    [
        (lambda rows: 0.001 * rows, 1),  # nothing is gained
        (lambda rows: 0.001 + 0.00005 * rows, 32),  # a pass has a cost of its own
        (lambda rows: 0.001 * rows ** (1 / 3), 64),  # eight cost two; 64 cost four
        (lambda rows: 0.001, 64),
        (lambda rows: 0.001 if rows <= 8 else 1.0, 8),
        (lambda rows: 0.4, 1),  # too slow to be measured
    ],
)
def test_rows_are_doubled_as_long_as_a_row_gains(pass_s, batch):
    assert measured(pass_s) == batch


def test_what_is_forbidden_or_unknown_is_not_batched():
    assert measured(lambda rows: 0.001, max_batch=1) == 1
    assert measured(lambda rows: 0.001, max_batch=10) == 8
    assert measured(lambda rows: 0.001, input_shape=None) == 1
    assert measured(lambda rows: 0.001, dtype=None) == 1
    assert measured(lambda rows: 0.001, one_by_one=True) == 1


def test_a_model_that_fails_on_several_rows_gets_one_at_a_time():
    def run(rows):
        if len(rows) > 2:
            raise MemoryError
        return rows

    times = iter(np.arange(0, 100) * 1e-3)
    assert with_batching(Model("m", run, (2,), dtype="float32"), clock=lambda: next(times)).batch == 2
