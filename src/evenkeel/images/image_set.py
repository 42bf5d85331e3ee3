"""Reads a user's images into memory: from a folder, Parquet, npz or IDX files, all of one size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError, UnreadableImageError
from evenkeel.images.decode import rgb_pixels
from evenkeel.images.header import read_header
from evenkeel.images.memory import check_memory
from evenkeel.images.resize import DEFAULT_FILTER, Filter
from evenkeel.images.sources.folder import FolderSource, holds_images
from evenkeel.images.sources.idx import IdxSource, is_idx
from evenkeel.images.sources.npz import NpzSource
from evenkeel.images.sources.parquet import ParquetSource, parquet_files
from evenkeel.images.sources.source import AUTO, ImageSource, Indices, RawImage
from evenkeel.text_values import is_text

__all__ = ["MAX_NAMES", "ImageSet", "read_images"]

MAX_NAMES = 1000  # of skipped images that are kept with their reasons; the count goes on
_REPORT_EVERY = 250


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Holds images of one size.

    Attributes:
        pixels: uint8 [n, height, width, 3].
        labels: int64 [n]; None where there are none.
        class_names: by label; None where labels have no names.
        skipped: (name, reason) of images that could not be read, the first `MAX_NAMES` of them.
        skipped_count: of all that could not be read.
        notes: what else a user should know of what was read, in sentences.
        shorter_side: of the images before they were scaled, in pixels: their median; None where it is not known.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    skipped_count: int = 0
    notes: tuple[str, ...] = ()
    shorter_side: int | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Sequence[int] | Indices) -> "ImageSet":
        """Takes the images at `indices`, in that order, with their labels; what was skipped stays with the whole."""
        places = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[places]
        return ImageSet(self.pixels[places], labels, self.class_names)

    def hold_out(self, count: int, seed: int) -> "tuple[Indices, ImageSet]":
        """Places of all but `count` random images, shuffled, and those `count`. The same seed gives the same ones."""
        order = np.random.default_rng(seed).permutation(len(self))
        return order[count:], self.take(order[:count])


def read_images(
    path: str | Path,
    *,
    height: int,
    width: int,
    labels_from: str | Path = AUTO,
    limit: int | None = None,
    split: str | None = None,
    interpolation: Filter = DEFAULT_FILTER,
    report: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Reads the images at `path`, each scaled and cut to `height` x `width`.

    Forms: a folder tree of image files (labels: its sub-folders in sorted order; a single one, or none, gives no
    labels); a Parquet file or a folder of them (image files or `{bytes, path}` in one column; a row with a list
    `file_names` of k x k names is a sheet of so many images); npz (`images`, `labels`); an IDX file, plain, .gz or .xz,
    with its labels beside it. See `images/sources/`.

    Args:
        path: file or folder.
        height: of every image, pixels.
        width: of every image, pixels.
        labels_from: `auto`, `none`, or where the labels are: a Parquet column, an npz array, an IDX labels file.
        limit: at most so many images, spread evenly over all that there are (not the first: data are often sorted by
            class), the same ones at every call.
        split: part to read: a value of Parquet's `split` column (or the beginning of a file's name, as in
            `train-00000-of-00002.parquet`), or a sub-folder. None: all, which is refused where it is several parts of a
            data set; `all`: all parts of Parquet files.
        interpolation: how images are scaled: as the classifier's card says, so that they are what it is served.
        report: called with (done, total) from time to time.

    Raises:
        ConfigurationError: nothing there, of no known form, nothing in it can be read, or labels that do not match.
        MissingExtraError: pyarrow is not installed and the images are in Parquet.
    """
    for name, value in (("height", height), ("width", width), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ConfigurationError(f"{name} must be 1 or more, found {value}")
    path = Path(path)
    source = _open(path, str(labels_from), split)
    for name in source.class_names or ():
        if not is_text(name):
            raise ConfigurationError(
                f"{path}: class {name!r} has a name that is not UTF-8 text, so no answer could carry it; "
                "rename it, or read the images without labels (--labels none)"
            )
    chosen = _spread(source.count, limit)
    if source.pixels is not None and 0 < source.count == len(chosen) and source.pixels.shape[1:3] == (height, width):
        if report is not None:
            report(len(chosen), len(chosen))
        known = [entry.label for entry in source.entries(chosen)]
        numbers = None if None in known else np.array(known, np.int64)
        return ImageSet(
            np.ascontiguousarray(source.pixels),
            numbers,
            source.class_names,
            notes=tuple(filter(None, source.notes)),
            shorter_side=min(height, width),
        )
    pixels = _room(len(chosen), height, width)
    labels: list[int] = []
    sides: list[int] = []
    kept = 0
    skipped = _Skipped(source.left_out)
    for done, entry in enumerate(source.entries(chosen), 1):
        try:
            image = entry.load()
            pixels[kept] = rgb_pixels(image, height, width, interpolation)
        except (UnreadableImageError, OSError) as error:
            skipped.add(entry.name, getattr(error, "strerror", None) or str(error))
        else:
            kept += 1
            sides.append(_shorter_side(image))
            if entry.label is not None:
                labels.append(entry.label)
        if report is not None and (done % _REPORT_EVERY == 0 or done == len(chosen)):
            report(done, len(chosen))
    if not kept:
        raise ConfigurationError(f"{path}: no image can be read{skipped.sample()}")
    return ImageSet(
        pixels[:kept],
        np.array(labels, np.int64) if labels else None,
        source.class_names,
        tuple(skipped.names),
        skipped.count,
        tuple(filter(None, source.notes)),
        int(np.median(sides)),
    )


def _shorter_side(image: RawImage) -> int:
    """Gives the shorter side of an image that could be read, in pixels."""
    if not isinstance(image, bytes):
        return int(min(image.shape[:2]))
    header = read_header(image)
    assert header is not None
    return min(header.height, header.width)


class _Skipped:
    """Counts images that were skipped, and keeps the first names and reasons."""

    def __init__(self, begin: Sequence[tuple[str, str]]) -> None:
        self.names = list(begin[:MAX_NAMES])
        self.count = len(begin)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.names) < MAX_NAMES:
            self.names.append((name, reason))

    def sample(self) -> str:
        if not self.count:
            return ""
        first = "; ".join(f"{name}: {reason}" for name, reason in self.names[:3])
        return f" ({self.count:,} skipped; {first}{'; ...' if self.count > 3 else ''})"


def _open(path: Path, labels_from: str, split: str | None) -> ImageSource:
    if not path.exists():
        raise ConfigurationError(f"images {path}: no such file or folder")
    if path.is_dir():
        parquet = parquet_files(path)
        if parquet and holds_images(path):
            raise ConfigurationError(f"{path} holds both Parquet and image files; give the folder of one of them")
        if parquet:
            return ParquetSource(parquet, labels_from, split)
        return FolderSource(path, labels_from, split)
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise ConfigurationError(f"images {path} cannot be read: {error.strerror or error}") from error
    if begin == b"PAR1":
        return ParquetSource([path], labels_from, split)
    if split is not None:
        raise ConfigurationError(f"{path} has no splits; leave split={split!r} away, or give the file of that part")
    if begin[:2] == b"PK":
        return NpzSource(path, labels_from)
    if is_idx(path):
        return IdxSource(path, labels_from)
    raise ConfigurationError(
        f"images {path}: the form is not known; expected a folder of image files, a Parquet file, npz "
        "(images, labels) or an IDX images file (plain, .gz or .xz)"
    )


def _spread(count: int, limit: int | None) -> Indices:
    """Chooses at most `limit` of `count` images: one drawn from each of `limit` equal stretches."""
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    edges = np.arange(limit + 1, dtype=np.int64) * count // limit
    # Drawn, since every k-th could always meet the same class.
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _room(count: int, height: int, width: int) -> NDArray[np.uint8]:
    check_memory(count * height * width * 3, f"{count:,} images of {height} x {width}")
    try:
        return np.empty((count, height, width, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise ConfigurationError(
            f"{count:,} images of {height} x {width} need {count * height * width * 3 / 1e9:,.1f} GB of memory; "
            "read fewer with a limit"
        ) from error
