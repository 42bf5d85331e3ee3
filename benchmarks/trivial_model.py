"""Models that cost almost nothing, so that what is measured is everything else: x[3072] @ W[3072, 10]."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "COSTS", "Trivial", "make", "make_batchable", "make_collage_2x2", "make_collage_3x3", "weights"]

CLASSES = 10
# Grid -> cost of a pass relative to the classifier's, about as the shipped Collage-CNNs have it. It scales injected
# delays and nothing else.
COSTS = {2: 0.25, 3: 0.5}
_READ = 3072  # values of a row that are used, so that a long row costs no more arithmetic than a short one


def weights() -> NDArray[np.float32]:
    """The same `[3072, 10]` in every process and under every version of numpy."""
    return np.random.default_rng(0).standard_normal((_READ, CLASSES), dtype=np.float32)


class Trivial:
    """A function from rows of at least 3072 values, of any shape, to `[rows, 10]` float32."""

    def __init__(self) -> None:
        self._weights = weights()

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        flat = rows.reshape(len(rows), -1)[:, :_READ]
        scores: NDArray[Any] = flat.astype(np.float32) @ self._weights
        return scores


class TrivialCollage:
    """The same on each cell of a canvas `[rows, side, side, 3]`: `[rows, grid * grid, 10]`.

    With tiles as large as the items a fill is then the exact answer, up to the order of the sums.
    """

    def __init__(self, grid: int) -> None:
        self.relative_cost = COSTS[grid]
        self._grid = grid
        self._one = Trivial()

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        grid, side = self._grid, rows.shape[1] // self._grid
        cells = rows.reshape(-1, grid, side, grid, side, 3).swapaxes(2, 3).reshape(-1, side * side * 3)
        return self._one(cells).reshape(len(rows), grid * grid, CLASSES)


def make() -> Trivial:
    return Trivial()


class Batchable(Trivial):
    """The same as on an accelerator: waits 4 ms for one row, 8 ms for eight."""

    input_shape, dtype = (32, 32, 3), "uint8"

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        time.sleep(0.004 * (1 + (len(rows) - 1) / 7))
        return super().__call__(rows)


def make_batchable() -> Batchable:
    return Batchable()


def make_collage_2x2() -> TrivialCollage:
    return TrivialCollage(2)


def make_collage_3x3() -> TrivialCollage:
    return TrivialCollage(3)
