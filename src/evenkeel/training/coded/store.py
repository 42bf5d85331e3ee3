"""Keeps a device's coded blocks, on disk so that they outlive a restart, or in memory for devices in this process.

A folder holds `store.json`, which says of each block its version and digest, and a file of arrays for each block. Files
are replaced whole, so that a device that is killed while it writes has either the old block or the new one. A file
whose digest is not the one that is written down is as good as gone: the block is made again.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.text_values import read_json
from evenkeel.training.coded.data_files import as_labels
from evenkeel.training.coded.matrix import DataMatrix, from_arrays

__all__ = ["BlockStore", "HeldBlock", "Membership"]

_log = logging.getLogger(__name__)
_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class HeldBlock:
    """Holds one block: its version, its numbers and, where it is a partition, its labels."""

    version: int
    matrix: DataMatrix
    labels: FloatArray | None = None


@dataclass
class Membership:
    """Says which training a device takes part in, and how its own data is part of that.

    Attributes:
        training: drawn by the coordinator; what is kept of another training is worth nothing.
        own: name of the block that is the device's own data; empty: it brought none, or another one has it now.
        dtype: of blocks: float32 or float64.
        ones: the data has a last column of ones, for the intercept.
    """

    training: str = ""
    own: str = ""
    dtype: str = "float64"
    ones: bool = False


@dataclass
class _Written:
    """Says what is on disk of a block."""

    version: int
    digest: str


@dataclass
class BlockStore:
    """Keeps the blocks of one device.

    Args:
        folder: where they lie on disk; None: in memory alone.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    folder: Path | None = None
    membership: Membership = field(default_factory=Membership)
    _held: dict[str, HeldBlock] = field(default_factory=dict)
    _written: dict[str, _Written] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            index = self.folder / "store.json"
            if not index.exists():
                return
            said = read_json(index.read_text(encoding="utf-8"))
            self.membership = Membership(**said["membership"])
            self._written = {
                name: _Written(int(each["version"]), str(each["digest"])) for name, each in said["blocks"].items()
            }
        except OSError as error:
            raise ConfigurationError(f"store {self.folder} cannot be used: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"store {self.folder}: store.json cannot be understood ({error}); "
                "remove the folder, and the blocks are made again"
            ) from error
        for name, written in list(self._written.items()):
            block = self._read(name, written)
            if block is None:
                del self._written[name]
            else:
                self._held[name] = block

    @property
    def versions(self) -> dict[str, int]:
        """Gives the version of each block that is held."""
        return {name: block.version for name, block in self._held.items()}

    def get(self, name: str, version: int) -> HeldBlock | None:
        """Gives a block, if it is held in that version."""
        block = self._held.get(name)
        return block if block is not None and block.version == version else None

    def put(self, name: str, block: HeldBlock) -> None:
        """Keeps a block in place of an older one of that name.

        Raises:
            EvenkeelError: it cannot be written.
        """
        if self.folder is not None:
            arrays = dict(block.matrix.arrays())
            if block.labels is not None:
                arrays["labels"] = block.labels
            buffer = BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            data = buffer.getvalue()
            written = _Written(block.version, hashlib.sha256(data).hexdigest())
            self._replace(self._file(name, written), data)
            before = self._written.get(name)
            self._written[name] = written
            self._write_index()
            if before is not None and before.digest != written.digest:
                self._file(name, before).unlink(missing_ok=True)
        self._held[name] = block

    def begin(self, membership: Membership) -> None:
        """Takes part in a training; blocks of another one are dropped."""
        old = []
        if membership.training != self.membership.training:
            old = [self._file(name, written) for name, written in self._written.items()] if self.folder else []
            self._held.clear()
            self._written.clear()
        self.membership = membership
        if self.folder is not None:
            self._write_index()
            for file in old:
                file.unlink(missing_ok=True)

    def _file(self, name: str, written: _Written) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{written.digest[:16]}.npz"

    def _read(self, name: str, written: _Written) -> HeldBlock | None:
        path = self._file(name, written)
        try:
            if not name.isalnum() or not set(written.digest) <= _DIGITS:
                raise ConfigurationError(f"a block {name!r}")
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != written.digest:
                raise ConfigurationError("the file was changed")
            with np.load(BytesIO(data), allow_pickle=False) as file:
                arrays = {each: file[each] for each in file.files}
            labels = arrays.pop("labels", None)
            matrix = from_arrays(arrays, str(path))
            return HeldBlock(
                written.version, matrix, None if labels is None else as_labels(labels, matrix.shape[0], str(path))
            )
        except (OSError, ValueError, ConfigurationError) as error:
            _log.warning("block %s of store %s is of no use and will be made again: %s", name, self.folder, error)
            return None

    def _write_index(self) -> None:
        assert self.folder is not None
        blocks = {name: asdict(written) for name, written in self._written.items()}
        text = json.dumps({"membership": asdict(self.membership), "blocks": blocks}, indent=1)
        self._replace(self.folder / "store.json", text.encode())

    def _replace(self, path: Path, data: bytes) -> None:
        new = path.with_suffix(".new")
        try:
            new.write_bytes(data)
            os.replace(new, path)
        except OSError as error:
            raise EvenkeelError(f"{path} cannot be written: {error.strerror or error}") from error
