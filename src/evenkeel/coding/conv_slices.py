"""How the weights of a convolution are cut into slices that look alike."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

__all__ = ["ConvSlices"]


@dataclass(frozen=True)
class ConvSlices:
    """One convolution's part of a flat vector, as slices of neighbouring values.

    Neighbours first in filters, then in input channels, then in space: a slice of a multiple of filters * channels
    values compresses far better than any other of about its length (GradiVeQ, figure 3).

    Args:
        start: where the weights begin in the vector.
        shape: of the weights, `[filters, channels, *space]`.
        longest: most values in a slice.
    """

    start: int
    shape: tuple[int, ...]
    longest: int

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return prod(self.shape)

    @property
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

    @property
    def count(self) -> int:
        """How many slices there are."""
        return self.numel // self.size

    def cut(self, vector: Tensor) -> Tensor:
        """The slices `[count, size]` of a vector."""
        weights = vector[self.start : self.start + self.numel].view(self.shape)
        return weights.permute(*range(2, len(self.shape)), 1, 0).reshape(-1, self.size)

    def join(self, slices: Tensor) -> Tensor:
        """The weights, flat, that `cut` gave these slices of."""
        filters, channels, *space = self.shape
        return slices.reshape(*space, channels, filters).permute(-1, -2, *range(len(space))).reshape(-1)
