"""Makes a small picture of an item: cropped or squeezed, scaled, normalised, in the layout and datatype of a model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.checks import at_least_one
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.images.resize import DEFAULT_FILTER, FILTERS, resized
from evenkeel.models.cards import DataType, Interpolation, Layout, ModelCard

__all__ = ["Pixels", "Tile"]

_DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Pixels:
    """Says how a model takes pixels, and how items come.

    Items are pixel values 0..255, uint8 or floating point. Where the model does not normalise by itself, `normalise`
    is true and `(x / 255 - mean) / std` is applied here, so that it happens exactly once.
    """

    layout: Layout = "NHWC"  # of what the model takes
    datatype: DataType = "UINT8"
    item_layout: Layout | None = None  # of the items; None: the same as `layout`
    interpolation: Interpolation = DEFAULT_FILTER
    normalise: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        if self.layout not in ("NHWC", "NCHW") or self.item_layout not in ("NHWC", "NCHW", None):
            raise ConfigurationError(f"layout must be NHWC or NCHW, found {self.layout!r} and {self.item_layout!r}")
        if self.datatype not in _DTYPES:
            raise ConfigurationError(f"datatype must be UINT8 or FP32, found {self.datatype!r}")
        if self.interpolation not in FILTERS:
            raise ConfigurationError(f"interpolation must be one of {', '.join(FILTERS)}, found {self.interpolation!r}")
        if self.normalise and self.datatype != "FP32":
            raise ConfigurationError("normalised pixels need datatype FP32; normalise inside the model, or take FP32")

    @classmethod
    def from_card(cls, card: ModelCard, item_layout: Layout | None = None) -> "Pixels":
        """Reads it from a card."""
        return cls(
            card.layout,
            card.datatype,
            item_layout,
            card.interpolation,
            normalise=not card.normalisation_inside,
            mean=card.mean,
            std=card.std,
        )

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Gives the datatype in numpy's terms."""
        return _DTYPES[self.datatype]

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Gives the shape of one picture in the model's layout."""
        return (height, width, 3) if self.layout == "NHWC" else (3, height, width)

    def upright(self, item: Array) -> Array:
        """Gives a view of the item as `[height, width, 3]`.

        Raises:
            CodeError: no picture with three channels in the item's layout, not numbers, or not finite.
        """
        layout = self.item_layout or self.layout
        if item.ndim != 3 or item.shape[2 if layout == "NHWC" else 0] != 3 or item.size == 0:
            expected = "[height, width, 3]" if layout == "NHWC" else "[3, height, width]"
            raise CodeError(f"expected an item of shape {expected}, found {list(item.shape)}")
        if item.dtype != np.uint8:
            if item.dtype.kind != "f":
                raise CodeError(f"expected an item of uint8 or floating-point pixels, found {item.dtype}")
            # One such pixel would spread over the answers of every item in the group.
            if not np.isfinite(item).all():
                raise CodeError("the item holds pixels that are not finite")
        return item if layout == "NHWC" else item.transpose(1, 2, 0)

    def finish(self, picture: Array) -> Array:
        """Makes the picture `[height, width, 3]` what the model takes."""
        if self.datatype == "UINT8":
            if picture.dtype != np.uint8:
                picture = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        else:
            picture = picture.astype(np.float32, copy=False)
            if self.normalise:
                picture = (picture / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return picture if self.layout == "NHWC" else np.ascontiguousarray(picture.transpose(2, 0, 1))


@dataclass(frozen=True)
class Tile:
    """Makes tiles of `height` x `width` pixels from items of any size.

    With `crop`, what does not fit the tile's proportions is cut off evenly at both ends, so that nothing is squeezed;
    without it the item is squeezed.
    """

    height: int
    width: int
    pixels: Pixels
    crop: bool

    def __post_init__(self) -> None:
        """Refuses empty tiles."""
        at_least_one("tile height", self.height)
        at_least_one("tile width", self.width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Gives the shape of a tile in the model's layout."""
        return self.pixels.shape(self.height, self.width)

    def make(self, item: Array) -> Array:
        """Makes the tile of one item; gives the item itself, not a copy, when there is nothing to do.

        Shrinking is antialiased (the filter's support grows with the factor), except with "nearest".

        Raises:
            CodeError: not an item; see `Pixels.upright`.
        """
        picture = self.pixels.upright(item)
        if self.crop:
            picture = _cropped(picture, self.height, self.width)
        if picture.shape[:2] != (self.height, self.width):
            picture = resized(picture, self.height, self.width, interpolation=self.pixels.interpolation)
        elif self._as_it_is(item):
            return item
        return self.pixels.finish(picture)

    def _as_it_is(self, item: Array) -> bool:
        pixels = self.pixels
        same_layout = pixels.item_layout in (None, pixels.layout)
        return same_layout and item.shape == self.shape and item.dtype == pixels.dtype and not pixels.normalise


def _cropped(picture: Array, height: int, width: int) -> Array:
    rows, columns = picture.shape[:2]
    keep_rows = min(rows, max(1, columns * height // width))
    keep_columns = min(columns, max(1, rows * width // height))
    top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
    return picture[top : top + keep_rows, left : left + keep_columns]
