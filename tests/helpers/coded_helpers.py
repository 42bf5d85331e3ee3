"""Devices in this process with random data, and what the gradient over all of it really is."""

from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.coded.coordinator import CodedSettings, CodeMaker, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import PredictorLoss


@dataclass
class CodedData:
    """The partitions of a problem, with labels 0 and 1."""

    tables: list[FloatArray]
    labels: list[FloatArray]

    def sums(self, weights: FloatArray, loss: PredictorLoss, rows: Array | None = None) -> tuple[float, FloatArray]:
        """Value and gradient, from all data in one place."""
        value, gradient = 0.0, np.zeros(len(weights))
        for table, labels in zip(self.tables, self.labels, strict=True):
            if rows is not None:
                there = rows[rows < len(table)]
                table, labels = table[there], labels[there]
            if loss.classes:
                labels = 2 * labels - 1
            predicted = table @ weights
            value += float(loss.cost(predicted, labels).sum())
            gradient = gradient + table.T @ loss.slope(predicted, labels)
        return value, gradient

    def devices(self) -> list[Device]:
        return [Device(f"dev{place}", pair) for place, pair in enumerate(zip(self.tables, self.labels, strict=True))]


def coded_data(partitions: int, columns: int = 5, seed: int = 0, least: int = 20, most: int = 30) -> CodedData:
    """Partitions of different sizes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(least, most, partitions)
    tables = [random.normal(size=(size, columns)) for size in sizes]
    truth = random.normal(size=columns)
    labels = [(table @ truth + random.normal(size=len(table)) > 0).astype(float) for table in tables]
    return CodedData(tables, labels)


def code_named(text: str) -> CodeMaker:
    return lambda partitions, sizes: linear_code(text, partitions, sizes=sizes)


def local_coordinator(
    data: CodedData, code: str = "balanced:copies=2", settings: CodedSettings | None = None
) -> tuple[LocalDevices, Coordinator]:
    """A coordinator that is set up, and its devices."""
    link = LocalDevices(data.devices())
    coordinator = Coordinator(link, code_named(code), settings or CodedSettings(wait_s=1.0))
    coordinator.set_up(len(data.tables))
    return link, coordinator
