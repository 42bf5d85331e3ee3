"""Measures transports by loss, by deadline and by round trip, and policies by promise and by latency."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray, PixelArray
from evenkeel.bench.modeless.links import Link, Rate
from evenkeel.bench.modeless.policies import (
    Variant,
    collage_variants,
    first_certified,
    policies,
    variant,
)
from evenkeel.bench.modeless.transports import METHODS, Sending, carried
from evenkeel.errors import ConfigurationError
from evenkeel.figures.estimates import exact_share, quantile
from evenkeel.models.black_box import BlackBox

__all__ = ["ModelessSetting", "cells", "measure"]

_SLACK_S = 0.004  # between the moment of decoding and the deadline, beside the model and the way back
_DEADLINES = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 16.0, 26.0)  # in round trips
_BURST = 3.0
_LOSSES = (0.0, 0.1, 0.3, 0.6)
_CELLULAR = (0.05, 0.1, 0.2)
_RATIOS = (0.2, 0.4, 0.6, 0.8)  # of a round trip and the deadline
_LOSS_OF_RATIOS = 0.2
_TIERS = (0.25, 0.5)  # between the light model's accuracy and the best that both reach
_LINKS = ("TCP", "NACK", "NACK + concealment")  # ways to the data centre, for whole systems
_WORK_S = 0.002
_DEADLINE_S = 0.1
_STEADY = Rate.of("3 Mbit/s", np.full(1000, 375.0))
_SENDINGS = 3.0  # of a mosaic at the link's mean rate, in a deadline
_SLACK_OF_MOSAICS_S = 0.06  # the other end's wait begins with the first packet, which takes longer on a slow link


@dataclass(frozen=True)
class ModelessSetting:
    """Says what is measured.

    Attributes:
        light: the light model.
        accurate: the accurate model.
        images: uint8 [n, height, width, 3], as both take them.
        labels: [n].
        rates: of the cellular links.
        requests: of each cell.
        calibrations: of each promise.
        n: images of a calibration.
        round_trip_s: of the links.
        payload: bytes of a packet.
        quality: of JPEG.
        per_s: requests in a second.
        slowdown: by which the computer at the edge is slower than the one that the cards were measured on.
        collages: the shipped Collage-CNNs are variants for INFaaS-like selection, too.
        mosaic: side in pixels of what is sent: a grid of images, of which the one in the middle is asked about; 0: each
            image by itself.
    """

    light: BlackBox
    accurate: BlackBox
    images: PixelArray
    labels: Array
    rates: tuple[Rate, ...]
    requests: int = 400
    calibrations: int = 100
    n: int = 5000
    round_trip_s: float = 0.04
    payload: int = 100
    quality: int = 90
    per_s: float = 10.0
    slowdown: float = 10.0
    seed: int = 1
    collages: bool = False
    mosaic: int = 0

    def __post_init__(self) -> None:
        side = self.images.shape[1]
        if self.mosaic and (self.images.shape[2] != side or self.mosaic % side or self.mosaic < 2 * side):
            raise ConfigurationError(
                f"mosaic: a side of {self.mosaic} pixels is not a multiple, twice or more, of the side of the images, "
                f"which have {self.images.shape[2]} x {side} pixels"
            )


def cells(setting: ModelessSetting) -> int:
    """Counts the steps of `measure`."""
    losses, rates = len(_LOSSES), len(setting.rates)
    if setting.mosaic:
        return losses * len(METHODS)
    return (2 * losses - (0.0 in _LOSSES)) * len(METHODS) + len(_RATIOS) * 3 + rates * len(_CELLULAR) + 1


def measure(setting: ModelessSetting, done: Callable[[str], object] = lambda what: None) -> list[dict[str, Any]]:
    """Gives the rows of all pages; calls `done` after each of `cells` steps.

    Of mosaics only transports are measured, over the first of the cellular links, with losses in bursts.
    """
    runs, rows = _Runs(setting), list[dict[str, Any]]()
    rate = setting.rates[0] if setting.mosaic else _STEADY
    steady = Link(rate, setting.round_trip_s, 0.0, seed=setting.seed)
    for burst in (_BURST,) if setting.mosaic else (1.0, _BURST):
        for loss in _LOSSES:
            if burst == _BURST and not loss and not setting.mosaic:
                rows += [{**row, "burst": burst} for row in rows if not row["loss"]]
                continue
            for method in METHODS:
                link = replace(steady, loss=loss, burst=burst)
                rows.append(runs.row("loss", method, link, 2.5 * setting.round_trip_s + runs.sending_s(rate)))
                done(f"{method}, {loss:.0%} lost")
    if setting.mosaic:
        return rows
    for ratio in _RATIOS:
        for method in ("NACK", "concealment", "NACK + concealment"):
            link = replace(steady, round_trip_s=ratio * _DEADLINE_S, loss=_LOSS_OF_RATIOS)
            rows.append({**runs.row("round trip", method, link, _DEADLINE_S), "ratio": ratio})
            done(f"{method}, round trip {ratio:g} of the deadline")
    light = variant(setting.light, setting.images, setting.labels)
    accurate = variant(setting.accurate, setting.images, setting.labels)
    others = collage_variants(setting.accurate, setting.images, setting.labels) if setting.collages else []
    rows += [_of_model(one) for one in (light, accurate, *others)]
    levels = _levels(light, accurate)
    rows += policies(light, accurate, others, levels, setting.n, setting.calibrations, setting.seed)
    done("policies")
    for rate in setting.rates:
        for loss in _CELLULAR:
            link = replace(steady, rate=rate, loss=loss, burst=_BURST)
            rows += _systems(runs, link, light, accurate, others, levels)
            done(f"systems, {loss:.0%} lost")
    return rows


class _Runs:
    """Sends the images, or mosaics of them, and has what arrives answered."""

    def __init__(self, setting: ModelessSetting) -> None:
        self.setting = setting
        self.places = np.arange(setting.requests) % len(setting.images)
        self.labels = setting.labels[self.places]
        self.images = setting.images[self.places]
        if setting.mosaic:
            self.images = _mosaics(setting.images, self.places, setting.mosaic, setting.seed)
        whole = carried("TCP", self.images, Link(_STEADY, 0.01, 0.0), self.sending(1.0, 0.01))
        self._bytes, asked = whole.bytes, self.asked(whole.pixels)
        self.right = {name: model.scores(asked).argmax(axis=1) == self.labels
                      for name, model in (("light", setting.light), ("accurate", setting.accurate))}  # fmt: skip

    def asked(self, pixels: PixelArray) -> PixelArray:
        """Cuts what is asked about out of what arrived."""
        side = self.setting.images.shape[1]
        if not self.setting.mosaic:
            return pixels
        begin = self.setting.mosaic // side // 2 * side
        return np.ascontiguousarray(pixels[:, begin : begin + side, begin : begin + side])

    def sending_s(self, rate: Rate) -> float:
        """Gives the time that a deadline leaves for the sending itself: of a mosaic; an image takes next to none."""
        return _SENDINGS * self._bytes * 8 / (rate.mbit * 1e6) if self.setting.mosaic else 0.0

    def sending(self, deadline_s: float, round_trip_s: float) -> Sending:
        """Gives how images are sent that must be answered in time."""
        setting = self.setting
        slack_s = _SLACK_OF_MOSAICS_S if setting.mosaic else _SLACK_S
        wait_s = max(0.002, deadline_s - round_trip_s / 2 - _WORK_S - slack_s)
        return Sending(
            setting.payload, setting.quality, setting.per_s, wait_s, deadline_s, _WORK_S, setting.seed
        )  # fmt: skip

    def run(self, method: str, link: Link, deadline_s: float) -> tuple[Array, FloatArray, Array, float]:
        """Sends the images; gives which were answered rightly in time, when, which at all, and bytes for an image."""
        arrived = carried(method, self.images, link, self.sending(deadline_s, link.round_trip_s))
        right = self.right["light"].copy()
        changed = np.flatnonzero(arrived.changed & arrived.answered)
        if len(changed):
            classes = self.setting.light.scores(self.asked(arrived.pixels[changed])).argmax(axis=1)
            right[changed] = classes == self.labels[changed]
        in_time = arrived.answered & (arrived.seconds <= deadline_s)
        return right & in_time, np.minimum(arrived.seconds, deadline_s), in_time, arrived.bytes

    def row(self, kind: str, method: str, link: Link, deadline_s: float) -> dict[str, Any]:
        """Gives the row of a cell."""
        right, seconds, in_time, sent = self.run(method, link, deadline_s)
        accuracy = exact_share(int(right.sum()), len(right))
        row: dict[str, Any] = {
            "kind": kind, "method": method, "loss": link.loss, "burst": link.burst, "rate": link.rate.name,
            "round_trip_ms": link.round_trip_s * 1e3, "deadline_ms": deadline_s * 1e3,
            "accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
            "whole_accuracy": float(self.right["light"].mean()), "answered": float(in_time.mean()), "bytes": sent,
        }  # fmt: skip
        for q in (0.5, 0.95, 0.99):
            row[f"p{100 * q:.0f}_ms"] = float(np.quantile(seconds, q)) * 1e3
        return row


def _mosaics(images: PixelArray, places: Array, side: int, seed: int) -> PixelArray:
    """Makes a grid of images around each of those at `places`, all others at random."""
    grid, cell = side // images.shape[1], images.shape[1]
    drawn = np.random.default_rng(seed).integers(0, len(images), (len(places), grid, grid))
    drawn[:, grid // 2, grid // 2] = places
    made: PixelArray = np.empty((len(places), side, side, 3), np.uint8)
    for row, column in np.ndindex(grid, grid):
        made[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = images[drawn[:, row, column]]
    return made


def _of_model(one: Variant) -> dict[str, Any]:
    return {
        "kind": "model", "model": one.name, "accuracy": float(one.right.mean()), "pass_ms": one.pass_s * 1e3,
        "load_ms": one.load_s * 1e3, "bytes": one.bytes,
    }  # fmt: skip


def _levels(light: Variant, accurate: Variant) -> tuple[float, ...]:
    """Gives the accuracies that are promised, between the light model's and the best that both reach together."""
    order = np.argsort(-light.sure, kind="stable")
    gained = np.cumsum(light.right[order].astype(int) - accurate.right[order])
    low, high = float(light.right.mean()), float(accurate.right.mean()) + max(0, int(gained.max())) / len(order)
    return tuple(round(low + share * (high - low), 4) for share in _TIERS)


def _systems(
    runs: _Runs, link: Link, light: Variant, accurate: Variant, others: Sequence[Variant], levels: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Gives a row for each whole system: at the shortest deadline by which it is as right as the lowest promise.

    The threshold is certified; random offload sends as many. What has no answer in time gets the light model's, where
    there is one, else none.
    """
    setting = runs.setting
    count, wanted = len(runs.labels), levels[0]
    light_right, sure = light.right[runs.places], light.sure[runs.places]
    path = sure < first_certified(light, accurate, wanted, setting.n, setting.seed)
    drawn = np.random.default_rng(setting.seed).permutation(path)
    gaps = np.random.default_rng(setting.seed).exponential(1 / setting.per_s, count)
    light_s = _queued(gaps, np.full(count, setting.slowdown * light.pass_s))
    away = {
        "always data centre": (np.ones(count, bool), np.zeros(count), np.zeros(count, bool), 0),
        "random offload": (drawn, light_s, light_right, light.bytes),
        "certified threshold": (path, light_s, light_right, light.bytes),
    }
    common = {"kind": "system", "loss": link.loss, "burst": link.burst, "rate": link.rate.name, "level": wanted}
    legs: dict[tuple[str, float], tuple[Array, FloatArray, Array, float]] = {}
    for method in _LINKS:
        for policy, (path, before_s, otherwise, resident) in away.items():
            row: dict[str, Any] = {}
            for number in _DEADLINES:
                deadline_s = number * link.round_trip_s
                if (method, deadline_s) not in legs:
                    legs[method, deadline_s] = _leg(runs, method, link, deadline_s, accurate)
                right, leg_s, in_time, sent = legs[method, deadline_s]
                outcome = np.where(path & in_time, right, otherwise)
                seconds = before_s + np.where(path, leg_s, 0.0)
                row = {
                    **common, "policy": policy, "transport": method, "deadline_ms": deadline_s * 1e3,
                    **_summary(outcome, seconds, path), "offload": float(path.mean()),
                    "degraded": float((path & ~in_time).mean()), "bytes": sent * float(path.mean()),
                    "resident_bytes": resident, "swaps": 0.0,
                }  # fmt: skip
                row["reached"] = row["accuracy"] >= wanted
                if row["reached"]:
                    break
            yield row
    yield {**common, **_swapping(runs, (light, accurate, *others), levels, gaps)}
    yield {
        **common, "policy": "always edge", "transport": "none", "deadline_ms": None,
        **_summary(light_right, light_s, np.zeros(count, bool)), "offload": 0.0, "degraded": 0.0, "bytes": 0.0,
        "resident_bytes": light.bytes, "swaps": 0.0, "reached": float(light_right.mean()) >= wanted,
    }  # fmt: skip


def _leg(
    runs: _Runs, method: str, link: Link, deadline_s: float, accurate: Variant
) -> tuple[Array, FloatArray, Array, float]:
    """Sends all images to the accurate model: which it answers rightly, when, which in time, bytes for an image."""
    sending = replace(runs.sending(deadline_s, link.round_trip_s), work_s=accurate.pass_s)
    sending = replace(sending, wait_s=max(0.002, sending.wait_s - accurate.pass_s + _WORK_S))
    arrived = carried(method, runs.images, link, sending)
    right = runs.right["accurate"].copy()
    in_time = arrived.answered & (arrived.seconds <= deadline_s)
    changed = np.flatnonzero(arrived.changed & in_time)
    if len(changed):
        classes = runs.setting.accurate.scores(runs.asked(arrived.pixels[changed])).argmax(axis=1)
        right[changed] = classes == runs.labels[changed]
    return right, np.where(in_time, arrived.seconds, deadline_s), in_time, arrived.bytes


def _swapping(runs: _Runs, variants: Sequence[Variant], levels: Sequence[float], gaps: FloatArray) -> dict[str, Any]:
    """Gives the row of INFaaS-like selection: the cheapest variant by its profile, one in memory, swapped on demand.

    Half of the requests want each promise.
    """
    ordered = sorted(variants, key=lambda one: one.pass_s)
    tiers = np.random.default_rng(runs.setting.seed).integers(0, len(levels), len(gaps))
    work_s, right, resident, swaps = np.zeros(len(gaps)), np.zeros(len(gaps), bool), "", 0
    most = max(variants, key=lambda one: float(one.right.mean()))
    used = set()
    for place, tier in enumerate(tiers):
        one = next((each for each in ordered if each.right.mean() >= levels[tier]), most)
        work_s[place] = runs.setting.slowdown * (one.pass_s + (one.load_s if one.name != resident else 0.0))
        swaps += one.name != resident
        resident, right[place] = one.name, one.right[runs.places[place]]
        used.add(one.bytes)
    return {
        "policy": "INFaaS-like", "transport": "none", "deadline_ms": None,
        **_summary(right, _queued(gaps, work_s), np.zeros(len(gaps), bool)), "offload": 0.0, "degraded": 0.0,
        "bytes": 0.0, "resident_bytes": max(used), "swaps": swaps / len(gaps),
        "reached": float(right.mean()) >= levels[0],
    }  # fmt: skip


def _queued(gaps: FloatArray, work_s: FloatArray) -> FloatArray:
    """Gives the times of requests at a computer that does one thing at a time."""
    times, behind_s = np.zeros(len(gaps)), 0.0
    for place, (gap, work) in enumerate(zip(gaps, work_s, strict=True)):
        behind_s = max(0.0, behind_s - gap) + work
        times[place] = behind_s
    return times


def _summary(right: Array, seconds: FloatArray, path: Array) -> dict[str, Any]:
    accuracy, p99 = exact_share(int(right.sum()), len(right)), quantile(seconds, 0.99)
    found: dict[str, Any] = {
        "accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
        "p50_ms": float(np.quantile(seconds, 0.5)) * 1e3, "p95_ms": float(np.quantile(seconds, 0.95)) * 1e3,
        "p99_ms": p99.value * 1e3, "p99_ms_low": p99.low * 1e3, "p99_ms_high": p99.high * 1e3,
    }  # fmt: skip
    for name, some in (("edge", seconds[~path]), ("data_centre", seconds[path])):
        for q in (0.5, 0.95, 0.99):
            found[f"{name}_p{100 * q:.0f}_ms"] = float(np.quantile(some, q)) * 1e3 if len(some) else None
    return found
