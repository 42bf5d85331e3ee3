"""Finds a few directions that hold most of the energy of many vectors, and how many of them that takes."""

from typing import Self

import torch
from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["Moments", "learn"]


class Moments:
    """Holds second moments `[layers, size, size]` of vectors of `size` numbers: those to learn from, those held out
    to judge by.

    They are kept instead of the vectors, so the memory does not grow with the number of samples. Uncentred: the mean of
    gradients over steps is near zero, and where it is not it is a direction like any other. So zeros stay zeros.
    """

    def __init__(self, learnt: Tensor, held_out: Tensor) -> None:
        self.learnt = learnt
        self.held_out = held_out

    @classmethod
    def none(cls, layers: int, size: int, device: torch.device) -> Self:
        """Gives those of no vectors yet."""
        return cls(*(torch.zeros(layers, size, size, dtype=torch.float32, device=device) for _ in range(2)))

    def add(self, vectors: Tensor, hold_out: bool) -> None:
        """Takes in `vectors` `[layers, count, size]`."""
        if hold_out:
            self.held_out = self.held_out.to(vectors.device).baddbmm_(vectors.mT, vectors)
        else:
            self.learnt = self.learnt.to(vectors.device).baddbmm_(vectors.mT, vectors)


def learn(moments: Moments, loss: float, limit: int) -> tuple[Tensor, Tensor]:
    """Finds for each layer the smallest basis that keeps a share 1 - loss of the *held-out* energy, of at most `limit`
    directions; all have as many as the layer that needs most.

    Held out, because a basis keeps the energy of the samples that it was learnt from whatever they are: 100 samples
    never need more than 100 directions.

    Returns:
        Orthonormal columns `[layers, size, directions]`, strongest first, and the share `[layers]` of held-out energy
        that they lose (1 where there was no energy to judge by).
    """
    size = moments.learnt.shape[-1]
    if not 1 <= limit <= size:
        raise CodeError(f"a basis of vectors of {size} numbers has 1 to {size} directions, found {limit}")
    _, vectors = torch.linalg.eigh(moments.learnt)  # weakest first
    strongest = vectors[:, :, size - limit :].flip(2)
    energy = (strongest * (moments.held_out.to(strongest.device) @ strongest)).sum(dim=1)
    total = moments.held_out.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    kept = torch.where(total > 0, energy.cumsum(1) / total, 0.0)
    needed = torch.where(total > 0, (kept < 1 - loss).sum(1, keepdim=True) + 1, 0)
    # Layers without energy ask for nothing.
    directions = min(limit, int(needed.max())) or limit
    return strongest[:, :, :directions].contiguous(), (1 - kept[:, directions - 1]).clamp(min=0.0)
