"""Holds a block of data, dense or as compressed sparse rows (CSR), with the two products that training needs.

Only numpy: a device needs nothing else. Products of float32 data with float32 vectors are float32 where the data is
dense; sparse ones are added up in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from evenkeel.arrays import Array, IntegerArray
from evenkeel.errors import ConfigurationError

__all__ = ["DataMatrix", "DenseMatrix", "SparseMatrix", "as_matrix", "check_finite", "combine", "from_arrays"]

_DENSE_ABOVE = 0.3  # share of nonzeros from which sparse sums are kept dense: 12 bytes an entry against 4 or 8


class DataMatrix(ABC):
    """Holds rows of examples; never changed once made.

    Attributes:
        shape: rows and columns.
        dtype: float32 or float64.
    """

    shape: tuple[int, int]
    dtype: "np.dtype[Any]"

    @property
    @abstractmethod
    def nonzeros(self) -> int:
        """Counts the stored numbers: what a product costs."""

    @abstractmethod
    def times(self, vector: Array) -> Array:
        """Gives the matrix times a vector, one number a row."""

    @abstractmethod
    def transposed_times(self, vector: Array) -> Array:
        """Gives the transposed matrix times a vector, one number a column."""

    @abstractmethod
    def picked(self, rows: IntegerArray) -> "DataMatrix":
        """Gives some of its rows; a number beyond the last stands for a row of zeros."""

    @abstractmethod
    def between(self, first: int, end: int) -> "DataMatrix":
        """Gives the rows from `first` to before `end`, without copying their numbers."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Gives what it consists of, for files and messages; `from_arrays` is the inverse."""

    @abstractmethod
    def converted(self, dtype: str, ones: bool) -> "DataMatrix":
        """Gives it in another precision, with a last column of ones if asked for."""


def _quiet() -> "np.errstate":
    """Keeps numpy from warning of invalid values in a product of finite numbers.

    Fast kernels read whole vector registers, and the memory behind a row may hold anything. What is really not finite
    is found where it is sent.
    """
    return np.errstate(invalid="ignore")


class DenseMatrix(DataMatrix):
    """Holds all numbers."""

    def __init__(self, values: Array) -> None:
        self._values = np.ascontiguousarray(values)
        self.shape = (values.shape[0], values.shape[1])
        self.dtype = self._values.dtype

    @property
    def nonzeros(self) -> int:
        """Counts all numbers."""
        return self._values.size

    @property
    def values(self) -> Array:
        """Gives all numbers, `[rows, columns]`."""
        return self._values

    def times(self, vector: Array) -> Array:
        """Gives the product."""
        with _quiet():
            product: Array = self._values @ vector.astype(self.dtype, copy=False)
        return product

    def transposed_times(self, vector: Array) -> Array:
        """Gives the product."""
        with _quiet():
            product: Array = vector.astype(self.dtype, copy=False) @ self._values
        return product

    def picked(self, rows: IntegerArray) -> "DenseMatrix":
        """Gives some rows."""
        there = rows < self.shape[0]
        if there.all():
            return DenseMatrix(self._values[rows])
        values = np.zeros((len(rows), self.shape[1]), self.dtype)
        values[there] = self._values[rows[there]]
        return DenseMatrix(values)

    def between(self, first: int, end: int) -> "DenseMatrix":
        """Gives rows next to each other."""
        return DenseMatrix(self._values[first:end])

    def arrays(self) -> dict[str, Array]:
        """Gives the numbers."""
        return {"values": self._values}

    def converted(self, dtype: str, ones: bool) -> "DenseMatrix":
        """Gives it in another precision, with a last column of ones if asked for."""
        values = self._values.astype(dtype, copy=False)
        if ones:
            values = np.concatenate([values, np.ones((len(values), 1), values.dtype)], axis=1)
        return DenseMatrix(values)


class SparseMatrix(DataMatrix):
    """Holds the nonzero numbers row by row: `values` and their `columns`, row r's from `starts[r]` to `starts[r +
    1]`.
    """

    def __init__(self, values: Array, columns: Array, starts: Array, width: int) -> None:
        self._values = values
        self._columns = columns.astype(np.int32, copy=False)
        self._starts: IntegerArray = starts.astype(np.int64, copy=False)
        self.shape = (len(starts) - 1, width)
        self.dtype = values.dtype

    @property
    def nonzeros(self) -> int:
        """Counts the stored numbers."""
        return self._values.size

    @cached_property
    def _row_of(self) -> IntegerArray:
        return np.repeat(np.arange(self.shape[0]), np.diff(self._starts))

    def times(self, vector: Array) -> Array:
        """Gives the product, in float64."""
        products = self._values * vector.astype(self.dtype, copy=False)[self._columns]
        return np.bincount(self._row_of, products, self.shape[0])

    def transposed_times(self, vector: Array) -> Array:
        """Gives the product, in float64."""
        products = self._values * vector.astype(self.dtype, copy=False)[self._row_of]
        return np.bincount(self._columns, products, self.shape[1])

    def picked(self, rows: IntegerArray) -> "SparseMatrix":
        """Gives some rows."""
        starts = np.append(self._starts, self._starts[-1])  # one more row, of zeros
        rows = np.minimum(rows, self.shape[0])
        lengths = starts[rows + 1] - starts[rows]
        new = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(new[-1]) + np.repeat(starts[rows] - new[:-1], lengths)
        return SparseMatrix(self._values[places], self._columns[places], new, self.shape[1])

    def between(self, first: int, end: int) -> "SparseMatrix":
        """Gives rows next to each other."""
        starts = self._starts[first : end + 1]
        low, high = starts[0], starts[-1]
        return SparseMatrix(self._values[low:high], self._columns[low:high], starts - low, self.shape[1])

    def arrays(self) -> dict[str, Array]:
        """Gives the three arrays and the width."""
        width = np.array([self.shape[1]], np.int64)
        return {"values": self._values, "columns": self._columns, "starts": self._starts, "width": width}

    def converted(self, dtype: str, ones: bool) -> "SparseMatrix":
        """Gives it in another precision, with a last column of ones if asked for."""
        values, columns, starts, width = (
            self._values.astype(dtype, copy=False),
            self._columns,
            self._starts,
            self.shape[1],
        )
        if ones:
            ends = starts[1:]
            values, columns = np.insert(values, ends, 1.0), np.insert(columns, ends, width)
            starts = starts + np.arange(len(starts))
            width += 1
        return SparseMatrix(values, columns, starts, width)

    def dense(self) -> DenseMatrix:
        """Gives the same with all numbers."""
        values = np.zeros(self.shape, self.dtype)
        np.add.at(values, (self._row_of, self._columns), self._values)
        return DenseMatrix(values)

    def entries(self) -> tuple[IntegerArray, Array]:
        """Gives the places of the stored numbers, as row * width + column, and the numbers."""
        return self._row_of * self.shape[1] + self._columns, self._values


def as_matrix(data: Any, what: str = "data") -> DataMatrix:
    """Takes examples as an array `[rows, columns]` or as a scipy sparse matrix, and checks them.

    Raises:
        ConfigurationError: no rows or columns, or a number that is not finite; says where.
    """
    if hasattr(data, "tocsr"):
        csr = data.tocsr()
        csr.sum_duplicates()
        matrix: DataMatrix = SparseMatrix(_floats(csr.data), csr.indices, csr.indptr, int(csr.shape[1]))
    else:
        values = np.asarray(data)
        if values.ndim != 2 or values.dtype.kind not in "fiub":
            raise ConfigurationError(
                f"{what}: expected a table [rows, columns] of numbers, found shape {values.shape} of {values.dtype}"
            )
        matrix = DenseMatrix(_floats(values))
    check_finite(matrix, what)
    return matrix


def from_arrays(arrays: Mapping[str, Array], what: str) -> DataMatrix:
    """Makes a matrix from what `arrays` gave, taking nothing on trust.

    Raises:
        ConfigurationError: the arrays are none of a matrix; says what is wrong.
    """
    values = arrays.get("values")
    if values is None or values.dtype.kind != "f":
        raise ConfigurationError(f"{what}: there are no numbers in it")
    if "starts" not in arrays:
        if values.ndim != 2:
            raise ConfigurationError(f"{what}: expected a table [rows, columns], found shape {values.shape}")
        matrix: DataMatrix = DenseMatrix(values)
    else:
        try:
            columns, starts, width = arrays["columns"], arrays["starts"], int(arrays["width"][0])
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigurationError(f"{what}: a sparse matrix lacks its columns or its width") from error
        fits = (
            values.ndim == columns.ndim == starts.ndim == 1
            and columns.dtype.kind == starts.dtype.kind == "i"
            and len(values) == len(columns)
            and len(starts) > 0
            and starts[0] == 0
            and starts[-1] == len(values)
            and bool((np.diff(starts) >= 0).all())
            and (not len(columns) or (columns.min() >= 0 and columns.max() < width))
        )
        if not fits:
            raise ConfigurationError(f"{what}: the parts of a sparse matrix do not fit each other")
        matrix = SparseMatrix(values, columns, starts, width)
    check_finite(matrix, what)
    return matrix


def check_finite(matrix: DataMatrix, what: str) -> None:
    """Refuses a matrix without rows or columns, or with a number that is not finite.

    Raises:
        ConfigurationError: says where.
    """
    if not all(matrix.shape):
        raise ConfigurationError(f"{what}: {matrix.shape[0]} rows and {matrix.shape[1]} columns; neither may be 0")
    values = matrix.arrays()["values"]
    if np.isfinite(values.sum()):  # one pass without a second array; an overflow is looked at closely
        return
    wrong = np.flatnonzero(~np.isfinite(values.ravel()))
    if len(wrong):
        place = int(matrix.entries()[0][wrong[0]] if isinstance(matrix, SparseMatrix) else wrong[0])
        row, column = divmod(place, matrix.shape[1])
        raise ConfigurationError(
            f"{what}: row {row}, column {column} is not a finite number, nor are {len(wrong) - 1} others; "
            "remove or fill such values first"
        )


def combine(parts: Sequence[tuple[float, DataMatrix]]) -> DataMatrix:
    """Gives a sum of multiples of matrices, added up in float64; shorter ones are padded with rows of zeros."""
    rows = max(matrix.shape[0] for _, matrix in parts)
    width, dtype = parts[0][1].shape[1], parts[0][1].dtype
    sparse = [(factor, *matrix.entries()) for factor, matrix in parts if isinstance(matrix, SparseMatrix)]
    if len(sparse) == len(parts):
        entries = [(places, factor * values.astype(np.float64)) for factor, places, values in sparse]
        places, inverse = np.unique(np.concatenate([place for place, _ in entries]), return_inverse=True)
        if len(places) <= _DENSE_ABOVE * rows * width:
            values = np.bincount(inverse, np.concatenate([value for _, value in entries]), len(places))
            starts = np.searchsorted(places, np.arange(rows + 1) * width)
            return SparseMatrix(values.astype(dtype), places % width, starts, width)
    total = np.zeros((rows, width))
    for factor, matrix in parts:
        dense = matrix.dense() if isinstance(matrix, SparseMatrix) else matrix
        total[: matrix.shape[0]] += factor * dense.arrays()["values"].astype(np.float64)
    return DenseMatrix(total.astype(dtype))


def _floats(values: Array) -> Array:
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
