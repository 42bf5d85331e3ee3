"""Reads data for the tasks of `evenkeel bench gradients`, or makes them up when no files are given. Without torch."""

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError

__all__ = ["ARRAYS", "TaskData", "read_data"]

ARRAYS = ("inputs", "targets", "test_inputs", "test_targets")
_SYNTHETIC = "synthetic"
_PYTHON = "source of Python's library"
_SIDES = {"mlp": 28, "convnet": 32}
_CHANNELS = {"mlp": 1, "convnet": 3}
_MAX_TESTS = {"mlp": 10_000, "convnet": 5_000}  # accuracy is taken many times
_MADE_UP, _MADE_UP_TESTS, _CLASSES = 8_192, 1_024, 10
_MADE_AT_ONCE = 1_024
_TEST_SHARE = 10  # every tenth example, where the data do not say which ones
_MAX_TEXT, _LEAST_TEXT = 1 << 20, 20_000
_MAX_TEST_TEXT = 20_000
# Source text that is there wherever this runs, and on no one's terms but Python's own.
_STDLIB = (
    "argparse",
    "ast",
    "calendar",
    "collections/__init__",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "inspect",
)
_TEST_NAMES = {"train": ("t10k", "test"), "TRAIN": ("TEST",)}


@dataclass(frozen=True, eq=False)
class TaskData:
    """Holds examples to train with and others to test with.

    Images: uint8 `[n, h, w]` or `[n, h, w, 3]` and labels `[n]`. Text: numbers of characters `[n]`, and no targets,
    since each character's target is the next one.

    Attributes:
        inputs: to train with.
        targets: their labels.
        test_inputs: to test with.
        test_targets: their labels.
        classes: how many labels or different characters there are.
        source: the file's name, or what stands in for one.
        stand_in: whether no file was given.
    """

    inputs: NDArray[Any]
    targets: NDArray[np.int64]
    test_inputs: NDArray[Any]
    test_targets: NDArray[np.int64]
    classes: int
    source: str
    stand_in: bool = False

    @property
    def identity(self) -> str:
        """Gives source and checksum."""
        check = 0
        for name in ARRAYS:
            check = crc32(np.ascontiguousarray(getattr(self, name)).tobytes(), check)
        return f"{self.source} {check:08x}"

    def save(self, folder: Path) -> None:
        """Writes the arrays into an existing folder, as `<name>.npy` each, for workers to map."""
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))


def read_data(task: str, paths: Mapping[str, Path | None]) -> TaskData:
    """Reads the data of a task.

    Args:
        task: `mlp`, `convnet` or `transformer`.
        paths: for each task a file, or None for the stand-in. Images in any form of `read_images`: with a split
            `test`, or with a file beside it that is called `t10k` or `test` instead of `train`; else every tenth image
            is kept for testing. Text in UTF-8, whose last tenth is.

    Raises:
        ConfigurationError: files that cannot be read, or too few examples.
    """
    path = paths.get(task)
    if task == "transformer":
        return _text(path)
    side, channels = _SIDES[task], _CHANNELS[task]
    return _made_up(side, channels) if path is None else _images(task, path, side, channels)


def _made_up(side: int, channels: int) -> TaskData:
    """Makes images of ten smooth patterns, moved, faded and under noise: learnt in a few dozen steps."""
    random = np.random.default_rng(0)
    coarse = random.standard_normal((_CLASSES, side // 4, side // 4, channels), np.float32)
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2)
    count = _MADE_UP + _MADE_UP_TESTS
    labels = random.integers(0, _CLASSES, count)
    places = (np.arange(side) + random.integers(-2, 3, (count, 2, 1))) % side
    strengths = random.uniform(0.3, 1, (count, 1, 1, 1)).astype(np.float32)
    images = np.empty((count, side, side, channels), np.uint8)
    for first in range(0, count, _MADE_AT_ONCE):
        some = slice(first, first + _MADE_AT_ONCE)
        rows, columns = places[some, 0, :, None], places[some, 1, None, :]
        moved = patterns[labels[some, None, None], rows, columns] * strengths[some]
        noisy = moved + 1.5 * random.standard_normal(moved.shape, np.float32)
        images[some] = np.clip(128 + 40 * noisy, 0, 255)
    if channels == 1:
        images = images[..., 0]
    cut = slice(None, _MADE_UP), slice(_MADE_UP, None)
    return TaskData(images[cut[0]], labels[cut[0]], images[cut[1]], labels[cut[1]], _CLASSES, _SYNTHETIC, True)


def _images(task: str, path: Path, side: int, channels: int) -> TaskData:
    from evenkeel.images.image_set import ImageSet, read_images

    def read(where: Path, split: str | None, limit: int | None = None) -> ImageSet:
        found = read_images(where, height=side, width=side, split=split, limit=limit)
        if found.labels is None or found.skipped_count:
            what = "has no labels" if found.labels is None else f"has {found.skipped_count} images that cannot be read"
            raise ConfigurationError(f"{task}: {where} {what}; every image needs one to train with")
        return found

    max_tests = _MAX_TESTS[task]
    beside = _tests_beside(path)
    if beside is not None:
        train, tests = read(path, None), read(beside, None, max_tests)
    elif _has_splits(path):
        train, tests = read(path, "train"), read(path, "test", max_tests)
    else:
        whole = read(path, None)
        kept = np.arange(len(whole)) % _TEST_SHARE == 0
        train, tests = whole.take(np.flatnonzero(~kept)), whole.take(np.flatnonzero(kept)[:max_tests])
    assert train.labels is not None
    assert tests.labels is not None
    if not len(tests) or not len(train):
        raise ConfigurationError(f"{task}: {path} has {len(train) + len(tests)} images, too few to train and to test")
    colours = (..., 0) if channels == 1 else ...
    classes = 1 + int(max(train.labels.max(), tests.labels.max()))
    return TaskData(
        np.ascontiguousarray(train.pixels[colours]),
        train.labels,
        np.ascontiguousarray(tests.pixels[colours]),
        tests.labels,
        classes,
        path.name,
    )


def _has_splits(path: Path) -> bool:
    if path.is_dir():
        return (path / "train").is_dir() and (path / "test").is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _tests_beside(path: Path) -> Path | None:
    for word, others in _TEST_NAMES.items():
        for other in others:
            beside = path.with_name(path.name.replace(word, other))
            if word in path.name and beside.exists():
                return beside
    return None


def _text(path: Path | None) -> TaskData:
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = [folder / f"{name}.py" for name in _STDLIB]
    else:
        files = [path]
    try:
        text = "".join(file.read_text(encoding="utf-8") for file in files)[:_MAX_TEXT]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"text: {path or 'the standard library'} cannot be read: {reason}") from None
    if len(text) < _LEAST_TEXT:
        raise ConfigurationError(f"text: {path} has {len(text)} characters; give {_LEAST_TEXT} or more")
    letters, numbers = np.unique(np.array(list(text)), return_inverse=True)
    tokens = numbers.astype(np.int32)
    cut = len(tokens) - min(len(tokens) // _TEST_SHARE, _MAX_TEST_TEXT)
    none = np.empty(0, np.int64)
    source = _PYTHON if path is None else path.name
    return TaskData(tokens[:cut], none, tokens[cut:], none, len(letters), source, path is None)
