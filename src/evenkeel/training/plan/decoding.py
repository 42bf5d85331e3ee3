"""Computes how probably a code decodes when devices are away at random: small losses counted, larger ones drawn."""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear import LinearCode
from evenkeel.figures.estimates import Estimate, exact_share

__all__ = ["Decodability", "alive_sets", "decodability"]

_NEGLIGIBLE = 1e-9  # probability of larger losses that are not looked at, and count as not decoded


@dataclass(frozen=True)
class Decodability:
    """Says how probably, and how well, a code decodes.

    Attributes:
        probability: that all can be computed. Its interval is 95 % and covers the part that was drawn; it is a point
            where all was counted.
        counted: losses of up to so many devices were all looked at.
        tolerance: every loss of up to so many devices decodes; at most `counted`.
        condition_median: of the sets of devices that decode.
        condition_p99: the same, of the worst hundredth the mildest.
    """

    probability: Estimate
    counted: int
    tolerance: int
    condition_median: float
    condition_p99: float


def decodability(
    code: LinearCode, absence: float, *, patterns: int = 20_000, draws: int = 10_000, seed: int = 0
) -> Decodability:
    """Computes how probably a code decodes where each device is away independently of the others.

    Args:
        code: which.
        absence: probability of each device to be away, 0 or more and below 1.
        patterns: losses are counted by size, the small ones first, as long as there are no more than so many.
        draws: how many of the larger losses are drawn.
        seed: of the draws.
    """
    devices = code.devices
    chances = [comb(devices, size) * absence**size * (1 - absence) ** (devices - size) for size in range(devices + 1)]
    value, counted, tolerance = 0.0, -1, -1
    weights: list[FloatArray] = []
    conditions: list[FloatArray] = []
    while counted < devices and comb(devices, counted + 1) <= patterns:
        counted += 1
        patterns -= comb(devices, counted)
        lost = np.array(list(combinations(range(devices), counted)), np.int64)
        alive = np.ones((len(lost), devices), bool)
        np.put_along_axis(alive, lost.reshape(len(lost), counted), False, axis=1)
        found = code.conditions(alive)
        decoded = float(np.isfinite(found).mean())
        value += chances[counted] * decoded
        tolerance += decoded == 1.0 and tolerance == counted - 1
        conditions.append(found)
        weights.append(np.full(len(found), chances[counted] / len(found)))
    low = high = value
    rest = sum(chances[counted + 1 :])
    if rest > _NEGLIGIBLE and draws:
        alive = _larger_losses(devices, chances, counted, draws, np.random.default_rng(seed))
        found = code.conditions(alive)
        share = exact_share(int(np.isfinite(found).sum()), draws)
        low, value, high = low + rest * share.low, value + rest * share.value, high + rest * share.high
        conditions.append(found)
        weights.append(np.full(len(found), rest / draws))
    else:
        high += rest
    median, p99 = _quantiles(np.concatenate(conditions), np.concatenate(weights))
    return Decodability(Estimate(value, low, min(high, 1.0)), counted, tolerance, median, p99)


def alive_sets(devices: int, absence: float, draws: int, seed: int = 0) -> Array:
    """Draws sets of devices that are there, truth values `[draws, devices]`."""
    there: Array = np.random.default_rng(seed).random((draws, devices)) >= absence
    return there


def _larger_losses(devices: int, chances: list[float], counted: int, draws: int, random: np.random.Generator) -> Array:
    """Draws sets of which more than `counted` devices are away."""
    larger = np.array(chances[counted + 1 :])
    sizes = counted + 1 + random.choice(len(larger), size=draws, p=larger / larger.sum())
    ranks = random.random((draws, devices)).argsort(axis=1).argsort(axis=1)
    alive: Array = ranks >= sizes[:, None]
    return alive


def _quantiles(conditions: FloatArray, weights: FloatArray) -> tuple[float, float]:
    """Gives the median and the 99th percentile of the finite conditions, each as probable as its weight says."""
    order = np.argsort(conditions)
    finite = order[np.isfinite(conditions[order])]
    if not finite.size:
        return np.inf, np.inf
    shares = np.cumsum(weights[finite])
    places = np.searchsorted(shares, [0.5 * shares[-1], 0.99 * shares[-1]])
    median, p99 = conditions[finite[np.minimum(places, len(finite) - 1)]]
    return float(median), float(p99)
