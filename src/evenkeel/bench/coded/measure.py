"""Trains with every scheme on the same devices, and measures what rounds take, move and reach."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from evenkeel.arrays import Array, FloatArray, ScoreArray
from evenkeel.bench.coded.data import LabelledRows, Partitions, partitions_of
from evenkeel.bench.coded.fleet import DeviceFleet, FleetSettings, TaskTimes
from evenkeel.bench.coded.rows import TrainedScheme, row_of
from evenkeel.bench.coded.schemes import RoundOutcome, Scheme, SizeOfRound, scheme_of
from evenkeel.coding.answers.linear import GradientCode, PartitionCode
from evenkeel.training.coded.losses import Logistic

__all__ = ["measure", "task_times"]

_LOSS = Logistic()
_MOMENTUM = 0.9
_STEPS = (0.1, 0.3, 1.0)  # of the step that the curvature allows; the most accurate is kept
_POINTS = 40  # of a curve
_CHECKED = 10  # rounds whose gradient is compared with the uncoded one
_TIMED = 9


class _Learner:
    """Computes gradients from what a scheme's round gave."""

    def __init__(self, data: LabelledRows, parts: Partitions, scheme: Scheme) -> None:
        self.data, self.parts, self.scheme, self.code = data, parts, scheme, scheme.code
        self.devices, self.most, self.columns = parts.rows.shape
        self.flat: ScoreArray = parts.rows.reshape(-1, self.columns)
        self.real = parts.labels != 0
        self.penalty = 1 / int(self.real.sum())
        self.sums: Array = np.empty((0, self.most, self.columns), np.float32)
        if isinstance(self.code, PartitionCode) and not scheme.name.startswith("replication"):
            self.sums = np.asarray(np.tensordot(self.code.parity.astype(np.float32), parts.rows, axes=1))
        self.decoding_s: list[float] = []

    def slopes(self, products: FloatArray) -> FloatArray:
        """Gives the derivative of the loss, 0 where a row is only filling."""
        return _LOSS.slope(products, self.parts.labels)

    def plain(self, weights: FloatArray, told: Array) -> FloatArray:
        """Gives the mean gradient over the partitions that are told."""
        products = self._products(weights)
        slopes = np.where(told[:, None], self.slopes(products), 0.0)
        return self._mean(self._gathered(slopes.astype(np.float32)), weights, told)

    def coded(self, weights: FloatArray, outcome: RoundOutcome) -> FloatArray:
        """Gives the mean gradient as the coordinator solves for it; devices compute in float32."""
        assert outcome.blocks is not None
        everything = np.ones(self.devices, bool)
        if isinstance(self.code, GradientCode):
            factors = self.slopes(self._products(weights)).astype(np.float32)
            own = np.matmul(factors[:, None], self.parts.rows)[:, 0]
            replies = self.code.rows[list(outcome.blocks)].astype(np.float32) @ own
            began = perf_counter()
            total = self.code.decoder(outcome.blocks).values(replies)[0]
            self.decoding_s.append(perf_counter() - began)
            return self._mean(total, weights, everything)
        assert isinstance(self.code, PartitionCode)
        products, single = self._products(weights), weights.astype(np.float32)
        sums = [block - self.devices for block in outcome.blocks if block >= self.devices]
        sum_products = self.sums[sums] @ single
        began = perf_counter()
        decoder = self.code.decoder(outcome.blocks)
        alone = [block for block in outcome.blocks if block < self.devices]
        slopes = self.slopes(decoder.values(np.concatenate([products[alone], sum_products])))
        shares = decoder.shares(slopes).astype(np.float32)
        self.decoding_s.append(perf_counter() - began)
        placed = np.zeros((self.devices, self.most), np.float32)
        placed[alone] = shares[: len(alone)]
        total = self._gathered(placed)
        for share, rows in zip(shares[len(alone) :], self.sums[sums], strict=True):
            total += share @ rows
        return self._mean(total, weights, everything)

    def precise(self, weights: FloatArray, told: Array) -> FloatArray:
        """Gives the mean gradient over the partitions that are told, computed in float64."""
        total = np.zeros(self.columns)
        for place in np.flatnonzero(told):
            rows = self.parts.rows[place].astype(np.float64)
            total += _LOSS.slope(rows @ weights, self.parts.labels[place]) @ rows
        return self._mean(total, weights, told)

    def judge(self, weights: FloatArray) -> tuple[float, float]:
        """Gives the objective over all rows, and the accuracy on the rows to test with."""
        cost = float(_LOSS.cost(self._products(weights), self.parts.labels)[self.real].mean())
        right = (self.data.test_rows @ weights.astype(np.float32) > 0) == (self.data.test_labels > 0)
        return cost + self.penalty / 2 * float(weights @ weights), float(right.mean())

    def _gathered(self, factors: Array) -> FloatArray:
        """Gives the sum of what each device's transposed partition gives: float32 on devices, float64 here."""
        replies: Array = np.matmul(factors[:, None], self.parts.rows)[:, 0]
        total: FloatArray = replies.sum(axis=0, dtype=np.float64)
        return total

    def _products(self, weights: FloatArray) -> FloatArray:
        found: FloatArray = (self.flat @ weights.astype(np.float32)).astype(np.float64)
        return found.reshape(self.devices, self.most)

    def _mean(self, total: FloatArray, weights: FloatArray, told: Array) -> FloatArray:
        return total / max(1, int(self.real[told].sum())) + self.penalty * weights


def measure(
    data: LabelledRows,
    texts: Sequence[str],
    settings: Sequence[FleetSettings],
    *,
    devices: int,
    rounds: int,
    latency_s: float,
    number_s: float,
    seed: int = 0,
    done: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Gives a row for each setting and scheme, in this order.

    Args:
        data: rows to train and to test with.
        texts: of the schemes, for `scheme_of`.
        settings: how devices behave.
        devices: how many have a partition.
        rounds: of training.
        latency_s: of a task and its reply.
        number_s: of sending a number.
        seed: of all draws.
        done: called with the scheme's text after each training.
    """
    rows = []
    for setting in settings:
        parts = partitions_of(data, devices, by_label=setting.bias != "random", seed=seed)
        times = task_times(parts.rows[0], latency_s, number_s)
        size = SizeOfRound(devices, parts.rows.shape[1], parts.rows.shape[2], times)
        one_class = _one_class(parts.rarer)
        fleet = DeviceFleet(setting, one_class, rounds, seed)
        largest = _curvature(data)
        weights = [np.count_nonzero(rows) for rows in parts.rows]
        steps: tuple[float, ...] = _STEPS  # all exact schemes take the same path, so one of them is tuned for all
        for text in texts:
            scheme = scheme_of(text, devices, np.array(weights, np.float64))
            played = [scheme.play(fleet, number, size) for number in range(rounds)]
            exact = all(outcome.told.all() for outcome in played)
            found = _train(_Learner(data, parts, scheme), fleet, played, steps if exact else _STEPS, largest)
            if exact:
                steps = (found.step,)
            rows.append(row_of(data, text, scheme, setting, size, found, _bytes_of_partition(data, size)))
            done(text)
    return rows


def task_times(rows: ScoreArray, latency_s: float, number_s: float) -> TaskTimes:
    """Times a partition's product and its transpose's on this machine: the quickest of a few."""
    vector, back = np.ones(rows.shape[1], np.float32), np.ones(len(rows), np.float32)
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TIMED):
        began = perf_counter()
        _ = rows @ vector
        middle = perf_counter()
        _ = back @ rows
        spent[0].append(middle - began)
        spent[1].append(perf_counter() - middle)
    return TaskTimes(min(spent[0]), min(spent[1]), latency_s, number_s)


def _train(
    learner: _Learner, fleet: DeviceFleet, played: Sequence[RoundOutcome], steps: Sequence[float], largest: float
) -> TrainedScheme:
    """Trains with what the rounds gave, with each step, and keeps the step that ends most accurate."""
    best: tuple[float, FloatArray, float] | None = None
    for step in steps:
        curve, error = _descend(learner, played, step / (largest / 4 + learner.penalty))
        if best is None or curve[-1, 3] > best[1][-1, 3]:
            best = step, curve, error
    assert best is not None
    scheme = learner.scheme
    moved = sum(scheme.repair_transfers(device) for number in range(len(played)) for device in fleet.leaving(number))
    return TrainedScheme(
        np.array([outcome.seconds for outcome in played]),
        np.array([outcome.bytes for outcome in played]),
        np.array([outcome.prompt for outcome in played]),
        moved,
        best[0],
        best[1],
        best[2],
        float(np.median(learner.decoding_s)) if learner.decoding_s else 0.0,
    )


def _descend(learner: _Learner, played: Sequence[RoundOutcome], step: float) -> tuple[FloatArray, float]:
    """Descends with Nesterov's momentum; gives the curve, and the largest error of a gradient."""
    weights = np.zeros(learner.columns)
    speed = np.zeros_like(weights)
    ends = np.cumsum([outcome.seconds for outcome in played])
    shown = set(np.unique(np.linspace(0, len(played) - 1, _POINTS).round().astype(int)).tolist())
    checked = set(np.linspace(0, len(played) - 1, _CHECKED).round().astype(int).tolist())
    objective, accuracy = learner.judge(weights)
    curve, error = [(0.0, 0.0, objective, accuracy)], 0.0
    first = float(np.linalg.norm(learner.precise(weights, played[0].told)))
    for number, outcome in enumerate(played):
        point = weights + _MOMENTUM * speed
        gradient = learner.plain(point, outcome.told) if outcome.blocks is None else learner.coded(point, outcome)
        if number in checked:
            error = max(error, float(np.linalg.norm(gradient - learner.precise(point, outcome.told))) / first)
        speed = _MOMENTUM * speed - step * gradient
        weights = weights + speed
        if number in shown:
            curve.append((number + 1.0, float(ends[number]), *learner.judge(weights)))
    return np.array(curve), error


def _one_class(rarer: FloatArray) -> list[int]:
    """Names the devices that hold the rarer class, up to a quarter of all, those with most of it first."""
    order = np.argsort(-rarer, kind="stable")[: max(1, len(rarer) // 4)]
    return [int(device) for device in order if rarer[device] > 0]


def _curvature(data: LabelledRows) -> float:
    """Gives the largest eigenvalue of the mean outer product of the rows, by power iteration."""
    vector: ScoreArray = np.ones(data.rows.shape[1], np.float32)
    for _ in range(30):
        vector = np.asarray(vector / float(np.linalg.norm(vector)), np.float32)
        vector = np.asarray((data.rows @ vector) @ data.rows, np.float32)
    return 1.02 * float(np.linalg.norm(vector)) / len(data.rows)


def _bytes_of_partition(data: LabelledRows, size: SizeOfRound) -> float:
    """Gives the bytes of a partition, dense or as numbers and columns, whichever is less."""
    return size.rows * size.columns * min(4.0, 8.0 * data.density)
