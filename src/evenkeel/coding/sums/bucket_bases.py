"""Turns a bucket's vector into one with its convolutions as coefficients, and back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from math import prod
from operator import itemgetter
from typing import TypeAlias

import torch
from torch import Tensor

from evenkeel.coding.sums.projected import Projection

__all__ = ["Basis", "BucketBases", "ConvSlices"]

Basis: TypeAlias = Tensor | None  # orthonormal columns [layers, slice, directions]; None: they travel as they are


@dataclass(frozen=True)
class ConvSlices:
    """Cuts the part of a flat vector that is one convolution's, or that of several of one shape in a row, into slices.

    Several at once, since many small products take many times as long as a few large ones. A slice is of neighbouring
    values: neighbours first in filters, then in input channels, then in space, as a slice of a multiple of
    filters * channels values compresses far better than any other of about its length (GradiVeQ, figure 3).

    Args:
        start: where the weights begin in the vector.
        shape: of a convolution's weights, `[filters, channels, *space]`.
        longest: most values in a slice.
        layers: how many convolutions.
    """

    start: int
    shape: tuple[int, ...]
    longest: int
    layers: int = 1

    @cached_property
    def numel(self) -> int:
        """Counts the weights of all layers."""
        return self.layers * prod(self.shape)

    @cached_property
    def size(self) -> int:
        """Gives the values in a slice: the most of which the layer is a whole number of slices.

        In units of filters * channels if one of them is not too long already, else of filters, else of single values.
        """
        filters, channels, *space = self.shape
        unit, count = 1, filters
        for larger, its_count in ((filters * channels, prod(space)), (filters, channels)):
            if larger <= self.longest:
                unit, count = larger, its_count
                break
        return unit * max(times for times in range(1, count + 1) if count % times == 0 and unit * times <= self.longest)

    @cached_property
    def count(self) -> int:
        """Counts the slices of a layer."""
        return prod(self.shape) // self.size

    def cut(self, vector: Tensor) -> Tensor:
        """Gives the slices `[layers, count, size]` of a vector."""
        return self._in_order(vector).reshape(self.layers, self.count, self.size)

    def put(self, slices: Tensor, vector: Tensor) -> None:
        """Writes the weights that `cut` gave these slices of into a vector."""
        weights = self._in_order(vector)
        weights.copy_(slices.view(weights.shape))

    def _in_order(self, vector: Tensor) -> Tensor:
        """Gives the weights in a vector as `[layers, *space, channels, filters]`, not copied."""
        weights = vector[self.start : self.start + self.numel].view(self.layers, *self.shape)
        return weights.permute(0, *range(3, weights.dim()), 2, 1)


class BucketBases(Projection):
    """Knows where a bucket's convolutions are, and the bases of those that are compressed.

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
        """Counts the numbers of a projected vector."""
        saved: int = sum(
            each.layers * (each.count - len(range(*self.whole(each)))) * (each.size - basis.shape[2])
            for each, basis in zip(self.convolutions, self.bases, strict=True)
            if basis is not None
        )
        return self.length - saved

    def whole(self, convolutions: ConvSlices) -> tuple[int, int, int]:
        """Gives begin, end and step of a compressed layer's slices that travel whole."""
        return self.turn, convolutions.count, self.turns

    def project(self, vector: Tensor) -> Tensor:
        """Gives the vector `[coded_length]` with each compressed layer as coefficients, then its whole slices."""
        coded = vector.new_empty(self.coded_length)
        for compressed, here, there in self._parts():
            if compressed is None:
                coded[there] = vector[here]
            else:
                convolutions, basis = compressed
                slices = convolutions.cut(vector)
                sent, whole = self._split(convolutions, basis, coded[there])
                # All of them: choosing rows is cheaper behind the product than before it.
                coefficients = slices @ basis.to(vector.device)
                sent.copy_(coefficients[:, self._compressed(convolutions, vector.device)])
                whole.copy_(slices[:, self.turn :: self.turns])
        return coded

    def expand(self, coded: Tensor) -> Tensor:
        """Gives the vector `[length]` that coefficients stand for."""
        vector = coded.new_empty(self.length)
        for compressed, here, there in self._parts():
            if compressed is None:
                vector[here] = coded[there]
            else:
                convolutions, basis = compressed
                sent, whole = self._split(convolutions, basis, coded[there])
                coefficients = coded.new_zeros(convolutions.layers, convolutions.count, basis.shape[2])
                coefficients[:, self._compressed(convolutions, coded.device)] = sent
                slices = coefficients @ basis.to(coded.device).mT
                slices[:, self.turn :: self.turns] = whole
                convolutions.put(slices, vector)
        return vector

    def _parts(self) -> Iterator[tuple[tuple[ConvSlices, Tensor] | None, slice, slice]]:
        """Gives each compressed part with its basis, or None for what is between: its place in a vector, and coded."""
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
        """Splits a coded row: coefficients `[layers, slices, directions]` and whole slices `[layers, slices, size]`."""
        layers, whole = convolutions.layers, len(range(*self.whole(convolutions)))
        end = coded.numel() - layers * whole * convolutions.size
        return coded[:end].view(layers, -1, basis.shape[2]), coded[end:].view(layers, whole, convolutions.size)

    def _compressed(self, convolutions: ConvSlices, device: torch.device) -> Tensor:
        """Numbers the slices that travel as coefficients."""
        return _all_but(convolutions.count, self.turn, self.turns, device)


@lru_cache(4096)  # the layers of a model have few different counts, and each comes in all its turns
def _all_but(count: int, turn: int, turns: int, device: torch.device) -> Tensor:
    """Gives the numbers below `count`, but for those that are `turn` modulo `turns`."""
    numbers = torch.arange(count, device=device)
    return numbers[numbers % turns != turn]
