"""Reads image files in a folder tree: each sub-folder is a class."""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from evenkeel.errors import ConfigurationError, UnreadableImageError
from evenkeel.images.sources.source import ALL, AUTO, NONE, PARTS, Entry, ImageSource, Indices

__all__ = ["SUFFIXES", "FolderSource", "holds_images"]

_JPEG = {".jpg", ".jpeg", ".jfif", ".jpe"}
SUFFIXES = frozenset(_JPEG | {".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
_MAX_BYTES = 1 << 30  # of one file; more than any image that is taken has


class FolderSource(ImageSource):
    """Reads image files below `folder`; hidden files and folders are passed over.

    The sub-folders of the folder itself are the classes, in sorted order, empty ones too, so that a class has the same
    number in every part of a data set; deeper folders belong to the class above them. A single sub-folder tells nothing
    apart and gives no labels, and neither do images that lie directly in the folder.
    """

    def __init__(self, folder: Path, labels_from: str = AUTO, split: str | None = None) -> None:
        if labels_from not in (AUTO, NONE):
            raise ConfigurationError(
                f"{folder}: labels of a folder are its sub-folders; labels must be 'auto' or 'none', "
                f"found {labels_from!r}"
            )
        mixed = split == ALL and not (folder / ALL).is_dir()
        if mixed:
            split = None
        if split is not None:
            if not (folder / split).is_dir():
                raise ConfigurationError(f"{folder} has no sub-folder {split!r} for that split")
            folder = folder / split
        self._folder = folder
        files = list(_walk(folder))
        self._files = [path for path in files if path.suffix.lower() in SUFFIXES]
        self.left_out = [
            (str(path.relative_to(folder)), f"not the name of an image file ({path.suffix or 'no suffix'})")
            for path in files
            if path.suffix.lower() not in SUFFIXES
        ]
        self.count = len(self._files)
        if not self._files:
            raise ConfigurationError(f"{folder} holds no image files ({', '.join(sorted(SUFFIXES))})")
        names = _sub_folders(folder)
        if _are_parts(names) and not mixed:
            raise ConfigurationError(
                f"{folder} holds the parts {', '.join(names)} of a data set; choose one with split, or give its "
                f"folder; split {ALL!r} mixes them"
            )
        if labels_from == AUTO and _are_parts(names):
            self.notes = [f"the parts {', '.join(names)} are read as one, without labels"]
        elif labels_from == AUTO and len(names) == 1:
            self.notes = [f"all images are in the sub-folder {names[0]!r}, which tells no classes apart: no labels"]
        self._numbers = _classes(folder, self._files, names) if labels_from == AUTO else None
        if self._numbers is not None:
            self.class_names = tuple(self._numbers)

    def entries(self, chosen: Indices) -> Iterator[Entry]:
        """Gives the chosen files, by path in sorted order."""
        for number in chosen.tolist():
            path = self._files[number]
            inside = path.relative_to(self._folder)
            label = None if self._numbers is None else self._numbers[inside.parts[0]]
            yield Entry(str(inside), label, partial(_content, path))


def _content(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise UnreadableImageError("not a regular file")
    if status.st_size > _MAX_BYTES:
        raise UnreadableImageError(f"{status.st_size:,} bytes; at most {_MAX_BYTES:,} are taken")
    return path.read_bytes()


def holds_images(folder: Path) -> bool:
    """Says whether any file below `folder` has the name of an image file."""
    return any(path.suffix.lower() in SUFFIXES for path in _walk(folder))


def _sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _are_parts(names: list[str]) -> bool:
    return len(names) > 1 and PARTS.issuperset(name.lower() for name in names)


def _classes(folder: Path, files: list[Path], names: list[str]) -> dict[str, int] | None:
    direct = sum(path.parent == folder for path in files)
    if len(names) < 2 or direct == len(files) or _are_parts(names):
        return None
    if direct:
        raise ConfigurationError(
            f"{folder}: {direct:,} of {len(files):,} images lie outside the class folders and have no label; "
            "move them, or read all without labels (--labels none)"
        )
    return {name: number for number, name in enumerate(names)}


def _walk(folder: Path) -> Iterator[Path]:
    """Finds every file below `folder` in sorted order, through links too, but looks into no folder twice."""
    seen = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigurationError(f"folder {here} cannot be read: {error.strerror or error}") from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = [entry for entry in entries if not _is_hidden(entry.name)]
        yield from (Path(entry.path) for entry in entries if not entry.is_dir())
        waiting += [Path(entry.path) for entry in reversed(entries) if entry.is_dir()]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
