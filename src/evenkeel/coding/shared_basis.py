"""A few directions that hold most of the energy of many vectors, and how many of them that takes."""

from typing import Self

import torch
from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["Moments", "learn"]


class Moments:
    """Second moments `[size, size]` of vectors of `size` numbers: those to learn from, and those held out to judge by.

    They are kept instead of the vectors, so the memory does not grow with the number of samples. Uncentred: the mean of
    gradients over steps is near zero, and where it is not it is a direction like any other. So zeros stay zeros.
    """

    def __init__(self, learnt: Tensor, held_out: Tensor) -> None:
        self.learnt = learnt
        self.held_out = held_out

    @classmethod
    def none(cls, size: int, device: torch.device) -> Self:
        """Those of no vectors yet."""
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, vectors: Tensor, hold_out: bool) -> None:
        """Takes in `vectors` `[count, size]`."""
        products = vectors.T @ vectors
        if hold_out:
            self.held_out = self.held_out.to(vectors.device) + products
        else:
            self.learnt = self.learnt.to(vectors.device) + products


def learn(moments: Moments, loss: float, most: int) -> tuple[Tensor, float]:
    """The smallest basis that keeps a share 1 - loss of the *held-out* energy, of at most `most` directions.

    Held out, because a basis keeps the energy of the samples that it was learnt from whatever they are: 100 samples
    never need more than 100 directions.

    Returns:
        Orthonormal columns `[size, directions]`, strongest first, and the share of held-out energy they lose (1 where
        there was no energy to judge by).
    """
    size = len(moments.learnt)
    if not 1 <= most <= size:
        raise CodeError(f"a basis of vectors of {size} numbers has 1 to {size} directions, found {most}")
    _, vectors = torch.linalg.eigh(moments.learnt)  # weakest first
    strongest = vectors[:, size - most :].flip(1)
    energy = (strongest * (moments.held_out.to(strongest.device) @ strongest)).sum(dim=0)
    total = float(moments.held_out.trace())
    if not total > 0:
        return strongest.contiguous(), 1.0
    kept = energy.cumsum(0) / total
    directions = min(most, int((kept < 1 - loss).sum()) + 1)
    return strongest[:, :directions].contiguous(), max(0.0, 1 - float(kept[directions - 1]))
