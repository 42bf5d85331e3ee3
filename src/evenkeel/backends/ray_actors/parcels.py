"""Packs a model's files for a node that does not share a file system, and unpacks them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from evenkeel.backends.worker.model import split_name
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card
from evenkeel.models.session import external_files
from evenkeel.models.shipped import NAMES

__all__ = ["Parcel", "pack", "unpack"]

_HERE = "{folder}"  # in a parcel's spec: where its files were unpacked


@dataclass(frozen=True)
class Parcel:
    """Holds a model's spec, as `load_model` takes it once the folder is put in, and the files it needs by their paths.

    What travels is checked where it arrives, as everywhere: a card's digest when the model is loaded, and that of all
    files together when the worker says hello.
    """

    spec: str
    files: Mapping[str, bytes] = field(default_factory=dict)


def pack(spec: str) -> Parcel:
    """Packs what the model `spec` needs: a card with its ONNX file and weights, or one Python file.

    A shipped model's name and `python:package.module:factory` stay as they are: packages are installed on every node.

    Raises:
        ConfigurationError: a file is missing, or the card is none.
    """
    name, rest = split_name(spec)
    front = f"{name}=" if name else ""
    try:
        if rest.startswith("python:"):
            where, _, factory = rest.removeprefix("python:").rpartition(":")
            if not where.endswith(".py"):
                return Parcel(spec)
            file = Path(where)
            return Parcel(f"{front}python:{_HERE}/{file.name}:{factory}", {file.name: file.read_bytes()})
        if rest in NAMES:
            return Parcel(spec)
        card = load_card(rest)
        path = Path(rest)
        files = {path.name: path.read_bytes(), card.file: (path.parent / card.file).read_bytes()}
        beside = PurePosixPath(card.file).parent
        for weights in external_files(files[card.file]):
            place = beside / weights
            # What a graph names elsewhere on this machine is no weight of its: ONNX Runtime would not read it either.
            if _is_below(place) and (path.parent / place).is_file():
                files[str(place)] = (path.parent / place).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"model {spec!r}: {error.filename}: {error.strerror or error}") from error
    return Parcel(f"{front}{_HERE}/{path.name}", files)


def unpack(parcel: Parcel, folder: Path) -> str:
    """Writes a parcel's files below `folder` and gives the spec of the model that they are.

    Raises:
        ConfigurationError: a path leads out of the folder, or a file cannot be written.
    """
    for name, content in parcel.files.items():
        if not _is_below(PurePosixPath(name)):
            raise ConfigurationError(f"file {name!r} of a model lies outside of its folder")
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        except OSError as error:
            raise ConfigurationError(f"{folder / name} cannot be written: {error.strerror or error}") from error
    return parcel.spec.replace(_HERE, str(folder))


def _is_below(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts and path != PurePosixPath(".")
