"""A bucket's vector with its matrices as coefficients in a few directions of one of their sides, and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from evenkeel.coding.sum_code import are_finite
from evenkeel.coding.sums.counter_hash import Stream, key, signs
from evenkeel.coding.sums.projected import Projection

__all__ = ["BucketFactors", "Factored"]


@dataclass(frozen=True)
class Factored:
    """One matrix of a bucket, and the directions that it is told in.

    Attributes:
        start: where it begins in the vector.
        rows: of the matrix.
        columns: of the matrix.
        turned: whether the directions are ones of its rows' space, `[columns]`, instead of its columns', `[rows]`.
        basis: the directions, orthonormal rows `[rank, rows]`, or `[rank, columns]` if turned. As rows, since products
            of a few rows with a matrix take a fraction of the time of products of a matrix with a few columns.
    """

    start: int
    rows: int
    columns: int
    turned: bool
    basis: Tensor

    @property
    def coded_shape(self) -> tuple[int, int]:
        """Of the coefficients: a row for each direction."""
        return len(self.basis), self.rows if self.turned else self.columns

    @property
    def end(self) -> int:
        """Where what follows begins in the vector."""
        return self.start + self.rows * self.columns

    def project(self, vector: Tensor, out: Tensor) -> None:
        """Writes the coefficients of a vector's matrix, `[coded_shape]`."""
        matrix = self._of(vector)
        torch.mm(self.basis.to(vector.device), matrix.T if self.turned else matrix, out=out)

    def expand(self, coded: Tensor, out: Tensor) -> None:
        """Writes the matrix of coefficients into a vector."""
        basis, matrix = self.basis.to(coded.device), self._of(out)
        if self.turned:
            torch.mm(coded.T, basis, out=matrix)
        else:
            torch.mm(basis.T, coded, out=matrix)

    def after(self, mean: Tensor) -> "Factored":
        """The matrix told in the other side's directions: those that the round's mean has.

        A mean that is zero or not finite has none; then nothing changes.
        """
        coded = mean.new_empty(self.coded_shape)
        self.project(mean, coded)
        if not bool(are_finite(coded)) or not bool(coded.any()):
            return self
        return replace(self, turned=not self.turned, basis=_orthonormal(coded))

    def _of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.end].view(self.rows, self.columns)


class BucketFactors(Projection):
    """Where a bucket's matrices are, and the directions that they are told in at present.

    Parameters of two dimensions and more are matrices, `[shape[0], rest]`. Those that would not shrink enough, and all
    other parameters, stay as they are. The first directions are random.

    Args:
        shapes: of the parameters that make up the vector, in order.
        rank: directions of each matrix.
        min_ratio: see LowRank.
        secret: of the first directions.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int, min_ratio: float, secret: int) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [prod(shape) for shape in self.shapes]
        self.length = sum(sizes)
        self.matrices: list[Factored] = []
        for number, (start, shape) in enumerate(zip(accumulate(sizes, initial=0), self.shapes, strict=False)):
            if len(shape) < 2 or not sizes[number]:
                continue
            rows, columns = shape[0], sizes[number] // shape[0]
            coded = rank * (rows + columns) / 2  # on average of the two sides
            if rank < min(rows, columns) and rows * columns >= min_ratio * coded:
                chance = signs(rank * columns, key(secret, number, Stream.BASIS), torch.device("cpu"))
                self.matrices.append(Factored(start, rows, columns, True, _orthonormal(chance.view(rank, columns))))

    @property
    def coded_length(self) -> int:
        """Numbers of a projected vector."""
        saved = sum(each.rows * each.columns - prod(each.coded_shape) for each in self.matrices)
        return self.length - saved

    def project(self, vector: Tensor) -> Tensor:
        """The vector `[coded_length]` with the coefficients of each matrix in its place, direction by direction."""
        coded = vector.new_empty(self.coded_length)
        for matrix, plain, there, here in self._parts():
            coded[there] = vector[plain]
            if matrix is not None:
                matrix.project(vector, coded[here].view(matrix.coded_shape))
        return coded

    def expand(self, coded: Tensor) -> Tensor:
        """The vector `[length]` that coefficients stand for."""
        vector = coded.new_empty(self.length)
        for matrix, plain, there, here in self._parts():
            vector[plain] = coded[there]
            if matrix is not None:
                matrix.expand(coded[here].view(matrix.coded_shape), vector)
        return vector

    def turn(self, mean: Tensor) -> None:
        """Every matrix is told in the other side's directions from now on: those of the round's mean."""
        self.matrices = [matrix.after(mean) for matrix in self.matrices]

    def restore(self, turned: Sequence[bool], bases: Sequence[Tensor]) -> None:
        """Takes over the sides and directions of all matrices.

        Raises:
            ValueError: they are of other matrices, or of another rank.
        """
        before = zip(self.matrices, turned, bases, strict=True)
        found = [replace(matrix, turned=bool(side), basis=basis.clone()) for matrix, side, basis in before]
        for matrix, old in zip(found, self.matrices, strict=True):
            across = matrix.columns if matrix.turned else matrix.rows
            if matrix.basis.shape != (len(old.basis), across):
                raise ValueError(f"directions {tuple(matrix.basis.shape)} where {(len(old.basis), across)} belong")
        self.matrices = found

    def _parts(self) -> Iterator[tuple[Factored | None, slice, slice, slice]]:
        """Each matrix, what stays as it is before it, both ways, and its coefficients; at last what is left."""
        at = end = 0
        for matrix in self.matrices:
            here = at + matrix.start - end
            behind = here + prod(matrix.coded_shape)
            yield matrix, slice(end, matrix.start), slice(at, here), slice(here, behind)
            at, end = behind, matrix.end
        yield None, slice(end, self.length), slice(at, self.coded_length), slice(0, 0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows `[few, many]` that span those given; where these are too few, some others besides."""
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T.contiguous()
