"""Reads the data of `evenkeel bench coded`, or makes some, and cuts it into the devices' partitions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenkeel.arrays import Array, FloatArray, ScoreArray
from evenkeel.errors import ConfigurationError
from evenkeel.images.image_set import read_images
from evenkeel.training.coded.data_files import read_examples
from evenkeel.training.coded.matrix import DenseMatrix, SparseMatrix

__all__ = ["LabelledRows", "Partitions", "made", "partitions_of", "read_rows"]

_TEST_SHARE = 5  # every fifth row, where there is no file to test with
_TEST_NAMES = ("_test", "-test", ".t")
_INFORMATIVE = 0.2  # share of the columns that tell the classes apart, in data that are made
_DENSITY = 0.13  # of GISETTE's numbers, as published
_IMAGE_NAMES = ("images-idx3", "images.idx3")


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Holds rows `[rows, columns]` in float32, the last column ones, with labels -1 and 1, and rows to test with."""

    name: str
    rows: ScoreArray
    labels: FloatArray
    test_rows: ScoreArray
    test_labels: FloatArray

    @property
    def density(self) -> float:
        """Gives the share of numbers that are not zero."""
        return float(np.count_nonzero(self.rows)) / self.rows.size


@dataclass(frozen=True, eq=False)
class Partitions:
    """Holds the rows of each device, filled up with zeros to one size.

    Attributes:
        rows: `[devices, rows, columns]`, float32.
        labels: `[devices, rows]`; 0 where a row is only filling.
        rarer: of each device, the share of its rows that are of the rarer class.
    """

    rows: ScoreArray
    labels: FloatArray
    rarer: FloatArray


def made(samples: int, features: int, seed: int = 0) -> LabelledRows:
    """Makes a set of GISETTE's shape: sparse columns from 0 to 1, of which a fifth lean a little to one class.

    A twentieth of the labels is turned around, so that no model is right everywhere.
    """
    random = np.random.default_rng(seed)
    count = samples + samples // (_TEST_SHARE - 1)
    labels = random.choice([-1.0, 1.0], count)
    lean = np.where(random.random(features) < _INFORMATIVE, random.choice([-1.0, 1.0], features), 0.0)
    rows = np.empty((count, features + 1), np.float32)
    for first in range(0, count, 500):  # to bound memory
        some = slice(first, first + 500)
        chance = _DENSITY * (1 + 0.6 * labels[some, None] * lean)
        there = random.random((len(labels[some]), features), np.float32) < chance
        rows[some, :-1] = there * random.random(there.shape, np.float32)
    rows[:, -1] = 1.0
    noisy = np.where(random.random(count) < 0.05, -labels, labels)
    return LabelledRows("gisette-shaped", rows[:samples], noisy[:samples], rows[samples:], noisy[samples:])


def read_rows(path: Path, positive: float | None = None) -> LabelledRows:
    """Reads a set: LIBSVM text, npz, or IDX images with their labels beside.

    Args:
        path: of the rows to train with. Where a file beside it is called the same with `_test`, or is MNIST's `t10k`,
            that is for testing; else every fifth row is.
        positive: the label of one class against all others; None: the larger of two labels.

    Raises:
        ConfigurationError: it cannot be read, or has not two classes.
    """
    images = any(name in path.name for name in _IMAGE_NAMES)
    train = _read_images(path) if images else _read_table(path, None)
    beside = _beside(path)
    if beside is not None:
        tests = _read_images(beside) if images else _read_table(beside, train[0].shape[1])
    else:
        kept = np.arange(len(train[0])) % _TEST_SHARE == 0
        tests = train[0][kept], train[1][kept]
        train = train[0][~kept], train[1][~kept]
    values = np.unique(train[1])
    if positive is None and len(values) != 2:
        raise ConfigurationError(f"{path} has {len(values)} labels; say with --positive which is one class")
    one = values[-1] if positive is None else positive
    if one not in values or len(values) < 2:
        raise ConfigurationError(f"{path} has no two classes, or no label {one:g}; its labels are {values[:12]}")
    name = path.name.split(".")[0] if not images else f"{path.name.split('-')[0]}-{one:g}"
    return LabelledRows(
        name,
        _with_ones(train[0]),
        np.where(train[1] == one, 1.0, -1.0),
        _with_ones(tests[0]),
        np.where(tests[1] == one, 1.0, -1.0),
    )


def partitions_of(data: LabelledRows, devices: int, *, by_label: bool, seed: int = 0) -> Partitions:
    """Cuts rows into partitions of equal size, mixed at random or so that few devices have both classes."""
    count = len(data.rows)
    if count < devices:
        raise ConfigurationError(f"{data.name} has {count} rows for {devices} devices; give each one or more")
    order = np.random.default_rng(seed).permutation(count)
    if by_label:
        order = order[np.argsort(data.labels[order], kind="stable")]
    parts = np.array_split(order, devices)
    most = max(map(len, parts))
    rows = np.zeros((devices, most, data.rows.shape[1]), np.float32)
    labels = np.zeros((devices, most))
    for place, part in enumerate(parts):
        rows[place, : len(part)], labels[place, : len(part)] = data.rows[part], data.labels[part]
    rare = 1.0 if (data.labels == 1).mean() <= 0.5 else -1.0
    return Partitions(rows, labels, (labels == rare).sum(axis=1) / np.array([len(part) for part in parts]))


def _read_table(path: Path, columns: int | None) -> tuple[Array, FloatArray]:
    matrix, labels = read_examples(path, columns)
    single = matrix.converted("float32", False)
    return (
        single.dense() if isinstance(single, SparseMatrix) else DenseMatrix(single.arrays()["values"])
    ).values, labels


def _read_images(path: Path) -> tuple[Array, FloatArray]:
    found = read_images(path, height=28, width=28)
    if found.labels is None:
        raise ConfigurationError(f"{path} has no labels beside it")
    grey = found.pixels[..., 0] if found.pixels.ndim == 4 else found.pixels
    return grey.reshape(len(grey), -1).astype(np.float32) / 255, found.labels.astype(np.float64)


def _beside(path: Path) -> Path | None:
    if "train-" in path.name:
        beside = path.with_name(path.name.replace("train-", "t10k-"))
        return beside if beside.exists() else None
    stem, _, rest = path.name.partition(".")
    for name in _TEST_NAMES:
        beside = path.with_name(f"{stem}{name}.{rest}")
        if beside.exists():
            return beside
    return None


def _with_ones(rows: Array) -> ScoreArray:
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
