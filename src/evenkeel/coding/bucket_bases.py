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

    Args:
        shapes: of the parameters that make up the vector, in order. Those of three dimensions or more are convolutions.
        longest: most values of a slice.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], longest: int) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [prod(shape) for shape in self.shapes]
        self.layers = [
            ConvSlices(start, shape, longest)
            for start, shape, size in zip(accumulate(sizes, initial=0), self.shapes, sizes, strict=False)
            if len(shape) > 2 and size
        ]
        self.length = sum(sizes)
        self.bases: list[Basis] = [None] * len(self.layers)

    @property
    def coded_length(self) -> int:
        """Numbers of a projected vector."""
        saved: int = sum(
            layer.count * (layer.size - basis.shape[1])
            for layer, basis in zip(self.layers, self.bases, strict=True)
            if basis is not None
        )
        return self.length - saved

    def project(self, vector: Tensor) -> Tensor:
        """The vector `[coded_length]` with each compressed layer's coefficients in its place, slice by slice."""
        parts: list[Tensor] = []
        end = 0
        for layer, basis in zip(self.layers, self.bases, strict=True):
            if basis is not None:
                parts += [vector[end : layer.start], (layer.cut(vector) @ basis.to(vector.device)).view(-1)]
                end = layer.start + layer.numel
        return torch.cat([*parts, vector[end:]])

    def expand(self, coded: Tensor) -> Tensor:
        """The vector `[length]` that coefficients stand for."""
        parts: list[Tensor] = []
        at = end = 0
        for layer, basis in zip(self.layers, self.bases, strict=True):
            if basis is not None:
                plain = layer.start - end
                coefficients = layer.count * basis.shape[1]
                here = coded[at + plain : at + plain + coefficients].view(layer.count, -1)
                parts += [coded[at : at + plain], layer.join(here @ basis.to(coded.device).T)]
                at += plain + coefficients
                end = layer.start + layer.numel
        return torch.cat([*parts, coded[at:]])
