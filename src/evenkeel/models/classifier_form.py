"""Works out from an ONNX graph's signature how a classifier takes images, and which output are its scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import DataType, Layout, ModelCard

__all__ = ["ACCEPTED", "InputForm", "Normalisation", "input_form", "output_name"]

ACCEPTED = "one input of images, uint8 or float32, [n, h, w, 3] or [n, 3, h, w], and one output of scores [n, classes]"
_DATATYPES: dict[str, DataType] = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32"}
_SCORE_TYPES = ("tensor(float)", "tensor(double)", "tensor(float16)")


Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Normalisation:
    """`(pixels * scale - mean) / std`, pixels 0..255."""

    scale: float = 1.0
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse what is no normalisation."""
        if not 0 < self.scale < float("inf"):
            raise ConfigurationError(f"scale must be a number above zero, found {self.scale!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.isfinite(values).all():
                raise ConfigurationError(f"{name} must be three numbers, for red, green and blue, found {values!r}")
        if min(self.std) <= 0:
            raise ConfigurationError(f"std must be above zero, found {self.std!r}")

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels [n, h, w, 3] normalised, as one multiplication and one addition."""
        std = np.array(self.std, np.float64)
        factor = (self.scale / std).astype(np.float32)
        offset = (-np.array(self.mean, np.float64) / std).astype(np.float32)
        return pixels.astype(np.float32) * factor + offset


@dataclass(frozen=True)
class InputForm:
    """What the graph takes, and how pixels become it: normalised for FP32, untouched for UINT8."""

    name: str
    layout: Layout
    datatype: DataType
    height: int
    width: int
    fixed_batch: bool  # takes exactly one row
    normalisation: Normalisation

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one image."""
        if self.layout == "NHWC":
            return (1, self.height, self.width, 3)
        return (1, 3, self.height, self.width)

    def prepared(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Pixels [n, h, w, 3] as the graph takes them."""
        rows: NDArray[Any] = self.normalisation(pixels) if self.datatype == "FP32" else pixels
        return np.ascontiguousarray(rows if self.layout == "NHWC" else rows.transpose(0, 3, 1, 2))


def input_form(
    session: Any, file: Path, card: ModelCard | None, side: int | None, normalisation: Normalisation
) -> InputForm:
    """How the graph of `session` takes images.

    Args:
        session: of ONNX Runtime.
        file: for messages.
        card: decides where there is one, and is held against the graph.
        side: height and width, where neither graph nor card says them.
        normalisation: for a graph of float32 without a card.

    Raises:
        ConfigurationError: the graph takes no images, not one image a row, or not what its card says.
    """
    inputs = session.get_inputs()
    found = ", ".join(f"{each.name} {each.type} {_listed(each.shape)}" for each in inputs) or "none"

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(f"classifier {file}: {why}; its inputs are {found}; expected {ACCEPTED}")

    if len(inputs) != 1:
        raise refuse(f"it takes {len(inputs)} inputs")
    taken = inputs[0]
    if card is not None and taken.name != card.input_name:
        raise refuse(f"its card's 'input_name' is {card.input_name!r}")
    datatype = _DATATYPES.get(taken.type)
    if datatype is None:
        raise refuse(f"its input is {taken.type}")
    shape = list(taken.shape)
    if len(shape) != 4:
        raise refuse(f"its input has {len(shape)} axes")
    layout = _layout(shape, card)
    if layout is None and 1 in (shape[1], shape[3]) and 3 not in shape[1:]:
        raise refuse("it takes grey images; put the step from 3 colours to one in front of it, in the graph")
    if layout is None:
        raise refuse("it cannot be told which axis of its input holds the 3 colours; write a model card that says so")
    if isinstance(shape[0], int) and shape[0] != 1:
        raise refuse(f"it takes exactly {shape[0]} images at once; export it with a free or single first axis")
    axes = shape[1:3] if layout == "NHWC" else shape[2:4]
    height, width = (card.height, card.width) if card is not None else (side, side)
    found_height, found_width = (
        length if isinstance(length, int) else given for length, given in zip(axes, (height, width), strict=True)
    )
    if found_height is None or found_width is None:
        raise refuse("it leaves the size of its images open; say it with side")
    if height not in (None, found_height) or width not in (None, found_width):
        raise refuse(f"images of {height} x {width} were asked for, it takes {found_height} x {found_width}")
    if found_height < 1 or found_width < 1:
        raise refuse(f"images of {found_height} x {found_width} pixels cannot be")
    if card is not None:
        normalisation = _of_card(card, datatype, refuse)
    return InputForm(taken.name, layout, datatype, found_height, found_width, isinstance(shape[0], int), normalisation)


def _layout(shape: list[Any], card: ModelCard | None) -> Layout | None:
    first, last = shape[1] == 3, shape[3] == 3
    if card is not None:
        # An axis of open length may be the colours' too; what it really takes shows when it is run.
        fits = shape[3] if card.layout == "NHWC" else shape[1]
        return card.layout if fits == 3 or not isinstance(fits, int) else None
    if first == last:
        return None
    return "NCHW" if first else "NHWC"


def _of_card(card: ModelCard, datatype: DataType, refuse: Callable[[str], ConfigurationError]) -> Normalisation:
    wanted = card.datatype if card.normalisation_inside else "FP32"
    if datatype != wanted:
        raise refuse(f"its card's 'datatype' and 'normalisation_inside' say {wanted}")
    if card.normalisation_inside:
        return Normalisation()
    return Normalisation(1 / 255, cast(Channels, card.mean), cast(Channels, card.std))


def output_name(session: Any, file: Path, card: ModelCard | None) -> str:
    """Which output of the graph is the scores: the card's, or the only one that may be.

    Raises:
        ConfigurationError: none, or several.
    """
    outputs = session.get_outputs()
    found = ", ".join(f"{each.name} {each.type} {_listed(each.shape)}" for each in outputs)
    if card is not None:
        if card.output_name not in [each.name for each in outputs]:
            raise ConfigurationError(
                f"classifier {file}: its card's 'output_name' is {card.output_name!r}, its outputs are {found}"
            )
        return card.output_name
    # ONNX Runtime gives an empty shape where the graph does not tell.
    fitting = [each for each in outputs if each.type in _SCORE_TYPES and len(each.shape or ()) in (0, 2)]
    if len(fitting) != 1:
        why = "no output" if not fitting else f"{len(fitting)} outputs"
        raise ConfigurationError(
            f"classifier {file}: {why} may be scores [n, classes]; its outputs are {found}; expected {ACCEPTED}"
            + ("" if not fitting else ", or a model card that names the output")
        )
    return str(fitting[0].name)


def _listed(shape: list[Any] | None) -> str:
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"
