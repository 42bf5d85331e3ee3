"""Reads images in IDX files, as MNIST and its successors come. Source: LeCun, Cortes and Burges, the page of MNIST."""

import gzip
import lzma
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.images.memory import check_memory
from evenkeel.images.sources.source import AUTO, NONE, Entry, ImageSource, Indices, RawImage

__all__ = ["IdxSource", "is_idx"]

_UNSIGNED_BYTES = 8
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)


class IdxSource(ImageSource):
    """Reads grey images [n, h, w] (or [n, h, w, 3]) of an IDX file, plain, .gz or .xz.

    Labels are in the file beside it whose name says `labels` and `idx1` instead of `images` and `idx3`, packed or not,
    or in the file that `labels_from` names.
    """

    def __init__(self, path: Path, labels_from: str = AUTO) -> None:
        self._name = path.name
        self._images = _read(path)
        self.count = len(self._images)
        if self._images.ndim == 1:
            raise ConfigurationError(f"{path} is an IDX file of labels; give the one of images, its labels are found")
        if self._images.ndim == 2 or (self._images.ndim == 4 and self._images.shape[3] not in (1, 3, 4)):
            raise ConfigurationError(
                f"{path} must have shape [n, h, w] or [n, h, w, 3], found {list(self._images.shape)}"
            )
        self._labels: Indices | None = None
        beside = _labels_beside(path) if labels_from == AUTO else None if labels_from == NONE else Path(labels_from)
        if beside is None:
            return
        if not beside.is_file():
            raise ConfigurationError(f"labels {beside}: no such file")
        labels = _read(beside)
        if labels.shape != (self.count,):
            raise ConfigurationError(
                f"{path} has {self.count:,} images, but the labels in {beside} have shape {list(labels.shape)}"
            )
        self._labels = labels.astype(np.int64)

    def entries(self, chosen: Indices) -> Iterator[Entry]:
        """Gives the chosen rows."""
        for number in chosen.tolist():
            label = None if self._labels is None else int(self._labels[number])
            yield Entry(f"{self._name}[{number}]", label, partial(_row, self._images, number))


def is_idx(path: Path) -> bool:
    """Says whether the file begins like an IDX file, once unpacked."""
    try:
        with _opened(path) as file:
            begin = file.read(4)
    except _DAMAGED:
        return False
    return len(begin) == 4 and begin[:2] == b"\0\0" and 1 <= begin[3] <= 4 and 8 <= begin[2] <= 14


def _row(images: NDArray[np.uint8], number: int) -> RawImage:
    row: RawImage = images[number]
    return row


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        begin = file.read(2)
    return cast(BinaryIO, _PACKED.get(begin, open)(path, "rb"))


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with _opened(path) as file:
            begin = file.read(4)
            if len(begin) < 4 or begin[:2] != b"\0\0" or begin[2] != _UNSIGNED_BYTES or not 1 <= begin[3] <= 4:
                raise ConfigurationError(f"{path} is not an IDX file of unsigned bytes (it begins with {begin.hex()})")
            lengths = file.read(4 * begin[3])
            if len(lengths) < 4 * begin[3]:
                raise ConfigurationError(f"{path} is cut off in its header")
            shape = struct.unpack(f">{begin[3]}I", lengths)
            size = math.prod(shape)
            check_memory(size, f"{path}: its images")
            content = file.read(size + 1)
    except _DAMAGED as error:
        raise ConfigurationError(f"{path} cannot be unpacked: {error}; is the file complete?") from error
    if len(content) != size:
        what = "cut off" if len(content) < size else "too long"
        raise ConfigurationError(
            f"{path} is {what}: its header says {list(shape)}, {size:,} bytes, and {len(content):,} follow"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _labels_beside(path: Path) -> Path | None:
    plain = re.sub(r"\.(gz|xz)$", "", path.name)
    name = re.sub(r"idx[34]", "idx1", plain.replace("images", "labels"))
    if "images" not in plain:
        return None
    # The packing of the images first: that pair was stored together.
    for suffix in dict.fromkeys((path.name[len(plain) :], "", ".gz", ".xz")):
        beside = path.with_name(name + suffix)
        if beside.is_file():
            return beside
    return None
