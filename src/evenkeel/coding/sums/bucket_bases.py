"""A bucket's vector with its convolutions as coefficients, and back."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from math import prod
from operator import itemgetter
from typing import TypeAlias

import torch
from torch import Tensor

from evenkeel.coding.sums.conv_slices import ConvSlices
from evenkeel.coding.sums.projected import Projection

__all__ = ["Basis", "BucketBases"]

Basis: TypeAlias = Tensor | None  # orthonormal columns [layers, slice, directions]; None: they travel as they are


class BucketBases(Projection):
    """Where a bucket's convolutions are, and the bases of those that are compressed.

    Some slices of a compressed layer travel whole: those whose number is `turn` modulo `turns`.

    Convolutions of one shape that follow each other have as many directions, each layer its own.

    Args:
        shapes: of the parameters that make up the vector, in order. Those of three dimensions or more are convolutions.
        longest: most values of a slice of a layer with so many weights.
        turns: see above.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], longest: Callable[[int], int], turns: int) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [prod(shape) for shape in self.shapes]
        self.convolutions: list[ConvSlices] = []
        starts = accumulate(sizes, initial=0)
        for shape, alike in groupby(zip(self.shapes, starts, strict=False), key=itemgetter(0)):
            first, *others = (start for _, start in alike)
            if len(shape) > 2 and prod(shape):
                self.convolutions.append(ConvSlices(first, shape, longest(prod(shape)), 1 + len(others)))
        self.length = sum(sizes)
        self.bases: list[Basis] = [None] * len(self.convolutions)
        self.turns = turns
        self.turn = 0

    @property
    def coded_length(self) -> int:
        """Numbers of a projected vector."""
        saved: int = sum(
            each.layers * (each.count - len(range(*self.whole(each)))) * (each.size - basis.shape[2])
            for each, basis in zip(self.convolutions, self.bases, strict=True)
            if basis is not None
        )
        return self.length - saved

    def whole(self, convolutions: ConvSlices) -> tuple[int, int, int]:
        """Begin, end and step of a compressed layer's slices that travel whole."""
        return self.turn, convolutions.count, self.turns

    def project(self, vector: Tensor) -> Tensor:
        """The vector `[coded_length]` with coefficients in each compressed layer's place, then its whole slices."""
        coded = vector.new_empty(self.coded_length)
        for compressed, here, there in self._parts():
            if compressed is None:
                coded[there] = vector[here]
            else:
                convolutions, basis = compressed
                slices = convolutions.cut(vector)
                told, whole = self._split(convolutions, basis, coded[there])
                # All of them: choosing rows is cheaper behind the product than before it.
                coefficients = slices @ basis.to(vector.device)
                told.copy_(coefficients[:, self._told(convolutions, vector.device)])
                whole.copy_(slices[:, self.turn :: self.turns])
        return coded

    def expand(self, coded: Tensor) -> Tensor:
        """The vector `[length]` that coefficients stand for."""
        vector = coded.new_empty(self.length)
        for compressed, here, there in self._parts():
            if compressed is None:
                vector[here] = coded[there]
            else:
                convolutions, basis = compressed
                told, whole = self._split(convolutions, basis, coded[there])
                coefficients = coded.new_zeros(convolutions.layers, convolutions.count, basis.shape[2])
                coefficients[:, self._told(convolutions, coded.device)] = told
                slices = coefficients @ basis.to(coded.device).mT
                slices[:, self.turn :: self.turns] = whole
                convolutions.put(slices, vector)
        return vector

    def _parts(self) -> Iterator[tuple[tuple[ConvSlices, Tensor] | None, slice, slice]]:
        """What is compressed, with its basis, or None for what is between: where it is in a vector, and where coded."""
        at = end = 0
        for each, basis in zip(self.convolutions, self.bases, strict=True):
            if basis is not None:
                between = each.start - end
                yield None, slice(end, each.start), slice(at, at + between)
                at, end = at + between, each.start + each.numel
                whole = len(range(*self.whole(each)))
                width = each.layers * ((each.count - whole) * basis.shape[2] + whole * each.size)
                yield (each, basis), slice(each.start, end), slice(at, at + width)
                at += width
        yield None, slice(end, self.length), slice(at, self.coded_length)

    def _split(self, convolutions: ConvSlices, basis: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients `[layers, slices, directions]` and whole slices `[layers, slices, size]`, as one row coded."""
        layers, whole = convolutions.layers, len(range(*self.whole(convolutions)))
        told = coded.numel() - layers * whole * convolutions.size
        return coded[:told].view(layers, -1, basis.shape[2]), coded[told:].view(layers, whole, convolutions.size)

    def _told(self, convolutions: ConvSlices, device: torch.device) -> Tensor:
        """Numbers of the slices that are told as coefficients."""
        return _all_but(convolutions.count, self.turn, self.turns, device)


@lru_cache(4096)  # the layers of a model have few different counts, and each comes in all its turns
def _all_but(count: int, turn: int, turns: int, device: torch.device) -> Tensor:
    """Numbers below `count`, but for those that are `turn` modulo `turns`."""
    numbers = torch.arange(count, device=device)
    return numbers[numbers % turns != turn]
