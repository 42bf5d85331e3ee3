"""Cuts the weights of convolutions into slices that look alike."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

__all__ = ["ConvSlices"]


@dataclass(frozen=True)
class ConvSlices:
    """The part of a flat vector that is one convolution's, or that of several of one shape in a row, as slices.

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
        """How many weights there are, of all layers."""
        return self.layers * prod(self.shape)

    @cached_property
    def size(self) -> int:
        """Values in a slice: the most of which the layer is a whole number of slices.

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
        """How many slices a layer has."""
        return prod(self.shape) // self.size

    def cut(self, vector: Tensor) -> Tensor:
        """The slices `[layers, count, size]` of a vector."""
        return self._in_order(vector).reshape(self.layers, self.count, self.size)

    def put(self, slices: Tensor, vector: Tensor) -> None:
        """Writes the weights that `cut` gave these slices of into a vector."""
        weights = self._in_order(vector)
        weights.copy_(slices.view(weights.shape))

    def _in_order(self, vector: Tensor) -> Tensor:
        """The weights in a vector as `[layers, *space, channels, filters]`, not copied."""
        weights = vector[self.start : self.start + self.numel].view(self.layers, *self.shape)
        return weights.permute(0, *range(3, weights.dim()), 2, 1)
