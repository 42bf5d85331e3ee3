"""Loads the models that a worker runs: an ONNX file with its card, or a Python callable of the user's."""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.digest import card_digest, read_whole
from evenkeel.models.session import external_files, open_session
from evenkeel.models.shipped import NAMES, card_path

__all__ = ["Model", "load_model", "split_name"]

_ONNX_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
_CARD_TYPES = {"UINT8": "uint8", "FP32": "float32"}


@dataclass(frozen=True)
class Model:
    """Holds a function from rows to rows, and what is known of their shapes.

    Attributes:
        name: how tasks ask for it.
        run: `[rows, *input_shape]` (read-only) -> `[rows, *output_shape]`.
        input_shape: of one row; None where any is taken.
        output_shape: of one row; None where unknown.
        dtype: numpy name of the input's dtype; None where any is taken.
        relative_cost: of one pass, relative to the classifier's that it backs up.
        digest: of what it computes, as `evenkeel.models.digest` makes it; "" where nobody knows.
        one_by_one: it takes one row at a time, so that more in one pass gain nothing.
        batch: rows of waiting tasks that one pass should take together, at most.
    """

    name: str
    run: Callable[[Array], Array]
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    dtype: str | None = None
    relative_cost: float = 1.0
    digest: str = ""
    one_by_one: bool = False
    batch: int = 1


def load_model(spec: str, threads: int = 1) -> Model:
    """Loads the model that `spec` names, checks it and runs it once.

    Args:
        spec: path of a model card (`.json`), name of a shipped model, `python:package.module:factory` or
            `python:file.py:factory`; in front `NAME=` gives it another name. `factory()` returns a callable from
            `[rows, ...]` to `[rows, ...]`; if that has attributes `input_shape`, `output_shape`, `dtype` and
            `relative_cost`, they are used. Its name is its module's.
        threads: that one pass may use (ONNX only).

    Raises:
        ConfigurationError: nothing there, or not what its card says.
    """
    name, rest = split_name(spec)
    model = _load_python(rest) if rest.startswith("python:") else _load_onnx(_card_file(rest), threads)
    return replace(model, name=name or model.name)


def split_name(spec: str) -> tuple[str, str]:
    """Splits a spec into the name that stands in front of it, or "", and the rest."""
    # A path may hold `=` too: one that is there is no name with a path behind it.
    named = None if Path(spec).is_file() else re.match(r"([\w.-]+)=", spec)
    return (named[1], spec[named.end() :]) if named else ("", spec)


def _card_file(text: str) -> str:
    if text in NAMES:
        return str(card_path(text))
    if not text.endswith(".json"):
        raise ConfigurationError(
            f"model {text!r}: expected a model card (.json), python:module:factory or one of {', '.join(NAMES)}"
        )
    return text


def _load_python(spec: str) -> Model:
    where, _, factory_name = spec.removeprefix("python:").rpartition(":")
    if not where or not factory_name:
        raise ConfigurationError(f"model {spec!r}: expected python:package.module:factory or python:file.py:factory")
    try:
        module = _module_of_file(where) if where.endswith(".py") else _module_by_name(where)
        factory = getattr(module, factory_name)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigurationError(f"model {spec!r}: {error}") from error
    try:
        run = factory()
    except Exception as error:
        raise ConfigurationError(f"model {spec!r}: its factory raised {type(error).__name__}: {error}") from error
    if not callable(run):
        raise ConfigurationError(f"model {spec!r}: its factory must return a callable, not {type(run).__name__}")
    return Model(
        Path(where).stem if where.endswith(".py") else where.rpartition(".")[2],
        run,
        _shape(spec, run, "input_shape"),
        _shape(spec, run, "output_shape"),
        _dtype(spec, run),
        _relative_cost(spec, run),
        _source_digest(where),
    )


def _source_digest(where: str) -> str:
    """Hashes a Python file alone, not what it imports; empty for a module by name, which may come from anywhere."""
    return f"python:{hashlib.sha256(Path(where).read_bytes()).hexdigest()}" if where.endswith(".py") else ""


def _module_by_name(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # a user's module lies where the command was given
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _module_of_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shape(spec: str, run: object, attribute: str) -> tuple[int, ...] | None:
    shape = getattr(run, attribute, None)
    if shape is None:
        return None
    try:
        return tuple(int(length) for length in shape)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model {spec!r}: its {attribute} must be a tuple of integers") from error


def _dtype(spec: str, run: object) -> str | None:
    dtype = getattr(run, "dtype", None)
    if dtype is None:
        return None
    try:
        return str(np.dtype(dtype).name)
    except TypeError as error:
        raise ConfigurationError(f"model {spec!r}: its dtype {dtype!r} is none of numpy's") from error


def _relative_cost(spec: str, run: object) -> float:
    cost = getattr(run, "relative_cost", 1.0)
    if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not 0 < cost < 1e6:
        raise ConfigurationError(f"model {spec!r}: its relative_cost must be a number above zero, found {cost!r}")
    return float(cost)


def _load_onnx(path: str, threads: int) -> Model:
    card = load_card(path)
    file = Path(path).parent / card.file
    content = read_whole(card, Path(path))
    files = [file, *(file.parent / name for name in external_files(content))]
    before = _identities(files)
    digest = card_digest(card, file.parent)
    session = open_session(file, threads)
    if _identities(files) != before:
        raise ConfigurationError(f"model card {path}: {file} or its weights were replaced while read; start again")
    one_by_one = _check_graph(session, card, path)
    # Items come as pixels; what a code makes of them in FP32 it has normalised already (`coding/answers/tiles.py`).
    normalised = card.normalisation_inside or (card.kind != "classifier" and card.datatype == "FP32")
    normalise = _no_change if normalised else _normaliser(card)
    names, input_name = [card.output_name], card.input_name

    def run(rows: Array) -> Array:
        prepared = normalise(rows)
        if one_by_one and len(prepared) > 1:
            return np.concatenate([session.run(names, {input_name: row[None]})[0] for row in prepared])
        output: Array = session.run(names, {input_name: prepared})[0]
        return output

    dtype = _CARD_TYPES[card.datatype]
    model = Model(card.name, run, card.input_shape, card.output_shape, dtype, card.relative_cost, digest, one_by_one)
    first = run(np.zeros((1, *card.input_shape), dtype))  # so that the first task is not the slow one
    expected = (1, *((*first.shape[1:2], 5 + len(card.classes)) if card.output_shape is None else card.output_shape))
    if first.shape != expected:
        raise ConfigurationError(f"model card {path}: one row gives {first.shape}, the card says {expected}")
    return model


def _identities(files: Sequence[Path]) -> list[tuple[int, ...] | None]:
    """Reads, for each file, what another file in the same place would differ in; None where there is no file."""
    found = [file.stat() if file.is_file() else None for file in files]
    return [(each.st_ino, each.st_size, each.st_mtime_ns) if each else None for each in found]


def _check_graph(session: Any, card: ModelCard, path: str) -> bool:
    """True when the graph takes one row at a time."""

    def refuse(what: str) -> None:
        raise ConfigurationError(f"model card {path}: {what}")

    inputs = {each.name: each for each in session.get_inputs()}
    outputs = {each.name: each for each in session.get_outputs()}
    if list(inputs) != [card.input_name]:
        refuse(f"field 'input_name' is {card.input_name!r}, the model's inputs are {sorted(inputs)}")
    if card.output_name not in outputs:
        refuse(f"field 'output_name' is {card.output_name!r}, the model's outputs are {sorted(outputs)}")
    taken, wanted = inputs[card.input_name], "float32" if not card.normalisation_inside else _CARD_TYPES[card.datatype]
    if _ONNX_TYPES.get(taken.type) != wanted:
        refuse(
            f"the model's input is {taken.type}; by fields 'datatype' and 'normalisation_inside' it must be {wanted}"
        )
    if not taken.shape:
        refuse("the model's input has no axes")
    if not _fits(taken.shape[1:], card.input_shape):
        refuse(f"the model's input is {taken.shape}, the card says rows of {card.input_shape}")
    rows = taken.shape[0]
    if isinstance(rows, int) and rows != 1:
        refuse(f"the model takes exactly {rows} rows at once; export it with a free or single first axis")
    return isinstance(rows, int)


def _fits(found: list[Any], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(
        not isinstance(length, int) or length == expected for length, expected in zip(found, wanted, strict=True)
    )


def _no_change(rows: Array) -> Array:
    return rows


def _normaliser(card: ModelCard) -> Callable[[Array], Array]:
    # (x / 255 - mean) / std as one multiplication and one addition
    axes = (1, 1, 3) if card.layout == "NHWC" else (3, 1, 1)
    std = np.array(card.std, np.float64)
    factor = (1 / (255 * std)).astype(np.float32).reshape(axes)
    offset = (-np.array(card.mean, np.float64) / std).astype(np.float32).reshape(axes)

    def normalise(rows: Array) -> Array:
        normalised: Array = rows.astype(np.float32) * factor + offset
        return normalised

    return normalise
