"""Says who answers: seven policies over recorded answers, calibrated again and again on draws of a known population."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray, PixelArray
from evenkeel.coding.answers.by_name import CollageSettings, OwnModel
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.edge.both_models import answers_of_accurate, answers_of_collage
from evenkeel.figures.estimates import exact_share
from evenkeel.models.cards import load_card
from evenkeel.models.session import open_session
from evenkeel.models.shipped import card_path, model_path
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Curve, Pairs, certify, naive, sequence

__all__ = ["ACCURATE", "LIGHT", "Variant", "first_certified", "light_answers", "policies", "read_variants"]

LIGHT, ACCURATE = "cifar10-collage-2x2", "cifar10-base"
_VARIANTS = ("cifar10-collage-4x4", "cifar10-collage-3x3", LIGHT, ACCURATE)
_TUNING = 0.25  # pairs to tune with, for each one to calibrate with
_GRID = 400
_LOADS = 3
_TRIES = 20


@dataclass(frozen=True)
class Variant:
    """Holds one of the models that a request may be answered by.

    Attributes:
        name: of the model.
        right: whether it answers each image rightly, [n].
        sure: how sure it is, [n].
        pass_s: of one image.
        load_s: until a model that is not in memory can answer.
        bytes: of its file.
    """

    name: str
    right: Array
    sure: FloatArray
    pass_s: float
    load_s: float
    bytes: int


def light_answers(pixels: PixelArray, name: str = LIGHT, seed: int = 0) -> tuple[FloatArray, Array]:
    """Gives how sure a shipped Collage-CNN is of each image, [n], and the classes that it answers, [n]."""
    base, card = load_card(card_path(ACCURATE)), load_card(card_path(name))
    code = CollageSettings().code(OwnModel(base.name, ScoreForm.from_card(base), base.layout), card)
    assert isinstance(code, Collage)
    sure, classes = answers_of_collage(code, card, card_path(name).parent, pixels, True, seed, 1, lambda done: None)
    return sure[:, 0], classes


def read_variants(pixels: PixelArray, labels: Array) -> list[Variant]:
    """Has all shipped models answer the images, from the cheapest to the most accurate."""
    found = []
    for name in _VARIANTS:
        card, path = load_card(card_path(name)), model_path(name)
        if name == ACCURATE:
            classes, sure = answers_of_accurate(card_path(name), pixels, 1, lambda done: None), np.ones(len(pixels))
        else:
            sure, classes = light_answers(pixels, name)
        pass_s = (card.latency_ms or 0.0) / 1e3 / (card.cells if card.kind == "collage" else 1)
        found.append(Variant(name, classes == labels, sure, pass_s, _load_s(path), path.stat().st_size))
    return found


def _load_s(path: Path) -> float:
    times = []
    for _ in range(_LOADS):
        began_s = time.perf_counter()
        open_session(path, 1)
        times.append(time.perf_counter() - began_s)
    return min(times)


def first_certified(light: Variant, accurate: Variant, level: float, n: int, seed: int = 0) -> float:
    """Gives the threshold of the first calibration that certifies an accuracy; `NEVER` if none of many does."""
    whole, promise = _pairs(light, accurate), Promise("min_accuracy", level, 0.95)
    chance = np.random.default_rng(seed)
    for _ in range(_TRIES):
        places = _drawn(chance, len(whole), n)
        tuning, calibration = whole.take(places[n:]), whole.take(places[:n])
        threshold = certify(calibration, sequence(tuning, promise), promise, tuning=tuning).threshold
        if threshold is not None:
            return threshold
    return NEVER


def _pairs(light: Variant, accurate: Variant) -> Pairs:
    # Where both are wrong it makes no difference to an accuracy whether they agree.
    return Pairs(light.sure, light.right == accurate.right, light.right, accurate.right)


def _drawn(chance: np.random.Generator, population: int, n: int) -> Array:
    return chance.integers(0, population, n + round(_TUNING * n))


def policies(
    variants: Sequence[Variant], levels: Sequence[float], n: int, repetitions: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Gives a row for each accuracy level and policy: what is kept, and what is offloaded.

    Args:
        variants: from `read_variants`.
        levels: of accuracy that are promised.
        n: images of a calibration, drawn again with replacement from the population; a quarter more are for tuning.
        repetitions: calibrations.
        seed: of the draws.
    """
    by_name = {one.name: one for one in variants}
    light, accurate = by_name[LIGHT], by_name[ACCURATE]
    whole = _pairs(light, accurate)
    grid = np.append(np.unique(np.quantile(whole.scores, np.linspace(0, 1, _GRID))), NEVER)
    curve = Curve.of(whole, grid)
    assert curve.errors is not None
    accuracy, offload = 1 - curve.errors / curve.n, 1 - curve.local / curve.n
    ends = {"always edge": (accuracy[0], 0.0), "always data centre": (accuracy[-1], 1.0)}
    rows = []
    for level in levels:
        promise = Promise("min_accuracy", level, 0.95)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("naive", "conformal", "ours")}
        picked: list[Variant] = []
        chance = np.random.default_rng(seed)
        for _ in range(repetitions):
            places = _drawn(chance, len(whole), n)
            calibration, tuning = whole.take(places[:n]), whole.take(places[n:])
            drawn = Curve.of(calibration, grid)
            assert drawn.errors is not None
            kept = np.flatnonzero((drawn.errors + 1) / (n + 1) <= 1 - level)
            certified = certify(calibration, sequence(tuning, promise), promise, tuning=tuning).threshold
            thresholds = {
                "naive": naive(calibration, grid, promise),
                "conformal": grid[kept[0]] if len(kept) else NEVER,
                "ours": certified,
            }
            for name, threshold in thresholds.items():
                if threshold is None:
                    found[name].append((accuracy[-1], 1.0, NEVER))
                    continue
                place = min(int(np.searchsorted(grid, threshold)), len(grid) - 1)
                found[name].append((accuracy[place], offload[place], float(threshold)))
            profiles = [(one, float(one.right[places[:n]].mean())) for one in variants]
            good = [one for one, profile in profiles if profile >= level]
            picked.append(good[0] if good else max(profiles, key=lambda pair: pair[1])[0])
        best = np.flatnonzero(accuracy >= level)
        oracle = best[np.argmin(offload[best])] if len(best) else len(grid) - 1
        ours = np.array(found["ours"])
        rate = float(ours[:, 1].mean())
        mixed = float(accuracy[0] + rate * (accuracy[-1] - accuracy[0]))
        lines = {
            **{name: [pair] for name, pair in ends.items()},
            "INFaaS-like": [(float(one.right.mean()), 0.0) for one in picked],
            "random offload": [(mixed, rate)],
            "oracle threshold": [(accuracy[oracle], offload[oracle])],
            **{f"{name} threshold": [one[:2] for one in each] for name, each in found.items()},
        }
        for name, pairs in lines.items():
            reached = np.array(pairs)
            refused = np.zeros(len(reached), bool)
            if name == "ours threshold":
                refused = ours[:, 2] == NEVER  # then nothing is promised
            broken = int(((reached[:, 0] < level - 1e-12) & ~refused).sum())
            missed = exact_share(broken, len(reached))
            rows.append({
                "kind": "policy", "level": level, "policy": name,
                "missed": missed.value,
                "missed_low": missed.low if len(reached) > 1 else missed.value,
                "missed_high": missed.high if len(reached) > 1 else missed.value,
                "promised": 1 - float(refused.mean()),
                "accuracy": float(reached[:, 0].mean()), "offload": float(reached[:, 1].mean()),
            })  # fmt: skip
    return rows
