"""Keeps rows and columns at zero whose gradients are exactly zero on all ranks.

Codes that mix coordinates, as rotations and projections do, would give such a row a little of its neighbours' errors in
every step, and optimizers like Adam make whole steps of that: padding would drift, and words that never occur. So the
ranks tell each other where they have zeros, a bit for each row and column, and only where all of them have some.

Error feedback owes such a row nothing new. What it owed before waits until this rank has a gradient for the row again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from evenkeel.coding.sums.integer_lanes import pack_bits, unpack_bits
from evenkeel.reducers.ranks.collectives import Collectives

__all__ = ["Aside", "ZeroLines", "scattered_zeros", "zero_on_all"]

_SHORT = 8  # columns of fewer numbers are not worth a bit
_FEW = 4  # less than one in so many lines is few: only these are touched then


class _Matrix(NamedTuple):
    """Describes a parameter within a vector, taken as `[rows, columns, rest]`; the rows of a vector are its numbers."""

    start: int
    rows: int
    columns: int
    rest: int
    flagged_columns: int  # all of them, or none where they are short

    def of(self, vector: Tensor) -> Tensor:
        """Gives the vector's part that it is."""
        return vector[self.start :][: self.rows * self.columns * self.rest].view(self.rows, self.columns, self.rest)

    def probes(self, vector: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Gives one number of each row, and of each column; others in the next step."""
        start, across = vector.storage_offset() + self.start, self.columns * self.rest
        of_rows = vector.as_strided((self.rows,), (across,), start + step % self.columns * self.rest)
        return of_rows, vector.as_strided((self.flagged_columns,), (self.rest,), start + step % self.rows * across)


@dataclass(frozen=True, slots=True)
class ZeroLines:
    """Says which rows and columns of a vector's matrices are zero: slices along a parameter's first two dimensions.

    Attributes:
        matrices: that the vector has.
        flags: booleans, true for zero: each matrix's rows, then its columns. None where nothing is zero.
    """

    matrices: tuple[_Matrix, ...]
    flags: Tensor | None

    @classmethod
    def of(cls, vector: Tensor, shapes: Sequence[tuple[int, ...]], step: int) -> Self:
        """Finds them in a vector, `[length]` and contiguous, that is made up of parameters of `shapes`."""
        matrices = _matrices(tuple(shapes))
        # A line is not zero if one number of it is not: most gradients need no second look. Another one in each step,
        # since some inputs of a model are always zero.
        probes = [probe for matrix in matrices for probe in matrix.probes(vector, step)]
        if not probes or not bool((torch.cat(probes) == 0).any()):
            return cls(matrices, None)
        flags = torch.cat([flags for matrix in matrices for flags in _zero_lines(matrix, vector, step)])
        return cls(matrices, flags if bool(flags.any()) else None)

    def places(self) -> Iterator[tuple[_Matrix, int, Tensor]]:
        """Gives the zero lines of each matrix, as numbers of rows (0) and of columns (1), where it has some."""
        if self.flags is None:
            return
        lengths = [length for matrix in self.matrices for length in (matrix.rows, matrix.flagged_columns)]
        lines = iter(torch.split(self.flags, lengths))
        for matrix in self.matrices:
            for dimension in (0, 1):
                numbers = next(lines).nonzero().flatten()
                if len(numbers):
                    yield matrix, dimension, numbers

    def clear(self, vector: Tensor) -> None:
        """Writes zeros there."""
        for matrix, dimension, numbers in self.places():
            matrix.of(vector).index_fill_(dimension, numbers.to(vector.device), 0.0)


def zero_on_all(ranks: Collectives, mine: Sequence[ZeroLines], some_on_all: Sequence[bool]) -> list[ZeroLines]:
    """Gives what is zero on all ranks, of several vectors; the ranks exchange bits where each of them has zeros.

    Args:
        ranks: that share the gradients.
        mine: of each vector.
        some_on_all: whether every rank has zeros in it; the same on every rank.
    """
    flags = [each.flags for each, some in zip(mine, some_on_all, strict=True) if some and each.flags is not None]
    if not flags:
        return [replace(each, flags=None) for each in mine]
    row = torch.cat(flags)
    packed = reduce(torch.bitwise_and, ranks.gather(pack_bits(row.to(torch.uint8), 1)))
    common = iter(torch.split(unpack_bits(packed, 1, row.numel()).bool(), [each.numel() for each in flags]))
    return [replace(each, flags=next(common) if some else None) for each, some in zip(mine, some_on_all, strict=True)]


class Aside:
    """Keeps what error feedback owes in lines that are zero on this rank, while the rest is coded.

    Args:
        memory: what is owed; zeros are written there. None where nothing is yet.
        zero: on this rank.
    """

    def __init__(self, memory: Tensor | None, zero: ZeroLines) -> None:
        self._kept: list[tuple[_Matrix, int, Tensor | None, Tensor]] = []
        if memory is None:
            return
        for matrix, dimension, numbers in zero.places():
            owed, numbers = matrix.of(memory).transpose(0, dimension), numbers.to(memory.device)
            if _FEW * len(numbers) > len(owed):
                mask = torch.zeros(len(owed), 1, 1, dtype=torch.bool, device=memory.device).index_fill_(
                    0, numbers, True
                )
                self._kept.append((matrix, dimension, None, torch.where(mask, owed, 0.0)))
            else:
                self._kept.append((matrix, dimension, numbers, owed[numbers]))
            owed.index_fill_(0, numbers, 0.0)

    def put_back(self, memory: Tensor, zero_on_all: ZeroLines) -> None:
        """Adds it to what is owed now; where all ranks had zeros, nothing of the round was used."""
        zero_on_all.clear(memory)
        for matrix, dimension, numbers, kept in self._kept:
            owed, kept = matrix.of(memory).transpose(0, dimension), kept.to(memory.device)
            if numbers is None:
                owed.add_(kept)
            else:
                owed[numbers.to(memory.device)] += kept


def scattered_zeros(gradient: Tensor) -> float:
    """Gives the share of a gradient's numbers that are zero, but in no zero row or column."""
    if gradient.dim() < 2 or not gradient.numel():
        return 0.0
    zero = gradient.unsqueeze(-1).flatten(2) == 0
    in_lines = zero.flatten(1).all(1)[:, None] | zero.all(2).all(0)
    return float((zero & ~in_lines[:, :, None]).to(torch.float32).mean())


@lru_cache(maxsize=1024)
def _matrices(shapes: tuple[tuple[int, ...], ...]) -> tuple[_Matrix, ...]:
    found, start = [], 0
    for shape in shapes:
        size = prod(shape)
        if size:
            rows, columns = (*shape, 1, 1)[:2]
            long_enough = size // columns >= _SHORT
            found.append(_Matrix(start, rows, columns, size // rows // columns, columns if long_enough else 0))
        start += size
    return tuple(found)


def _zero_lines(matrix: _Matrix, vector: Tensor, step: int) -> tuple[Tensor, Tensor]:
    cube = matrix.of(vector)
    zero_rows = _confirmed(matrix.probes(vector, step)[0] == 0, cube)
    if not matrix.flagged_columns or bool(zero_rows.all()):
        return zero_rows, zero_rows.new_zeros(matrix.flagged_columns)
    # Only a row that is not zero tells something of the columns.
    there = int(zero_rows.to(torch.uint8).argmin())
    return zero_rows, _confirmed(cube[there, :, 0] == 0, cube.transpose(0, 1))


def _confirmed(perhaps: Tensor, lines: Tensor) -> Tensor:
    """Says which of the lines `[lines, ...]` that are perhaps zero are so."""
    if _FEW * int(perhaps.sum()) > len(lines):
        return perhaps & ~lines.flatten(1).any(1)
    numbers = perhaps.nonzero().flatten()
    confirmed = torch.zeros_like(perhaps)
    confirmed[numbers] = ~lines[numbers].flatten(1).any(1)
    return confirmed
