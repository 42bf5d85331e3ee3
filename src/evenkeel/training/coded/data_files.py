"""Reads a device's examples from a file: LIBSVM text (`.svm`, `.libsvm`, `.txt`; also `.xz`, `.gz`, `.bz2`) or `.npz`.

An npz file holds `y`, and `X` as a table or as the three arrays of a CSR matrix: `data`, `indices`, `indptr`, with
`shape`.
"""

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.errors import ConfigurationError
from evenkeel.training.coded.matrix import DataMatrix, SparseMatrix, as_matrix, check_finite, from_arrays

__all__ = ["as_labels", "read_examples"]

_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def read_examples(path: str | Path, columns: int | None = None) -> tuple[DataMatrix, FloatArray]:
    """Gives the examples of a file and their labels.

    Args:
        path: of the file.
        columns: of the matrix; None: as many as the file shows. LIBSVM text leaves out what is zero, so that the
            devices' files may show different numbers: say it then.

    Raises:
        ConfigurationError: the file cannot be read or holds something else; says where.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            return _read_libsvm(file, str(path), columns)
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def as_labels(labels: object, rows: int, what: str = "labels") -> FloatArray:
    """Takes labels as numbers, one for each row.

    Raises:
        ConfigurationError: too few, too many, or not finite.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "fiub" or values.shape != (rows,):
        raise ConfigurationError(
            f"{what}: expected {rows} numbers, one for each row, found shape {values.shape} of {values.dtype}"
        )
    numbers: FloatArray = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ConfigurationError(
            f"{what}: label {int(np.flatnonzero(~np.isfinite(numbers))[0])} is not a finite number"
        )
    return numbers


def _read_npz(path: Path) -> tuple[DataMatrix, FloatArray]:
    with np.load(path, allow_pickle=False) as file:
        try:
            arrays = {name: file[name] for name in file.files}
        except ValueError as error:  # an array of objects
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if "y" not in arrays:
        raise ConfigurationError(
            f"{path}: there is no array y of labels, only {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if "X" in arrays:
        matrix = as_matrix(arrays["X"], f"{path}: X")
    elif {"data", "indices", "indptr", "shape"} <= arrays.keys():
        starts, indices, data = arrays["indptr"], arrays["indices"], arrays["data"]
        floats = data if data.dtype in (np.float32, np.float64) else data.astype(np.float64)
        width = np.asarray(arrays["shape"][1:2], np.int64)
        matrix = from_arrays({"values": floats, "columns": indices, "starts": starts, "width": width}, str(path))
    else:
        raise ConfigurationError(f"{path}: there is neither X nor data, indices, indptr and shape of a CSR matrix")
    return matrix, as_labels(arrays["y"], matrix.shape[0], f"{path}: y")


def _read_libsvm(file: IO[bytes], name: str, columns: int | None) -> tuple[DataMatrix, FloatArray]:
    labels: list[float] = []
    places: list[int] = []
    values: list[float] = []
    starts = [0]
    for number, line in enumerate(file, 1):
        words = line.split(b"#")[0].split()
        if not words:
            continue
        try:
            labels.append(float(words[0]))
            before = 0
            for word in words[1:]:
                place, value = word.split(b":")
                if place == b"qid":
                    continue
                column = int(place)
                if column <= before:
                    raise ValueError("columns count from 1 and go up")
                before = column
                places.append(column - 1)
                values.append(float(value))
        except ValueError as error:
            raise ConfigurationError(
                f"{name}, line {number}: expected LIBSVM text such as `1 3:0.5 7:1`, found {line[:60]!r} ({error})"
            ) from error
        starts.append(len(places))
    width = max(places, default=-1) + 1
    if columns is not None and width > columns:
        raise ConfigurationError(f"{name}: a column {width} although {columns} were said; say at least {width}")
    matrix = SparseMatrix(
        np.array(values), np.array(places, np.int32), np.array(starts), width if columns is None else columns
    )
    check_finite(matrix, name)
    return matrix, as_labels(labels, matrix.shape[0], f"{name}: labels")
