"""Defines the cells that `evenkeel bench gradients` measures, and the folder of finished ones. Without torch."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from evenkeel.errors import ConfigurationError, EvenkeelError

__all__ = [
    "BASELINE",
    "PIPE_WARM_SHARE",
    "PROGRESS",
    "TASKS",
    "Cell",
    "Records",
    "TaskSettings",
    "Training",
    "check_method",
]

BASELINE = "fp32"
PIPE_WARM_SHARE = 0.1  # of the steps; gradients change fast in them
PROGRESS = "@"  # begins rank 0's lines of progress: number of the cell, steps done
_CODES = (
    r"bf16|powersgd[1-9]\d*|thc[1-8]?(-no-ef)?|gradiveq([2-9]|[1-9]\d+)?(\+thc)?|"
    r"lowrank[1-9]\d*(\+thc[1-8]?)?(-no-ef)?"
)
_METHOD = re.compile(rf"fp32|pipe(-ahead)?|(pipe(-ahead)?\+)?({_CODES})")
_METHODS = (
    "fp32",
    "bf16",
    "powersgd1",
    "powersgd4",
    "thc",
    "lowrank16+thc",
    "pipe",
    "pipe+thc",
    "pipe-ahead+thc",
    "pipe+lowrank16+thc",
)
_CONVOLUTIONS = ("gradiveq", "gradiveq+thc", "pipe+gradiveq+thc")


@dataclass(frozen=True)
class TaskSettings:
    """How a task is trained unless told otherwise.

    Attributes:
        steps: on data that were given.
        quick_steps: on the stand-in when no data were given.
        batch: examples a step, for each worker.
        methods: compared by default.
    """

    steps: int
    quick_steps: int
    batch: int
    methods: tuple[str, ...]


TASKS = {
    "mlp": TaskSettings(150, 30, 128, _METHODS),
    "convnet": TaskSettings(300, 40, 64, (*_METHODS, *_CONVOLUTIONS)),
    "transformer": TaskSettings(200, 30, 64, _METHODS),
}


@dataclass(frozen=True, order=True)
class Cell:
    """One training: a task with a method at a rate, from a seed."""

    task: str
    method: str
    rate: str
    seed: int


@dataclass(frozen=True)
class Training:
    """What all cells of a task have in common; cells with another one are not compared.

    Attributes:
        steps: of training.
        batch: examples a step, for each worker.
        workers: how many train.
        evaluations: how often the test accuracy is taken, the last time after the last step.
        data: which data: where from, and a checksum.
    """

    steps: int
    batch: int
    workers: int
    evaluations: int
    data: str


class Records:
    """A folder with one file for each finished cell.

    Args:
        folder: made when the first cell is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, cell: Cell, training: Training) -> dict[str, Any] | None:
        """What was kept of a cell; None if it was not trained yet, or differently.

        Raises:
            ConfigurationError: the file is damaged.
        """
        path = self._path(cell, training)
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"records: {path} cannot be read ({error}); remove it to measure it again"
            ) from None
        if not isinstance(record, dict) or record.get("cell") != asdict(cell):
            raise ConfigurationError(f"records: {path} is not a record of {cell}; remove it to measure it again")
        return record

    def keep(self, cell: Cell, training: Training, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write what came of a cell, all or nothing, and give it back as `find` will."""
        record = {"cell": asdict(cell), "training": asdict(training), **figures}
        path = self._path(cell, training)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            half = path.with_suffix(".part")
            half.write_text(json.dumps(record), encoding="utf-8")
            os.replace(half, path)
        except OSError as error:
            raise EvenkeelError(f"{path} cannot be written: {error.strerror or error}") from error
        return record

    def _path(self, cell: Cell, training: Training) -> Path:
        settings = crc32(json.dumps(asdict(training), sort_keys=True).encode())
        return self._folder / f"{cell.task}-{cell.method}-{cell.rate}-seed{cell.seed}-{settings:08x}.json"


def check_method(name: str) -> None:
    """Refuse a method that there is not.

    Raises:
        ConfigurationError: it is not known.
    """
    if not _METHOD.fullmatch(name):
        raise ConfigurationError(
            f"methods: there is no {name!r}; there are fp32, bf16, powersgd1 (any rank), thc (thc2: 2 bits), gradiveq "
            "(gradiveq4: ratio 4), gradiveq+thc, lowrank4 (any rank), lowrank4+thc (lowrank4+thc2: 2 bits), pipe, "
            "pipe-ahead, pipe+ or pipe-ahead+ before any of them but fp32, and -no-ef (without error feedback) after "
            "thc and lowrank"
        )
