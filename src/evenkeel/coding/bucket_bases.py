"""A bucket's vector with its convolutions as coefficients, and back."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from evenkeel.coding.conv_slices import ConvSlices
from evenkeel.coding.projected import Projection

__all__ = ["Basis", "BucketBases"]

Basis: TypeAlias = Tensor | None  # orthonormal columns [slice, directions]; None: the layer travels as it is


class BucketBases(Projection):
    """Where a bucket's convolutions are, and the bases of those that are compressed.

    Some slices of a compressed layer travel whole: those whose number is `turn` modulo `turns`.

    Args:
        shapes: of the parameters that make up the vector, in order. Those of three dimensions or more are convolutions.
        longest: most values of a slice.
        turns: see above.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], longest: int, turns: int) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [prod(shape) for shape in self.shapes]
        self.layers = [
            ConvSlices(start, shape, longest)
            for start, shape, size in zip(accumulate(sizes, initial=0), self.shapes, sizes, strict=False)
            if len(shape) > 2 and size
        ]
        self.length = sum(sizes)
        self.bases: list[Basis] = [None] * len(self.layers)
        self.turns = turns
        self.turn = 0

    @property
    def coded_length(self) -> int:
        """Numbers of a projected vector."""
        saved: int = sum(
            (layer.count - len(range(*self.whole(layer)))) * (layer.size - basis.shape[1])
            for layer, basis in zip(self.layers, self.bases, strict=True)
            if basis is not None
        )
        return self.length - saved

    def whole(self, layer: ConvSlices) -> tuple[int, int, int]:
        """Begin, end and step of a compressed layer's slices that travel whole."""
        return self.turn, layer.count, self.turns

    def project(self, vector: Tensor) -> Tensor:
        """The vector `[coded_length]` with coefficients in each compressed layer's place, then its whole slices."""
        parts: list[Tensor] = []
        end = 0
        for layer, basis in zip(self.layers, self.bases, strict=True):
            if basis is not None:
                slices = layer.cut(vector)
                coefficients = slices[self._told(layer, vector.device)] @ basis.to(vector.device)
                whole = slices[self.turn :: self.turns]
                parts += [vector[end : layer.start], coefficients.view(-1), whole.reshape(-1)]
                end = layer.start + layer.numel
        return torch.cat([*parts, vector[end:]])

    def expand(self, coded: Tensor) -> Tensor:
        """The vector `[length]` that coefficients stand for."""
        parts: list[Tensor] = []
        at = end = 0
        for layer, basis in zip(self.layers, self.bases, strict=True):
            if basis is not None:
                plain = layer.start - end
                told = self._told(layer, coded.device)
                whole = at + plain + len(told) * basis.shape[1]
                behind = whole + (layer.count - len(told)) * layer.size
                slices = coded.new_empty(layer.count, layer.size)
                slices[told] = coded[at + plain : whole].view(len(told), basis.shape[1]) @ basis.to(coded.device).T
                slices[self.turn :: self.turns] = coded[whole:behind].view(-1, layer.size)
                parts += [coded[at : at + plain], layer.join(slices)]
                at = behind
                end = layer.start + layer.numel
        return torch.cat([*parts, coded[at:]])

    def _told(self, layer: ConvSlices, device: torch.device) -> Tensor:
        """Numbers of the slices that are told as coefficients."""
        numbers = torch.arange(layer.count, device=device)
        return numbers[numbers % self.turns != self.turn]
