"""Does Muon: momentum whose update of a matrix is made orthogonal, so that no direction of it learns faster.

A classifier reaches the same loss in about two thirds of the images that Nesterov momentum takes.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the fixed weight norm of
its airbench94 variant.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic iteration; its fixed band is about 0.7 to 1.2, and it is fast


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """Gives `matrix` [m, n] with its singular values brought near one, its singular vectors kept.

    Newton-Schulz iterations of x -> a x + b x^3 + c x^5; values below about 1/50 of the largest are not there yet after
    three steps.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / (found.norm() + 1e-7)
    for _ in range(steps):
        square = found @ found.T
        found = _A * found + (_B * square + _C * square @ square) @ found
    return found.T if tall else found


class Muon(torch.optim.Optimizer):
    """Trains convolution filters [out, in, h, w] that a norm follows: their scale says nothing, so it is held fixed.

    Each step first sets a filter's norm to sqrt(out), then moves it by `lr` times an orthogonal matrix of that norm:
    `lr` is about the angle of a step in radians.
    """

    def __init__(self, filters: Iterable[Tensor], lr: float, momentum: float = 0.6) -> None:
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step along the gradients; filters without one stay as they are."""
        assert closure is None
        for group in self.param_groups:
            for filters in group["params"]:
                if filters.grad is None:
                    continue
                state: dict[str, Any] = self.state[filters]
                if not state:
                    state["momentum"] = torch.zeros_like(filters)
                momentum: Tensor = state["momentum"]
                momentum.mul_(group["momentum"]).add_(filters.grad)
                ahead = filters.grad.add(momentum, alpha=group["momentum"])
                update = orthogonal(ahead.reshape(len(ahead), -1)).view_as(ahead)
                filters.mul_(len(filters) ** 0.5 / filters.norm())
                filters.add_(update, alpha=-group["lr"])
