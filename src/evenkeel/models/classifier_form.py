"""Works out from an ONNX graph's signature how a classifier takes images, and which output are its scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import DataType, Layout, ModelCard

__all__ = [
    "ACCEPTED",
    "GREY_WEIGHTS",
    "Colours",
    "FormHints",
    "InputForm",
    "Normalisation",
    "input_form",
    "output_name",
]

ACCEPTED = (
    "one input of images, uint8 or float, [n, h, w, 3] or [n, 3, h, w] (or one channel of grey), and one output of "
    "scores [n, classes]"
)
_DTYPES = {"tensor(uint8)": "u1", "tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8"}
_SCORE_TYPES = ("tensor(float)", "tensor(double)", "tensor(float16)")
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue. Source: ITU-R BT.601, as Pillow and OpenCV have it

Channels = tuple[float, float, float]  # red, green, blue
Colours = Literal["RGB", "BGR", "GREY"]


@dataclass(frozen=True)
class Normalisation:
    """Computes `(pixels * scale - mean) / std`, pixels 0..255."""

    scale: float = 1.0
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuses what is no normalisation."""
        if not 0 < self.scale < float("inf"):
            raise ConfigurationError(f"scale must be a number above zero, found {self.scale!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.isfinite(values).all():
                raise ConfigurationError(f"{name} must be three numbers, for red, green and blue, found {values!r}")
        if min(self.std) <= 0:
            raise ConfigurationError(f"std must be above zero, found {self.std!r}")

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalises pixels [n, h, w, 3], with one multiplication and one addition."""
        std = np.array(self.std, np.float64)
        factor = (self.scale / std).astype(np.float32)
        offset = (-np.array(self.mean, np.float64) / std).astype(np.float32)
        return pixels.astype(np.float32) * factor + offset


@dataclass(frozen=True)
class FormHints:
    """Says of a classifier without a card what its graph leaves open; None and False: as usual, or as the graph says.

    Attributes:
        side: height and width of the images, pixels.
        layout: of the input.
        bgr: whether the input takes blue first.
        output: name of the output that holds the scores.
    """

    side: tuple[int, int] | None = None
    layout: Layout | None = None
    bgr: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if self.side is not None and min(self.side) < 1:
            raise ConfigurationError(f"side: must be above zero, found {'x'.join(map(str, self.side))}")
        if self.layout is not None and self.layout not in get_args(Layout):
            raise ConfigurationError(f"layout: must be NHWC or NCHW, found {self.layout!r}")

    def names(self) -> list[str]:
        """Names the options that are given."""
        return [name for name in ("side", "layout", "bgr", "output") if getattr(self, name) not in (None, False)]


@dataclass(frozen=True)
class InputForm:
    """Describes what the graph takes, and makes it from pixels: normalised for floats, untouched for uint8."""

    name: str
    layout: Layout
    colours: Colours
    dtype: str  # numpy's: u1, f2, f4 or f8
    height: int
    width: int
    fixed_batch: bool  # takes exactly one row
    normalisation: Normalisation

    @property
    def datatype(self) -> DataType:
        """Gives the datatype of pixels: UINT8 for a graph that takes them as they are."""
        return "UINT8" if self.dtype == "u1" else "FP32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Gives the shape of one image."""
        channels = 1 if self.colours == "GREY" else 3
        if self.layout == "NHWC":
            return (1, self.height, self.width, channels)
        return (1, channels, self.height, self.width)

    @property
    def fits_a_card(self) -> bool:
        """True if a card can say it, so that workers take pixels as the graph does."""
        return self.colours == "RGB" and self.dtype in ("u1", "f4")

    def prepared(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Turns pixels [n, h, w, 3] into what the graph takes."""
        rows: NDArray[Any] = pixels if self.dtype == "u1" else self.normalisation(pixels)
        if self.colours == "BGR":
            rows = rows[..., ::-1]
        elif self.colours == "GREY":
            rows = rows.astype(np.float32) @ np.array(GREY_WEIGHTS, np.float32)[:, None]
            rows = np.floor(rows + 0.5) if self.dtype == "u1" else rows
        rows = rows if self.layout == "NHWC" else rows.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(rows, self.dtype)


def input_form(
    session: Any, file: Path, card: ModelCard | None, wanted: FormHints, normalisation: Normalisation
) -> InputForm:
    """Finds out how the graph of `session` takes images.

    Args:
        session: of ONNX Runtime.
        file: for messages.
        card: decides where there is one, and is held against the graph.
        wanted: what a graph without a card leaves open.
        normalisation: for a graph of floats without a card.

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
    dtype = _DTYPES.get(taken.type)
    if dtype is None:
        raise refuse(f"its input is {taken.type}")
    shape = list(taken.shape)
    if len(shape) != 4:
        raise refuse(f"its input has {len(shape)} axes")
    layout, channels = _layout(shape, card, wanted)
    if layout is None and wanted.layout is not None:
        raise refuse(
            f"with layout {wanted.layout} the axis that holds the colours must have 3 or 1 of them, and it has not"
        )
    if layout is None:
        raise refuse(
            "its input does not show which axis holds the 3 colours; give layout (NHWC or NCHW), or say it in a "
            "model card"
        )
    if isinstance(shape[0], int) and shape[0] != 1:
        raise refuse(f"it takes exactly {shape[0]} images at once; export it with a free or single first axis")
    if wanted.bgr and channels == 1:
        raise refuse("bgr is for colour images, and it takes grey ones; leave bgr out")
    axes = shape[1:3] if layout == "NHWC" else shape[2:4]
    height, width = (card.height, card.width) if card is not None else wanted.side or (None, None)
    found_height, found_width = (
        length if isinstance(length, int) else given for length, given in zip(axes, (height, width), strict=True)
    )
    if found_height is None or found_width is None:
        raise refuse("it leaves the size of its images open; give it with side")
    if height not in (None, found_height) or width not in (None, found_width):
        source = "side" if card is None else "its card"
        raise refuse(f"{source} says images of {height} x {width}, and it takes {found_height} x {found_width}")
    if found_height < 1 or found_width < 1:
        raise refuse(f"images of {found_height} x {found_width} pixels cannot be")
    if card is not None:
        normalisation = _of_card(card, "UINT8" if dtype == "u1" else "FP32", refuse)
    colours: Colours = "GREY" if channels == 1 else "BGR" if wanted.bgr else "RGB"
    fixed = isinstance(shape[0], int)
    form = InputForm(taken.name, layout, colours, dtype, found_height, found_width, fixed, normalisation)
    if card is not None and not form.fits_a_card:
        raise refuse(
            "a model card can say uint8 or float32 images of three colours only; give the ONNX file itself to evenkeel "
            "fit, which writes one that takes those"
        )
    return form


def _layout(shape: list[Any], card: ModelCard | None, wanted: FormHints) -> tuple[Layout | None, int]:
    """Finds the layout and the number of channels; an axis of open length may be theirs where the layout is given."""
    given = wanted.layout if card is None else card.layout
    if given is not None:
        fits = shape[3] if given == "NHWC" else shape[1]
        if isinstance(fits, int):
            return (given, fits) if fits in (1, 3) else (None, 0)
        return given, 3  # what it really takes shows when it is run
    for channels in (3, 1):
        first, last = shape[1] == channels, shape[3] == channels
        if first != last:
            return ("NCHW" if first else "NHWC"), channels
        if first:
            return None, 0
    return None, 0


def _of_card(card: ModelCard, datatype: DataType, refuse: Callable[[str], ConfigurationError]) -> Normalisation:
    wanted = card.datatype if card.normalisation_inside else "FP32"
    if datatype != wanted:
        raise refuse(f"its card's 'datatype' and 'normalisation_inside' say {wanted}")
    if card.normalisation_inside:
        return Normalisation()
    return Normalisation(1 / 255, cast(Channels, card.mean), cast(Channels, card.std))


def output_name(session: Any, file: Path, card: ModelCard | None, wanted: FormHints) -> str:
    """Finds the output that holds the scores: the card's, the wanted one, or the only one that may be.

    Raises:
        ConfigurationError: none, or several.
    """
    outputs = session.get_outputs()
    found = ", ".join(f"{each.name} {each.type} {_listed(each.shape)}" for each in outputs)
    name = wanted.output if card is None else card.output_name
    if name is not None:
        if name not in [each.name for each in outputs]:
            whose = "output" if card is None else "its card's 'output_name'"
            raise ConfigurationError(f"classifier {file}: {whose} is {name!r}, its outputs are {found}")
        return name
    # Axes of length 1 may be dropped; ONNX Runtime gives an empty shape where the graph does not tell.
    usual = [each for each in outputs if each.type in _SCORE_TYPES and len(each.shape or ()) in (0, 2)]
    fitting = usual or [each for each in outputs if each.type in _SCORE_TYPES and _is_row(each.shape[1:])]
    if len(fitting) != 1:
        why = "no output" if not fitting else f"{len(fitting)} outputs"
        raise ConfigurationError(
            f"classifier {file}: {why} may be scores [n, classes]; its outputs are {found}; expected {ACCEPTED}"
            + ("" if not fitting else "; say with output which one it is, or write a model card that does")
        )
    return str(fitting[0].name)


def _is_row(axes: list[Any]) -> bool:
    """True if at most one of the axes has another length than 1."""
    return len([axis for axis in axes if axis != 1]) <= 1


def _listed(shape: list[Any] | None) -> str:
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"
