"""Reads images that are arrays in an npz file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.images.memory import check_memory
from evenkeel.images.sources.source import AUTO, NONE, Entry, ImageSource, Indices, RawImage, numbered

__all__ = ["NpzSource"]


class NpzSource(ImageSource):
    """Reads `images` and, where there are any, `labels` [n] of an npz file; nothing in it is unpickled.

    `images`: uint8 [n, h, w, c], [n, c, h, w] or [n, h, w] with c of 1 (grey), 3 or 4, distinguished by shape; or the
    bytes of n image files as an array of dtype `S` or `V`. Labels are whole numbers, or strings (numbered in sorted
    order).
    """

    def __init__(self, path: Path, labels_from: str = AUTO) -> None:
        self._name = path.name
        # Opened here, since numpy leaves a damaged file open.
        with _opened(path) as file, _archive(file, path) as archive:
            if "images" not in archive.files:
                raise ConfigurationError(f"{path}: array 'images' is not there; there are {sorted(archive.files)}")
            check_memory(archive.zip.getinfo("images.npy").file_size, f"{path}: 'images'")
            self._images = _as_rows(_array(archive, "images", path), path)
            self._labels: Indices | None = None
            wanted = "labels" if labels_from == AUTO else labels_from
            if labels_from not in (AUTO, NONE) and wanted not in archive.files:
                raise ConfigurationError(f"{path}: array {wanted!r} is not there; there are {sorted(archive.files)}")
            if labels_from != NONE and wanted in archive.files:
                self._labels, self.class_names = numbered(_array(archive, wanted, path), f"{path}: {wanted!r}")
            used = {"images", wanted} if self._labels is not None else {"images"}
            others = sorted(set(archive.files) - used)
            if others and labels_from != NONE:
                taken = (
                    f"labels are those of {wanted!r}" if self._labels is not None else "no array is taken for labels"
                )
                self.notes = [f"{taken}; not used: {', '.join(others)} (--labels ARRAY takes another)"]
        self.count = len(self._images)
        if self._images.ndim == 4 and self._images.shape[3] == 3:
            self.pixels = self._images
        if self._labels is not None and len(self._labels) != self.count:
            raise ConfigurationError(f"{path}: {self.count:,} images but {len(self._labels):,} labels")

    def entries(self, chosen: Indices) -> Iterator[Entry]:
        """Gives the chosen rows."""
        for number in chosen.tolist():
            label = None if self._labels is None else int(self._labels[number])
            yield Entry(f"{self._name}[{number}]", label, partial(_row, self._images, number))


def _row(images: NDArray[Any], number: int) -> RawImage:
    if images.ndim > 1:
        row: RawImage = images[number]
        return row
    # Of `S` numpy would cut zeros at the end, which belong to the file; those that fill up the row do no harm.
    return images[number : number + 1].tobytes()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error


def _archive(file: BinaryIO, path: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:  # numpy and zipfile parse what stands there, and fail in whatever way it leads them to
        raise ConfigurationError(f"{path} is not an npz file that can be read: {error}") from error


def _array(archive: Any, name: str, path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = archive[name]
    except Exception as error:  # as above; and too large for the memory
        raise ConfigurationError(f"{path}: array {name!r} cannot be read: {error}") from error
    if not isinstance(found, np.ndarray):  # a member that is no array comes as its bytes
        raise ConfigurationError(f"{path}: {name!r} is not an array")
    return found


def _as_rows(images: NDArray[Any], path: Path) -> NDArray[Any]:
    shape = images.shape
    if images.ndim == 1 and images.dtype.kind in "SV":
        return images
    if images.dtype != np.uint8:
        raise ConfigurationError(
            f"{path}: 'images' must be uint8 (0..255) or bytes of image files, found {images.dtype} {list(shape)}; "
            "values of 0..1 are to be multiplied by 255 and rounded first"
        )
    if images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3, 4)):
        return images
    if images.ndim == 4 and shape[1] in (1, 3, 4):
        return images.transpose(0, 2, 3, 1)
    raise ConfigurationError(
        f"{path}: 'images' must have shape [n, h, w, 3], [n, 3, h, w] or [n, h, w], found {list(shape)}"
    )
