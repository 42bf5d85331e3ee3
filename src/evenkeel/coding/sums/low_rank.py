"""Sends matrices in a few directions of one of their sides, which the round before has found on the other side.

Source: Zhang, Zhang, Shi, Chu, Li, "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning"
(ICDCS 2023), whose ACP-SGD halves a step of Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient
Compression for Distributed Optimization" (NeurIPS 2019): one product and one sum a step instead of two. Departure:
coefficients may travel in another code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from evenkeel.coding.checks import number, whole
from evenkeel.coding.saved_state import saved_fields, saved_list, saved_numbers, saved_shapes, saved_tensor
from evenkeel.coding.sum_code import Broadcast, SumCode, are_finite, flat
from evenkeel.coding.sums.counter_hash import Stream, key, signs
from evenkeel.coding.sums.projected import Projected, Projection, check_arrangement
from evenkeel.coding.wire import Round
from evenkeel.errors import CodeError

__all__ = ["BucketFactors", "LowRank"]


class LowRank(Projected):
    """Sends each matrix's coefficients in `rank` directions, of its rows and of its columns in turn.

    `arrange` says which parts of a bucket are matrices: parameters of two dimensions or more, `[shape[0], rest]`. A
    round sends them in directions that all ranks share, so it is linear and takes one sum. What the mean was in them
    gives the directions of the other side, for the next round: an iteration of the power method, whose directions
    follow the strongest ones of the gradients as these change. Everything else travels in `inner` as it is.

    Stated error: the part of the mean outside of the directions, plus the inner code's error of the coefficients. The
    first directions are random, and gradients have far more than `rank`, so wrap the code in ErrorFeedback: what is
    outside of one round's directions adds up until it is a strong direction itself. All ranks get the same bits if they
    multiply matrices alike (same library, same processor, same number of threads).

    Args:
        rank: directions. More: less stays behind; more bytes. PowerSGD of the same rank sends twice as many
            numbers and leaves less behind, so take a higher one here.
        inner: codes the coefficients, e.g. THC(bits=4, block=512): a sixth of the bytes. None: float32 as they are.
        min_ratio: matrices that do not shrink so much, in numbers and on average of both sides, stay as they are.
        seed: of the first directions; the same on all ranks.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name: Final = "low_rank"

    def __init__(self, rank: int = 16, inner: SumCode | None = None, min_ratio: float = 2.0, seed: int = 0) -> None:
        super().__init__(inner)
        self.rank = whole("rank", rank, 1)
        self.min_ratio = number("min_ratio", min_ratio, 1)
        self.seed = whole("seed", seed)
        self._buckets: dict[int, BucketFactors] = {}

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}, inner={self.inner!r}, min_ratio={self.min_ratio}, seed={self.seed})"

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Takes the shapes that make up a bucket's vector, in order."""
        shapes = [tuple(shape) for shape in shapes]
        if bucket not in self._buckets:
            self._buckets[bucket] = self._first(bucket, shapes)
        check_arrangement(bucket, self._buckets[bucket].shapes, shapes)

    def observe(self, mean: Tensor, this_round: Round, broadcast: Broadcast) -> None:
        """Turns each matrix to its other side; where the mean is zero or not finite, it stays as it is."""
        bucket = self._checked(mean.numel(), this_round)
        if bucket is not None:
            self._buckets[this_round.bucket].turn(flat(mean))

    def state_dict(self) -> dict[str, Any]:
        """Gives each bucket's shapes, and the sides and directions of its matrices."""
        return {
            str(number): {
                "shapes": bucket.shapes,
                "turned": [matrix.turned for matrix in bucket.matrices],
                "bases": [matrix.basis.clone() for matrix in bucket.matrices],
            }
            for number, bucket in self._buckets.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code, or of other settings.
        """
        try:
            self._buckets = {
                number: self._restored(number, saved) for number, saved in saved_numbers("code", state).items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CodeError(f"this is not the state of a LowRank code with these settings: {error!r}") from error

    def _projection(self, bucket: int) -> "BucketFactors | None":
        return self._buckets.get(bucket)

    def _first(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> "BucketFactors":
        return BucketFactors(shapes, self.rank, self.min_ratio, key(self.seed, bucket))

    def _restored(self, number: int, saved: Mapping[str, Any]) -> "BucketFactors":
        name = f"code[{number}]"
        saved_fields(name, saved, ("shapes", "turned", "bases"))
        bucket = self._first(number, saved_shapes(f"{name}.shapes", saved["shapes"]))
        turned = saved_list(f"{name}.turned", saved["turned"])
        if not all(isinstance(side, bool) for side in turned):
            raise CodeError(f"{name}.turned: the state must have true or false for each matrix")
        bases = saved_list(f"{name}.bases", saved["bases"])
        bucket.restore(turned, [saved_tensor(f"{name}.bases", basis, (None, None)) for basis in bases])
        return bucket


@dataclass(frozen=True)
class Factored:
    """Holds one matrix of a bucket, and the directions that it is expressed in.

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
        """Gives the shape of the coefficients: a row for each direction."""
        return len(self.basis), self.rows if self.turned else self.columns

    @property
    def end(self) -> int:
        """Says where what follows begins in the vector."""
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
        """Gives the matrix expressed in the other side's directions: those that the round's mean has.

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
    """Knows where a bucket's matrices are, and the directions that they are expressed in at present.

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
        for this_round, (start, shape) in enumerate(zip(accumulate(sizes, initial=0), self.shapes, strict=False)):
            if len(shape) < 2 or not sizes[this_round]:
                continue
            rows, columns = shape[0], sizes[this_round] // shape[0]
            coded = rank * (rows + columns) / 2  # on average of the two sides
            if rank < min(rows, columns) and rows * columns >= min_ratio * coded:
                chance = signs(rank * columns, key(secret, this_round, Stream.BASIS), torch.device("cpu"))
                self.matrices.append(Factored(start, rows, columns, True, _orthonormal(chance.view(rank, columns))))

    @property
    def coded_length(self) -> int:
        """Counts the numbers of a projected vector."""
        saved = sum(each.rows * each.columns - prod(each.coded_shape) for each in self.matrices)
        return self.length - saved

    def project(self, vector: Tensor) -> Tensor:
        """Gives the vector `[coded_length]` with each matrix's coefficients in its place, direction by direction."""
        coded = vector.new_empty(self.coded_length)
        for matrix, plain, there, here in self._parts():
            coded[there] = vector[plain]
            if matrix is not None:
                matrix.project(vector, coded[here].view(matrix.coded_shape))
        return coded

    def expand(self, coded: Tensor) -> Tensor:
        """Gives the vector `[length]` that coefficients stand for."""
        vector = coded.new_empty(self.length)
        for matrix, plain, there, here in self._parts():
            vector[plain] = coded[there]
            if matrix is not None:
                matrix.expand(coded[here].view(matrix.coded_shape), vector)
        return vector

    def turn(self, mean: Tensor) -> None:
        """Expresses every matrix in the other side's directions from now on: those of the round's mean."""
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
        """Gives each matrix, what stays as it is before it, both ways, and its coefficients; at last what is left."""
        at = end = 0
        for matrix in self.matrices:
            here = at + matrix.start - end
            behind = here + prod(matrix.coded_shape)
            yield matrix, slice(end, matrix.start), slice(at, here), slice(here, behind)
            at, end = behind, matrix.end
        yield None, slice(end, self.length), slice(at, self.coded_length), slice(0, 0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Gives orthonormal rows `[few, many]` that span those given; where these are too few, some others besides."""
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T.contiguous()
