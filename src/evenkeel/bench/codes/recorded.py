"""Reads and writes gradients that were recorded while a model was trained.

An npz file without pickles. `task`: a short name. `names`, `shapes`: of the parameters, in order, shapes as `64x3x3x3`
(empty for a single number). For each moment of the training, e.g. `early`: `workers_early`, float32 `[workers,
length]`, every worker's gradient of one step, parameter after parameter; and, if kept, `earlier_early`, float32
`[rounds, length]`, the means of the steps just before, oldest first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError, EvenkeelError

__all__ = ["Moment", "Recorded", "read_gradients", "write_gradients"]

_Floats = NDArray[np.float32]
_WORKERS, _EARLIER = "workers_", "earlier_"


@dataclass(frozen=True)
class Moment:
    """Holds one step: every worker's gradient `[workers, length]`, means of the steps before `[rounds, length]`."""

    workers: _Floats
    earlier: _Floats


@dataclass(frozen=True)
class Recorded:
    """Holds one training's gradients.

    Attributes:
        task: what was trained.
        names: of the parameters, in order.
        shapes: theirs.
        moments: by name, in the order of the training.
    """

    task: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    moments: Mapping[str, Moment]


def write_gradients(path: str | Path, recorded: Recorded) -> None:
    """Writes the file.

    Raises:
        EvenkeelError: it cannot be written.
    """
    arrays: dict[str, Any] = {
        "task": np.array(recorded.task),
        "names": np.array(recorded.names, np.str_),
        "shapes": np.array(["x".join(map(str, shape)) for shape in recorded.shapes], np.str_),
    }
    for name, moment in recorded.moments.items():
        arrays[_WORKERS + name] = moment.workers.astype(np.float32)
        arrays[_EARLIER + name] = moment.earlier.astype(np.float32)
    try:
        with Path(path).open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise EvenkeelError(f"{path} cannot be written: {error.strerror or error}") from error


def read_gradients(path: str | Path) -> Recorded:
    """Reads what `write_gradients` wrote.

    Raises:
        ConfigurationError: not such a file, or arrays that do not fit together.
    """
    try:
        # Opened here, because numpy leaves a file open that is no archive.
        with Path(path).open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise ConfigurationError(f"gradients: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ConfigurationError(f"gradients: {path} is not an npz file of plain arrays: {error}") from error
    names = tuple(map(str, arrays.get("names", np.array([])).tolist()))
    shapes = _shapes(path, arrays.get("shapes", np.array([])).tolist())
    length = sum(map(prod, shapes))
    moments = {}
    for key in arrays:
        if key.startswith(_WORKERS):
            name = key.removeprefix(_WORKERS)
            workers = _rows(path, arrays, key, length)
            earlier = _EARLIER + name
            moments[name] = Moment(workers, _rows(path, arrays, earlier, length) if earlier in arrays else workers[:0])
            if not len(workers):
                raise ConfigurationError(f"gradients: {path}: {key} holds no worker")
    if not moments or "task" not in arrays or len(names) != len(shapes):
        raise ConfigurationError(
            f"gradients: {path} must hold task, names, shapes and workers_<moment>, found "
            f"{', '.join(arrays) or 'nothing'}; benchmarks/record_gradients.py writes such files"
        )
    return Recorded(str(arrays["task"]), names, shapes, moments)


def _shapes(path: str | Path, texts: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(int(size) for size in str(text).split("x") if text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"gradients: {path}: shapes must be such as 64x3x3x3: {error}") from error


def _rows(path: str | Path, arrays: Mapping[str, NDArray[Any]], key: str, length: int) -> _Floats:
    found = arrays[key]
    if found.ndim != 2 or found.shape[1] != length or found.dtype != np.float32:
        raise ConfigurationError(
            f"gradients: {path}: {key} must be float32 [rows, {length}], as the shapes add up, "
            f"found {found.dtype} {list(found.shape)}"
        )
    if not np.isfinite(found).all():
        raise ConfigurationError(f"gradients: {path}: {key} holds numbers that are not finite; record another step")
    return found
