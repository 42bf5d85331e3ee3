"""Keeps a bank of augmented views: every image seen in a few ways, each way scored once by the classifier.

A Collage-CNN learns what the classifier says of exactly the view that it is shown. Scoring fresh views at every step
would cost several times the training itself, as the classifier is the larger network; a few views for each image,
scored beforehand, cost as much as a few passes over the data and serve every network that is fitted afterwards.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenkeel.errors import ConfigurationError

__all__ = ["ViewBank"]

Scorer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
_AT_ONCE = 200  # views scored in one call; a multiple of what a pass takes well, and a fraction of a second or two


class ViewBank:
    """Holds `views` ways to see each of some `images` uint8 [n, h, w, 3], with the classifier's scores.

    The images stay where they are, since a copy of them may be more than the memory holds.

    View 0 is the image itself. Every other one is moved by up to `reach` pixels each way, edges reflected, and views
    with an odd number are mirrored left to right where `mirror` is true. Which move belongs to which view follows from
    `seed`, the image's number and the view's, so nothing about it is stored.

    Args:
        rows: places of those of `images` that are seen; None: all.
        others: further images, which come after those: they are of no account in themselves, and only serve to learn
            from.
        path: the scores' file [views, n, classes] float32 (.npy); what it holds already is not scored again.

    Raises:
        ConfigurationError: the file is of other images or views, damaged, or cannot be written.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        classes: int,
        path: Path,
        *,
        views: int = 4,
        reach: int = 3,
        mirror: bool = True,
        seed: int = 0,
        rows: NDArray[np.int64] | None = None,
        others: NDArray[np.uint8] | None = None,
    ) -> None:
        self._rows = torch.arange(len(images)) if rows is None else torch.from_numpy(rows)
        self._images = torch.from_numpy(images)
        self._others = torch.from_numpy(images[:0] if others is None else others)
        self.views, self.reach, self.mirror, self.seed, self.more = views, reach, mirror, seed, len(self._others)
        shape = (views, len(self), classes)
        if not path.is_file():
            _make_room(path, shape)
        self._scores = _open(path, shape)

    def __len__(self) -> int:
        return len(self._rows) + self.more

    @property
    def missing(self) -> int:
        """Counts the views that have no scores yet."""
        return sum(len(self._waiting(view)) for view in range(self.views))

    def fill(self, scorer: Scorer) -> Iterator[int]:
        """Asks the classifier for every view without scores; gives the number of views scored, part by part.

        Raises:
            ConfigurationError: the classifier gives scores that are not finite.
        """
        for view in range(self.views):
            waiting = self._waiting(view)
            for start in range(0, len(waiting), _AT_ONCE):
                part = waiting[start : start + _AT_ONCE]
                pixels = self.pixels(torch.from_numpy(part), torch.full((len(part),), view))
                scores = scorer(pixels.permute(0, 2, 3, 1).contiguous().numpy())
                finite = np.isfinite(scores).all(axis=1)
                if not finite.all():
                    raise ConfigurationError(f"the scores of image {part[int(finite.argmin())]} are not finite")
                self._scores[view, part] = scores
                yield len(part)
            self._scores.flush()  # type: ignore[attr-defined]

    def _waiting(self, view: int) -> NDArray[np.int64]:
        """Finds images with no scores, or only some, of this view: where the power went, a row may be half written."""
        return np.flatnonzero(np.isnan(self._scores[view]).any(axis=1))

    @property
    def per_epoch(self) -> int:
        """Counts the images of a pass: all, but of those that only serve to learn from half as many as of others."""
        return len(self) - self.more + min(self.more, (len(self) - self.more) // 2)

    def order(self, generator: torch.Generator) -> Tensor:
        """Gives the images of one pass [per_epoch], shuffled."""
        own = torch.randperm(len(self) - self.more, generator=generator)
        others = torch.randperm(self.more, generator=generator)[: self.per_epoch - len(own)] + len(own)
        shown = torch.cat([own, others])
        return shown[torch.randperm(len(shown), generator=generator)] if self.more else own

    def pixels(self, images: Tensor, views: Tensor) -> Tensor:
        """Makes uint8 [n, 3, h, w]: of each of `images` [n] the view numbered in `views` [n]."""
        height, width = self._images.shape[1:3]
        moves = _hash(images * self.views + views, self.seed)
        span = 2 * self.reach + 1
        moved = views > 0
        down = torch.where(moved, moves % span - self.reach, 0)
        across = torch.where(moved, moves // span % span - self.reach, 0)
        rows = _reflect(torch.arange(height) + down[:, None], height)
        columns = torch.arange(width).expand(len(images), width)
        if self.mirror:
            columns = torch.where(views[:, None] % 2 == 1, columns.flip(1), columns)
        columns = _reflect(columns + across[:, None], width)
        rows, columns = rows[:, :, None], columns[:, None, :]
        own = images < len(self._rows)
        if own.all():
            return self._images[self._rows[images][:, None, None], rows, columns].permute(0, 3, 1, 2)
        seen = torch.empty((len(images), height, width, 3), dtype=torch.uint8)
        seen[own] = self._images[self._rows[images[own]][:, None, None], rows[own], columns[own]]
        other = images[~own] - len(self._rows)
        seen[~own] = self._others[other[:, None, None], rows[~own], columns[~own]]
        return seen.permute(0, 3, 1, 2)

    def answers(self) -> NDArray[np.int64]:
        """Gives the classifier's answers to the images themselves [n]."""
        parts = [self._scores[0, first : first + _AT_ONCE].argmax(1) for first in range(0, len(self), _AT_ONCE)]
        return np.concatenate(parts)

    def scores(self, images: Tensor, views: Tensor) -> Tensor:
        """Gives the classifier's scores of those views, float32 [n, classes]."""
        return torch.from_numpy(self._scores[views.numpy(), images.numpy()])


def _make_room(path: Path, shape: tuple[int, ...]) -> None:
    """Writes a file full of NaN: the disk's blocks are taken here, where a full disk can be reported as an error."""
    unfinished = path.with_suffix(".part")  # so that a file cut short is never taken for one of scores
    form = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    try:
        with unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, form)
            view = np.full(shape[1:], np.nan, np.float32).tobytes()
            for _ in range(shape[0]):
                file.write(view)
        unfinished.replace(path)
    except (OSError, MemoryError) as error:
        unfinished.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"{path} cannot be written: {why}; {4 * math.prod(shape) / 1e9:,.3f} GB are needed for the scores of "
            f"{shape[0]} views of {shape[1]:,} images"
        ) from error


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        # Read-only at first: a file that was cut short would be filled up with zeros, which look like scores.
        np.lib.format.open_memmap(path, mode="r")
        stored = np.lib.format.open_memmap(path, mode="r+")
    except Exception as error:  # numpy parses what stands there, and fails in whatever way the damage leads it to
        raise ConfigurationError(
            f"{path} cannot be read ({error}); remove it to have the images scored anew"
        ) from error
    if stored.shape != shape or stored.dtype != np.float32:
        raise ConfigurationError(
            f"{path} holds scores {list(stored.shape)} of other images or views, {list(shape)} are wanted; "
            "give another --out, or remove the file"
        )
    return stored


def _hash(numbers: Tensor, seed: int) -> Tensor:
    """Hashes each of `numbers` to 0..2^32-1, well mixed. Source: the finaliser of MurmurHash3, public domain."""
    mixed = (numbers + 1 + seed * 0x9E3779B9) & 0xFFFFFFFF
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = mixed ^ (mixed >> shift)
        mixed = (mixed * factor) & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)


def _reflect(places: Tensor, size: int) -> Tensor:
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)
