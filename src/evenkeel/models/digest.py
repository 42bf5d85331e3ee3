"""Tells models apart by a digest: of the graph, of weights in other files, and of how a card has it run."""

import hashlib
import json
from pathlib import Path

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard
from evenkeel.models.session import external_files

__all__ = ["ModelDigests", "card_digest", "file_digest", "read_whole"]

# What a card says of how its file is run; two cards that differ here give different answers from the same file.
_HOW_IT_IS_RUN = (
    "kind", "classes", "height", "width", "layout", "datatype", "input_name", "output_name", "mean", "std",
    "normalisation_inside", "grid", "tile_side", "encoder", "group", "version",
)  # fmt: skip


def file_digest(file: Path) -> str:
    """Gives the SHA-256 of an ONNX file together with the files beside it that hold its weights, in hexadecimal.

    Raises:
        OSError: the file cannot be read. Weights that are not there are left out: a session cannot be made of them.
    """
    content = file.read_bytes()
    whole = hashlib.sha256(content)
    for name in external_files(content):
        if (file.parent / name).is_file():
            with (file.parent / name).open("rb") as weights:
                whole.update(hashlib.file_digest(weights, "sha256").digest())
    return whole.hexdigest()


def read_whole(card: ModelCard, path: Path) -> bytes:
    """Reads the ONNX file of the card at `path`, and sees that it is the one the card was written for.

    Raises:
        ConfigurationError: it cannot be read, or has another digest than the card says.
    """
    file = path.parent / card.file
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"model card {path}: {file} cannot be read: {error.strerror or error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != card.sha256.lower():
        raise ConfigurationError(
            f"model card {path}: field 'sha256' is {card.sha256}, but {file} has {found}; "
            "one of the two is not the one that was measured"
        )
    return content


def card_digest(card: ModelCard, folder: Path) -> str:
    """Gives the digest of what a card in `folder` stands for: its file, and how the card has it run.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    file = folder / card.file
    try:
        of_file = file_digest(file)
    except OSError as error:
        raise ConfigurationError(f"model {card.name!r}: {file} cannot be read: {error.strerror or error}") from error
    fields = json.dumps([getattr(card, name) for name in _HOW_IT_IS_RUN])
    return "onnx:" + hashlib.sha256(f"{of_file} {fields}".encode()).hexdigest()


class ModelDigests:
    """Holds the digests that every worker of one gateway must have under a model's name.

    A digest begins with what it is of: `onnx:`, `python:`, or `version:` for what a remote server says. Those of one
    model and kind must be the same; where none is known beforehand, the first one seen counts.

    Args:
        known: model name -> digest.
    """

    def __init__(self, known: dict[str, str] | None = None) -> None:
        self._known = {(name, _kind(digest)): digest for name, digest in (known or {}).items() if digest}

    def known(self, model: str) -> str:
        """Gives the digest of the ONNX file that a model must have; empty where none is known."""
        return self._known.get((model, "onnx"), "")

    def check(self, model: str, digest: str, where: str) -> None:
        """Accepts what the worker at `where` holds; a worker that gives no digest is believed.

        Raises:
            ConfigurationError: it holds another model under this name.
        """
        if not digest:
            return
        wanted = self._known.setdefault((model, _kind(digest)), digest)
        if digest != wanted:
            raise ConfigurationError(
                f"{where} holds another {model!r} than this gateway: {_said(digest)}, not {_said(wanted)}; "
                "give it the same model, or restart the gateway with the new one"
            )


def _kind(digest: str) -> str:
    return digest.partition(":")[0]


def _said(digest: str) -> str:
    kind, _, value = digest.partition(":")
    return f"version {value!r}" if kind == "version" else f"digest {value[:12]}"
