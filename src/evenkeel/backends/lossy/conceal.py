"""Fills the holes of an image that came in part, from the pixels beside them."""

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import FloatArray, IntegerArray, PixelArray

__all__ = ["conceal"]


def conceal(pixels: PixelArray, known: NDArray[np.bool_], side: int) -> None:
    """Replaces, in place, the pixels of unknown blocks.

    A pixel becomes the mean of the next known ones above, below, left and right, each weighted by 1 / its distance: on
    a line through the hole that is linear interpolation. Where none of the four is known it becomes the mean of all
    that are; where nothing is, it stays as it is.

    Args:
        pixels: uint8 `[height, width, 3]`.
        known: which blocks are, `[rows, columns]`.
        side: of a block, in pixels.
    """
    if known.all() or not known.any():
        return
    height, width = pixels.shape[:2]
    missing_rows, missing_columns = np.nonzero(~known)
    total = np.zeros((len(missing_rows), side, side, 3))
    weights = np.zeros((len(missing_rows), side, side, 1))
    steps = np.arange(side, dtype=np.float64)
    above, below = _nearest(known)
    left, right = (one.T for one in _nearest(known.T))
    ys = np.minimum(missing_rows[:, None] * side + np.arange(side), height - 1)
    xs = np.minimum(missing_columns[:, None] * side + np.arange(side), width - 1)

    def add(found: IntegerArray, values: FloatArray, distances: FloatArray) -> None:
        weight = np.where(found[:, None, None] >= 0, 1.0 / distances, 0.0)[..., None]
        np.add(total, weight * values, out=total)
        np.add(weights, weight, out=weights)

    here = missing_rows, missing_columns
    for nearest, first in ((above[here], False), (below[here], True)):
        edge = np.clip(nearest * side + (0 if first else side - 1), 0, height - 1)
        away = ((nearest - missing_rows) * side)[:, None] - steps if first else (
            ((missing_rows - nearest) * side - side)[:, None] + steps + 1
        )  # fmt: skip
        values = pixels[edge[:, None], xs].astype(np.float64)[:, None]
        add(nearest, values, np.maximum(away, 1.0)[:, :, None])
    for nearest, first in ((left[here], False), (right[here], True)):
        edge = np.clip(nearest * side + (0 if first else side - 1), 0, width - 1)
        away = ((nearest - missing_columns) * side)[:, None] - steps if first else (
            ((missing_columns - nearest) * side - side)[:, None] + steps + 1
        )  # fmt: skip
        values = pixels[ys, edge[:, None]].astype(np.float64)[:, :, None]
        add(nearest, values, np.maximum(away, 1.0)[:, None, :])
    all_known = np.repeat(np.repeat(known, side, 0), side, 1)[:height, :width]
    fallback = pixels[all_known].mean(axis=0)
    filled = np.where(weights > 0, total / np.where(weights > 0, weights, 1.0), fallback)
    filled = np.rint(filled).astype(np.uint8)
    padded = np.zeros((known.shape[0] * side, known.shape[1] * side, 3), np.uint8)
    blocks = padded.reshape(known.shape[0], side, known.shape[1], side, 3)
    blocks[missing_rows, :, missing_columns] = filled
    np.copyto(pixels, padded[:height, :width], where=~all_known[..., None])


def _nearest(known: NDArray[np.bool_]) -> tuple[IntegerArray, IntegerArray]:
    """Gives the next known row above and below each block, -1 for none."""
    numbers = np.arange(len(known))[:, None]
    above = np.maximum.accumulate(np.where(known, numbers, -1), axis=0)
    below = np.minimum.accumulate(np.where(known, numbers, len(known))[::-1], axis=0)[::-1]
    return above, np.where(below == len(known), -1, below)
