"""Defines the interface of every form that images are kept in: how many there are, and some of them one by one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError

__all__ = ["ALL", "AUTO", "NONE", "PARTS", "Entry", "ImageSource", "Indices", "RawImage", "numbered"]

AUTO = "auto"  # labels from where they usually are, if they are there
NONE = "none"  # read without labels
ALL = "all"  # a split: every part
PARTS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})  # of a data set

Indices = NDArray[np.int64]
# The bytes of an image file, or uint8 pixels [height, width] or [height, width, 1..4 channels].
RawImage = bytes | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Entry:
    """Names one image that has not been read yet.

    Attributes:
        name: as a user would look it up.
        label: number of its class; None where the source has no labels.
        load: the image; raises UnreadableImageError or OSError.
    """

    name: str
    label: int | None
    load: Callable[[], RawImage]


class ImageSource(ABC):
    """Gives images of one place. A place that is wrong as a whole is refused on opening, with a ConfigurationError.

    Attributes:
        count: how many images there are to choose from.
        class_names: by label; None where labels have no names, or there are none.
        left_out: (name, reason) of what lies among the images and is not one.
        notes: what a user should know of what is read, in sentences.
        pixels: all images as uint8 [n, height, width, 3], where they are kept so; to be used as they are.
    """

    count: int
    class_names: tuple[str, ...] | None = None
    left_out: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    pixels: NDArray[np.uint8] | None = None

    @abstractmethod
    def entries(self, chosen: Indices) -> Iterator[Entry]:
        """Gives the images numbered `chosen` (rising, each at most once), in that order; all or none have labels."""


def numbered(values: NDArray[Any], what: str) -> tuple[Indices, tuple[str, ...] | None]:
    """Gives labels as numbers, and their names where `values` [n] (or [n, 1]) are strings: in sorted order.

    Raises:
        ConfigurationError: neither whole numbers from 0 nor strings; `what` says whose labels they are.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ConfigurationError(f"{what} must be one number or name per image, found shape {list(values.shape)}")
    if values.dtype.kind in "US":
        try:
            names, numbers = np.unique(values.astype(np.str_), return_inverse=True)
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{what} must be whole numbers or strings, found bytes that are no text"
            ) from error
        return numbers.astype(np.int64).reshape(-1), tuple(names.tolist())
    if values.dtype.kind not in "iub":
        raise ConfigurationError(f"{what} must be whole numbers or strings, found {values.dtype}")
    if values.size and int(values.min()) < 0:
        raise ConfigurationError(
            f"{what}: label {values.min()} of image {int(values.argmin())} is below 0; "
            "leave out images without label, or read all without labels (--labels none)"
        )
    return values.astype(np.int64), None
