"""Reads and writes model cards: what a model file expects, what it gives, and what was measured of it.

A card is a JSON file beside its ONNX file. Everything that serving has to know about a model stands here, so that no
grid, tile side, class list or normalisation is ever written down twice (or, worse, hard-coded in one place and
different in another). Cards are checked on reading: a wrong one is refused with the name of the field.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from evenkeel.errors import ConfigurationError
from evenkeel.files import write_whole
from evenkeel.text_values import is_text, read_json

__all__ = ["FORMAT", "Measured", "ModelCard", "class_difference", "load_card", "save_card"]

FORMAT = 1
_MAX_SHOWN = 40  # characters of a class's name in a message
Layout = Literal["NHWC", "NCHW"]
DataType = Literal["UINT8", "FP32"]
ModelKind = Literal["classifier", "collage", "detector", "parity"]
Encoder = Literal["sum", "concat"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Measured:
    """Holds one measured share with its 95 % interval, and how it was measured."""

    value: float
    low: float
    high: float
    sample_size: int
    how: str


@dataclass(frozen=True)
class ModelCard:
    """Describes what a model expects, gives and was measured to do.

    A `classifier` takes one image a row and gives scores `[n, classes]`. A `collage` takes one canvas of
    `grid` x `grid` tiles a row, side `grid * tile_side`, and gives scores `[n, grid * grid, classes]`, cells row by
    row. A `detector` takes the same canvas and gives boxes `[n, boxes, 5 + classes]`
    (`coding/answers/boxes.py`). A `parity` takes the parity item of up to `group` items a row and gives the sum of
    their scores `[n, classes]`.
    """

    name: str
    kind: ModelKind
    file: str  # ONNX file, relative to the card
    sha256: str  # of that file; checked when the model is loaded
    classes: tuple[str, ...]
    height: int  # of the model's input (of the whole canvas for a collage), pixels
    width: int
    layout: Layout = "NHWC"
    datatype: DataType = "UINT8"
    input_name: str = "images"
    output_name: str = "scores"
    scores: Literal["logits", "probabilities"] = "logits"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixel values in 0..1; (x / 255 - mean) / std
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    normalisation_inside: bool = True  # True: the ONNX graph normalises by itself
    grid: int = 1
    tile_side: int = 0  # pixels; 0 where there are no tiles
    encoder: Encoder | None = None  # of a parity model: how its parity item is made
    group: int = 1  # of a parity model: ParM's k
    interpolation: Interpolation = "lanczos"  # how an image is scaled to the model's size, or to a tile
    # Of a collage: an item of other proportions is squeezed into its square tile; else its middle square is cut out.
    squeezed: bool = False
    mirrored: bool = False  # of a collage: items mean the same mirrored, so that free cells may show them so
    temperature: float = 1.0  # confidence = max softmax(logits / temperature)
    version: str = "1"
    macs: int = 0  # multiply-accumulates of one pass
    parameters: int = 0
    latency_ms: float = 0.0  # median of one pass, one thread, ONNX Runtime
    relative_cost: float = 1.0  # one pass of this model / one pass of the classifier it backs up, measured
    accuracy: Measured | None = None  # against labels
    agreement: Measured | None = None  # with the classifier it backs up
    agreement_elsewhere: Measured | None = None  # on images that are not given the largest class
    largest_class_share: float | None = None  # of the classifier's answers; always saying that class agrees so often
    min_confidence: float = 0.0  # fills that are less sure are not used; above 1: none is
    # Rows [confidence low, high, count, accuracy], rising: how often answers of such a confidence are right.
    reliability: tuple[tuple[float, float, int, float], ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # how it was trained, on what machine, from which data

    @property
    def cells(self) -> int:
        """Counts the items that one pass covers."""
        return self.group if self.kind == "parity" else self.grid * self.grid

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Gives the shape of one input row, in the card's layout."""
        if self.layout == "NHWC":
            return (self.height, self.width, 3)
        return (3, self.height, self.width)

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Gives the shape of one output row; None for a detector, which may give any number of boxes."""
        if self.kind == "detector":
            return None
        return (self.cells, len(self.classes)) if self.kind == "collage" else (len(self.classes),)


def load_card(path: str | Path) -> ModelCard:
    """Reads and checks the card at `path`.

    Raises:
        ConfigurationError: not readable, not JSON, an unknown or missing field, or a value that contradicts another.
    """
    path = Path(path)
    try:
        raw = read_json(path.read_text(encoding="utf-8-sig"))  # some editors begin with a byte-order mark
    except OSError as error:
        raise ConfigurationError(f"model card {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigurationError(f"model card {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigurationError(f"model card {path}: expected a JSON object, found {type(raw).__name__}")
    if raw.pop("evenkeel_card", None) != FORMAT:
        raise ConfigurationError(f"model card {path}: field 'evenkeel_card' must be {FORMAT}")
    for share in ("accuracy", "agreement", "agreement_elsewhere"):
        if raw.get(share) is not None:
            try:
                raw[share] = Measured(**raw[share])
            except TypeError as error:
                raise ConfigurationError(f"model card {path}: field {share!r}: {error}") from error
    for name in ("classes", "mean", "std", "reliability"):
        if isinstance(raw.get(name), list):
            raw[name] = tuple(tuple(each) if isinstance(each, list) else each for each in raw[name])
    try:
        card = ModelCard(**raw)
    except TypeError as error:
        raise ConfigurationError(f"model card {path}: {error}") from error
    _check(card, path)
    return card


def save_card(card: ModelCard, path: str | Path) -> None:
    """Writes `card` as indented JSON, whole or not at all."""
    text = json.dumps({"evenkeel_card": FORMAT, **asdict(card)}, indent=2)
    write_whole(path, f"{text}\n".encode())


def class_difference(one: Sequence[str], other: Sequence[str]) -> str:
    """Says where two lists of classes first differ; empty where they are the same in the same order."""
    if len(one) != len(other):
        return f"they have {len(one)} and {len(other)}"
    for place, (mine, others) in enumerate(zip(one, other, strict=True)):
        if mine != others:
            pair = f"the first that differ, number {place}, are {mine[:_MAX_SHOWN]!r} and {others[:_MAX_SHOWN]!r}"
            return f"only their order differs: {pair}" if sorted(one) == sorted(other) else pair
    return ""


def _check(card: ModelCard, path: Path) -> None:
    def refuse(name: str, why: str) -> None:
        raise ConfigurationError(f"model card {path}: field {name!r} {why}")

    choices = {
        "kind": ("classifier", "collage", "detector", "parity"),
        "encoder": ("sum", "concat") if card.kind == "parity" else (None,),
        "layout": ("NHWC", "NCHW"),
        "datatype": ("UINT8", "FP32"),
        "scores": ("logits", "probabilities"),
        "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    }
    for name, allowed in choices.items():
        if getattr(card, name) not in allowed:
            wanted = f"one of {', '.join(map(str, allowed))}" if allowed != (None,) else f"left out for a {card.kind}"
            refuse(name, f"must be {wanted}, found {getattr(card, name)!r}")
    for name in ("name", "file", "sha256", "input_name", "output_name", "version"):
        if not isinstance(getattr(card, name), str) or not getattr(card, name) or not is_text(getattr(card, name)):
            refuse(name, "must be a non-empty string that can be written as UTF-8")
    if Path(card.file).is_absolute() or ".." in Path(card.file).parts:
        refuse("file", "must be a path below the card's own folder")
    if len(card.classes) < 2 or not all(isinstance(label, str) for label in card.classes):
        refuse("classes", "must list two or more label names")
    if not all(is_text(label) for label in card.classes):
        refuse("classes", "holds a name that cannot be written as UTF-8; name that class otherwise")
    for name in ("height", "width", "grid", "group"):
        value = getattr(card, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            refuse(name, f"must be a positive integer, found {value!r}")
    for name in ("mean", "std"):
        values = getattr(card, name)
        if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
            refuse(name, "must be three numbers")
    for name in ("mirrored", "squeezed"):
        value = getattr(card, name)
        if not isinstance(value, bool) or (value and card.kind != "collage"):
            refuse(name, "must be true or false, and false for all but a collage")
    if min(card.std) <= 0:
        refuse("std", "must be above zero")
    if not isinstance(card.temperature, (int, float)) or not 0 < card.temperature < 1e6:
        refuse("temperature", "must be a number above zero")
    least = card.min_confidence
    if not isinstance(least, (int, float)) or isinstance(least, bool) or not 0 <= least <= 2:
        refuse("min_confidence", f"must be a number from 0 to 2, found {least!r}")
    if least and card.kind != "collage":
        refuse("min_confidence", "is only known of a collage")
    if card.kind in ("collage", "detector"):
        if card.height != card.grid * card.tile_side or card.width != card.grid * card.tile_side:
            refuse("tile_side", f"times grid must equal height and width ({card.height} x {card.width})")
    elif card.grid != 1:
        refuse("grid", f"must be 1 for a {card.kind}")
    if card.kind == "parity":
        if card.encoder == "sum" and card.datatype != "FP32":
            refuse("datatype", "must be FP32 for a sum of items, which leaves the range of UINT8")
    elif card.group != 1:
        refuse("group", f"must be 1 for a {card.kind}")
    if card.reliability is not None and not _is_reliability(card.reliability):
        refuse("reliability", "must list rows [confidence low, high, count, accuracy] that rise from 0 to 1")


def _is_reliability(rows: object) -> bool:
    if not isinstance(rows, tuple):
        return False
    reached = 0.0
    for row in rows:
        if not isinstance(row, tuple) or len(row) != 4:
            return False
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in row):
            return False
        low, high, count, accuracy = row
        if not (reached <= low < high <= 1 and isinstance(count, int) and count >= 1 and 0 <= accuracy <= 1):
            return False
        reached = high
    return True
