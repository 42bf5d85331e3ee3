"""Defines the cells that `evenkeel bench gradients` measures, and the folder of finished ones. Without torch."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from evenkeel.errors import ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.text_values import read_count, read_duration_s, read_number, read_share, split_spec

__all__ = [
    "BASELINE",
    "PIPE_WARM_SHARE",
    "PROGRESS",
    "TASKS",
    "Cell",
    "Method",
    "Records",
    "TaskSettings",
    "Training",
    "read_method",
    "read_slow",
]

BASELINE = "fp32"
PIPE_WARM_SHARE = 0.1  # of the steps; gradients change fast in them
PROGRESS = "@"  # begins rank 0's lines of progress: number of the cell, steps done
_SCHEDULES = ("pipe", "pipe-ahead")
_HOOKS_OF_TORCH = re.compile(r"fp32|bf16|powersgd:rank=[1-9]\d*")
_OLD = re.compile(
    r"powersgd(?P<powersgd>[1-9]\d*)|thc(?P<bits>[1-8])|gradiveq(?P<ratio>[2-9]|[1-9]\d+)(?P<coded>\+thc)?|"
    r"lowrank(?P<rank>[1-9]\d*)(?P<factors>\+thc(?P<factor_bits>[1-8]?))?"
)
_METHODS = (
    "fp32",
    "bf16",
    "powersgd:rank=1",
    "powersgd:rank=4",
    "thc",
    "lowrank:rank=16+thc:block=512",
    "pipe",
    "pipe+thc",
    "pipe-ahead+thc",
    "pipe+lowrank:rank=16+thc:block=512",
)
_CONVOLUTIONS = ("gradiveq", "gradiveq:ratio=2+thc", "pipe+gradiveq:ratio=2+thc")


@dataclass(frozen=True)
class TaskSettings:
    """Says how a task is trained by default.

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
    """Names one training: a task with a method at a rate, from a seed."""

    task: str
    method: str
    rate: str
    seed: int


@dataclass(frozen=True)
class Training:
    """Holds what all cells of a task have in common; cells with another one are not compared.

    Attributes:
        steps: of training.
        batch: examples a step, for each worker.
        workers: how many train.
        evaluations: how often the test accuracy is taken, the last time after the last step.
        data: which data: where from, and a checksum.
        loss: share of packets that each link loses.
        slow: `FACTOR:SHARE[:all]`: the last worker, or each, is so many times as slow in a share of the steps.
    """

    steps: int
    batch: int
    workers: int
    evaluations: int
    data: str
    loss: float = 0.0
    slow: str = ""


class Records:
    """Keeps one file for each finished cell in a folder.

    Args:
        folder: made when the first cell is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, cell: Cell, training: Training) -> dict[str, Any] | None:
        """Gives what was kept of a cell; None if it was not trained yet, or differently.

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
        """Writes what came of a cell, all or nothing, and gives it back as `find` will."""
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
        said = {name: value for name, value in asdict(training).items() if value not in (0.0, "")}
        settings = crc32(json.dumps(said, sort_keys=True).encode())
        method = cell.method.replace("/", "%")  # of a fraction
        return self._folder / f"{cell.task}-{method}-{cell.rate}-seed{cell.seed}-{settings:08x}.json"


@dataclass(frozen=True)
class Method:
    """Says how gradients are averaged, as a name such as `pipe+thc:bits=2` has it.

    Attributes:
        schedule: `pipe`, `pipe-ahead`, or none.
        code: `fp32`, `bf16`, `powersgd:rank=4`, or a sum code as `coding/sums/by_name.py` names it.
        error_feedback: whether what a sum code loses is kept.
        switch: settings of the SwitchReducer that adds, as keywords; None: shares.
    """

    schedule: str
    code: str
    error_feedback: bool
    switch: dict[str, float] | None = None

    @property
    def is_sum_code(self) -> bool:
        """Tells whether evenkeel's own hook averages."""
        return not _HOOKS_OF_TORCH.fullmatch(self.code)


def read_method(name: str) -> Method:
    """Reads a method's name: `[pipe+|pipe-ahead+][no-ef+]code[@switch[:settings]]`, or a schedule alone.

    Raises:
        ConfigurationError: there is no such method.
        MissingExtraError: there is no torch, so no sum codes.
    """
    plain, at, adder = name.partition("@")
    if at:
        method = read_method(plain)
        if not method.is_sum_code:
            raise _unknown(name, f"a switch adds the messages of sum codes, and {method.code} is none")
        return replace(method, switch=_switch_settings(adder, name))
    if name in _SCHEDULES:
        return Method(name, BASELINE, error_feedback=False)
    head, plus, rest = name.partition("+")
    schedule, code = (head, rest) if plus and head in _SCHEDULES else ("", name)
    feedback = not code.startswith("no-ef+") and not code.endswith("-no-ef")
    method = Method(schedule, _new_spelling(code.removeprefix("no-ef+").removesuffix("-no-ef"), name), feedback)
    if method.is_sum_code:
        _check_sum_code(method.code, name)
    elif (schedule and method.code == BASELINE) or not feedback:
        raise _unknown(name, f"{method.code} has no error feedback, and pipe alone is fp32")
    return method


def _switch_settings(text: str, name: str) -> dict[str, float]:
    """Reads `switch:deadline=50ms,recode=5`."""
    kind, settings = split_spec(text, "method")
    if kind != "switch":
        raise _unknown(name, f"only switch stands behind @, found {kind!r}")
    found: dict[str, float] = {}
    for key, value in settings.items():
        if key == "deadline":
            found[key] = read_duration_s(value, f"methods: {name}: deadline")
        elif key in ("at_least", "recode", "window"):
            found[key] = read_count(value, f"methods: {name}: {key}")
        else:
            raise _unknown(name, f"a switch has deadline=, at_least=, recode= and window=, found {key!r}")
    return found


def read_slow(text: str) -> tuple[float, float, bool]:
    """Reads `5:0.1` or `5:0.1:all`: so many times as slow, in a share of the steps, all workers or the last one.

    Raises:
        ConfigurationError: it is not of that form.
    """
    if not text:
        return 1.0, 0.0, False
    factor, _, rest = text.partition(":")
    share, _, who = rest.partition(":")
    if who not in ("", "all") or not rest:
        raise ConfigurationError(f"slow: must be FACTOR:SHARE or FACTOR:SHARE:all, such as 5:0.1, found {text!r}")
    times = read_number(factor, "slow")
    if times < 1:
        raise ConfigurationError(f"slow: the factor must be at least 1, found {factor}")
    return times, read_share(share, "slow"), who == "all"


def _new_spelling(code: str, name: str) -> str:
    """Gives what `lowrank16+thc` is called since every code's settings have names."""
    if code == "gradiveq+thc":
        raise ConfigurationError(
            f"methods: {name!r} was GradiVeQ with a ratio of 2, but without a ratio it is 8 now: "
            f"write {name.replace('gradiveq', 'gradiveq:ratio=2')} or {name.replace('gradiveq', 'gradiveq:ratio=8')}"
        )
    found = _OLD.fullmatch(code)
    if not found:
        return code
    if found["powersgd"]:
        return f"powersgd:rank={found['powersgd']}"
    if found["bits"]:
        return f"thc:bits={found['bits']}"
    if found["ratio"]:
        return f"gradiveq:ratio={found['ratio']}{found['coded'] or ''}"
    # No longer blocks than most sides of the matrices here, so that strong directions do not blur weak ones.
    inner = f"+thc:bits={found['factor_bits'] or 4},block=512" if found["factors"] else ""
    return f"lowrank:rank={found['rank']}{inner}"


def _check_sum_code(code: str, name: str) -> None:
    try:
        from evenkeel.coding.sums.by_name import code_of
    except ImportError as error:
        raise MissingExtraError("PyTorch", "train") from error
    try:
        code_of(code)
    except ConfigurationError as error:
        raise _unknown(name, str(error)) from error


def _unknown(name: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"methods: there is no {name!r}; there are fp32, bf16, powersgd:rank=1, sum codes such as thc:bits=2 and "
        "lowrank:rank=16+thc:block=512, no-ef+ before a sum code (without error feedback), @switch behind one, pipe, "
        f"pipe-ahead, and pipe+ or pipe-ahead+ before any of them but fp32 ({why})"
    )
