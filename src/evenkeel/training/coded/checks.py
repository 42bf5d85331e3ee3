"""Finds out whether what devices send fits their data and the code, and which device is at fault.

Two checks cost no device anything. Each gradient is compared with two products that are known already: for a block `X`
that was given `u` and sent `g = X' u`, `g . p` must be `u . (X p)` for a random vector `p` that was multiplied once,
when training began, and `g . w` must be `u . (X w)`, the products of this very round. A wrong product, or a wrong
gradient, fits both only by chance. The second is the code's own: where more blocks replied than are needed, their
products must fit each other.

They find faults, of memory, files and links. They are no proof against a device that means to deceive: it knows `p`.
"""

from collections.abc import Mapping
from math import sqrt

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.training.coded.layout import BlockLayout

__all__ = ["GradientCheck", "misfit", "padded", "picked", "suspects"]

_ROUNDINGS = 200.0  # how many roundings of the largest intermediate a sum may be off; a fault is far larger


class GradientCheck:
    """Compares gradients with products that are known.

    Args:
        probe: the random vector `p`, one number a column.
        probed: of each block, its product with `p`.
        precision: smallest relative difference of the devices' numbers.
    """

    def __init__(self, probe: FloatArray, probed: Mapping[str, Array], precision: float) -> None:
        self.probe, self.probed, self._precision = probe, probed, precision
        self._probe_norm = float(np.linalg.norm(probe))

    def complaint(
        self,
        gradient: Array,
        given: Mapping[str, FloatArray],
        products: Mapping[str, Array],
        weights: FloatArray,
        rows: Array | None = None,
    ) -> str:
        """Says what is wrong with a gradient; empty where it fits.

        Args:
            gradient: that a device sent.
            given: of each of its blocks, what the block was multiplied with.
            products: of these blocks with `weights`.
            weights: of this round.
            rows: of a mini-batch.
        """
        wanted_p = wanted_w = scale_p = scale_w = 0.0
        weights_norm, gradient_norm = _length(weights), _length(gradient)
        for block, vector in given.items():
            probed = picked(self.probed[block], rows)
            product = products[block]
            wanted_p += float(vector @ probed)
            wanted_w += float(vector @ product)
            length, spread = _length(vector), _length(probed)
            scale_p += length * spread
            scale_w += length * (_length(product) + spread * weights_norm)
        for name, found, wanted, scale in (
            ("the probe", float(gradient @ self.probe), wanted_p, scale_p + gradient_norm * self._probe_norm),
            ("its products", float(gradient @ weights), wanted_w, scale_w + gradient_norm * weights_norm),
        ):
            if not abs(found - wanted) <= _ROUNDINGS * self._precision * scale:
                return f"its gradient does not fit {name}: {found:.6g} instead of {wanted:.6g}"
        return ""


def _length(values: Array) -> float:
    """Gives the norm, several times quicker than numpy's function for any axis and order."""
    return sqrt(float(np.dot(values, values)))


def misfit(layout: BlockLayout, products: Mapping[str, Array]) -> float:
    """Gives how badly products of blocks fit the code, relative to their size; 0 where nothing can be compared."""
    partitions, sums = layout.partitions, [block for block in layout.sums if block in products]
    lost = [place for place, block in enumerate(partitions) if block not in products]
    if len(sums) <= 0:
        return 0.0
    length = max(map(len, products.values()))
    rows = np.array([layout.parity[layout.place[block] - len(partitions)] for block in sums])
    rest = np.array([padded(products[block], length) for block in sums])
    scale = np.linalg.norm(rest, axis=1)
    for place, block in enumerate(partitions):
        touched = np.flatnonzero(rows[:, place])
        if block in products and len(touched):
            product = padded(products[block], length)
            rest[touched] -= np.outer(rows[touched, place], product)
            scale[touched] += np.abs(rows[touched, place]) * np.linalg.norm(product)
    if lost:  # what the lost ones can explain is taken out
        left, sizes, _ = np.linalg.svd(rows[:, lost])
        rank = int((sizes > 1e-9 * sizes.max(initial=1.0)).sum())
        rest = left[:, rank:].T @ rest
        if not len(rest):
            return 0.0
    return float(np.linalg.norm(rest) / max(float(scale.max()), 1e-300))


def suspects(layout: BlockLayout, products: Mapping[str, Array], precision: float) -> list[str] | None:
    """Names the devices any one of which, if it alone is at fault, explains that products do not fit the code.

    Returns:
        None where they fit; no device where no single one explains it.
    """
    bound = _ROUNDINGS * precision
    if misfit(layout, products) <= bound:
        return None
    found = []
    for device in sorted({layout.holders[block] for block in products}):
        others = {block: product for block, product in products.items() if layout.holders[block] != device}
        if misfit(layout, others) <= bound:
            found.append(device)
    return found


def padded(values: Array, length: int) -> FloatArray:
    """Gives the values in float64, with zeros up to a length."""
    result = np.zeros(length)
    result[: len(values)] = values
    return result


def picked(values: Array, rows: Array | None) -> Array:
    """Gives the values of a mini-batch; rows beyond the last are zero. All without rows."""
    if rows is None:
        return values
    there = rows < len(values)
    chosen: Array = np.where(there, values[np.minimum(rows, len(values) - 1)], 0.0)
    return chosen
