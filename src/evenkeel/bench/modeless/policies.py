"""Says who answers: seven policies over recorded answers, calibrated again and again on draws of a known population."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray, PixelArray
from evenkeel.coding.answers.by_name import CollageSettings, OwnModel
from evenkeel.coding.answers.cascade import sureness
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.edge.both_models import answers_of_collage
from evenkeel.figures.estimates import exact_share
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card
from evenkeel.models.session import open_session
from evenkeel.models.shipped import COLLAGES, card_path, model_path
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Curve, Pairs, certify, naive, sequence

__all__ = ["Variant", "collage_variants", "first_certified", "light_answers", "policies", "variant"]

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


def light_answers(model: BlackBox, pixels: PixelArray) -> tuple[FloatArray, Array]:
    """Gives how sure a light model is of each image, by the lead of its first class, [n], and its answers, [n]."""
    scores = model.scores(pixels)
    form = ScoreForm(model.classes, 1.0 if model.card is None else model.card.temperature, model.kind)
    return sureness(scores, form, "margin"), scores.argmax(axis=1)


def variant(model: BlackBox, pixels: PixelArray, labels: Array) -> Variant:
    """Has a model answer the images."""
    sure, classes = light_answers(model, pixels)
    pass_ms = (model.card.latency_ms if model.card is not None else 0.0) or model.latency_ms()
    return Variant(
        model.name, classes == labels, sure, pass_ms / 1e3, _load_s(model.path), model.path.stat().st_size
    )  # fmt: skip


def collage_variants(accurate: BlackBox, pixels: PixelArray, labels: Array, seed: int = 0) -> list[Variant]:
    """Has the shipped Collage-CNNs answer the images in full collages: more variants beside the shipped classifier."""
    assert accurate.card is not None
    found = []
    for name in COLLAGES:
        card, path = load_card(card_path(name)), model_path(name)
        own = OwnModel(accurate.name, ScoreForm.from_card(accurate.card), accurate.card.layout)
        code = CollageSettings().code(own, card)
        assert isinstance(code, Collage)
        sure, classes = answers_of_collage(code, card, path.parent, pixels, True, seed, 1, lambda done: None)
        pass_s = card.latency_ms / 1e3 / card.cells
        found.append(Variant(name, classes == labels, sure[:, 0], pass_s, _load_s(path), path.stat().st_size))
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
    light: Variant,
    accurate: Variant,
    others: Sequence[Variant],
    levels: Sequence[float],
    n: int,
    repetitions: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Gives a row for each accuracy level and policy: what is kept, and what is offloaded.

    Args:
        light: answers first.
        accurate: answers where that one is not sure.
        others: that INFaaS-like selection may pick beside these two.
        levels: of accuracy that are promised.
        n: images of a calibration, drawn again with replacement from the population; a quarter more are for tuning.
        repetitions: calibrations.
        seed: of the draws.
    """
    variants = sorted((light, accurate, *others), key=lambda one: one.pass_s)
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
                # Of the threshold itself: the next one of the grid may be better or worse by a dozen images.
                exactly = Curve.of(whole, np.array([threshold]))
                assert exactly.errors is not None
                reached_here = 1 - float(exactly.errors[0]) / exactly.n
                found[name].append((reached_here, 1 - float(exactly.local[0]) / exactly.n, float(threshold)))
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
