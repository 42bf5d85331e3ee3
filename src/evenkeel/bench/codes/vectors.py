"""Makes vectors of several workers to try codes on: by a law, with a given correlation between the workers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import unknown

__all__ = ["LAWS", "Gradients", "check_made", "correlation_of", "made"]

_EARLIER = 20  # rounds: as many as GradiVeQ learns from by default
_LAYER = 3000  # coordinates: so that layers end inside of blocks
_ROW = 64
_ACTIVE = 0.01
_SPIKE_EVERY = 1024
_DIRECTIONS = 16

MatrixShapes = tuple[tuple[int, ...], ...]
Draw = Callable[[], Tensor]  # one more vector [length] of the same law, independent of those before


@dataclass(frozen=True)
class Gradients:
    """Holds what the workers have to average in one round.

    Attributes:
        vectors: float32 `[workers, length]`.
        shapes: of the parameters that make up a vector, in order; empty: a single row of numbers.
        earlier: means of the rounds before, oldest first, float32 `[rounds, length]`; `[0, length]` where there are
            none, so that codes that learn have nothing to learn from.
    """

    vectors: Tensor
    shapes: MatrixShapes
    earlier: Tensor

    @property
    def workers(self) -> int:
        """Counts the workers."""
        return int(self.vectors.shape[0])

    @property
    def length(self) -> int:
        """Counts the coordinates of a vector."""
        return int(self.vectors.shape[1])


def made(law: str, workers: int, length: int, correlation: float, seed: int) -> Gradients:
    """Makes vectors of a law with about that cosine between each two: sqrt(c) common + sqrt(1 - c) own.

    The same seed draws the same numbers whatever the correlation. Laws:

    - `gaussian`: iid N(0, 1);
    - `lognormal-1`, `lognormal-2`: layers of 3000 coordinates, each with a scale exp(s N(0, 1)) that all workers share;
    - `sparse`: rows of 64, of which 1 % are not zero, as the gradient of an embedding;
    - `one-hot`: one coordinate of 1024 is +-1, the others N(0, 1) / 1000: what one rotation leaves least normal;
    - `low-rank`: a 3x3 convolution whose filters and whose inputs each lie in few directions, the same in all rounds,
      each with 0.7 of the energy of the one before; and 1 % of noise.

    Raises:
        ConfigurationError: no such law, or a correlation or length that it cannot have.
    """
    check_made(law, length, correlation)
    draw, shapes, learnable = LAWS[law](length, torch.Generator().manual_seed(seed))
    common = math.sqrt(correlation) * draw()
    vectors = torch.stack([common + math.sqrt(1 - correlation) * draw() for _ in range(workers)])
    spread = math.sqrt(correlation + (1 - correlation) / workers)  # of a mean, where a vector has 1
    earlier = [spread * draw() for _ in range(_EARLIER if learnable else 0)]
    return Gradients(vectors, shapes, torch.stack(earlier) if earlier else vectors[:0])


def check_made(law: str, length: int, correlation: float) -> None:
    """Raises ConfigurationError where `made` would raise it."""
    if law not in LAWS:
        raise unknown("distribution", law, list(LAWS))
    if not 0 <= correlation <= 1:
        raise ConfigurationError(f"correlation: must be from 0 to 1, found {correlation}")
    if length < _SPIKE_EVERY:
        raise ConfigurationError(f"length: must be {_SPIKE_EVERY} or more, found {length}")


def correlation_of(vectors: Tensor) -> float | None:
    """Computes the mean cosine of all pairs of workers; None with a single worker."""
    workers = len(vectors)
    if workers == 1:
        return None
    units = torch.nn.functional.normalize(vectors.double(), dim=1)
    return float((units.sum(0).square().sum() - workers) / (workers * (workers - 1)))


def _gaussian(length: int, chance: torch.Generator) -> tuple[Draw, MatrixShapes, bool]:
    return lambda: torch.randn(length, generator=chance), (), False


def _lognormal(sigma: float, length: int, chance: torch.Generator) -> tuple[Draw, MatrixShapes, bool]:
    layers = -(-length // _LAYER)
    scales = torch.exp(sigma * torch.randn(layers, generator=chance)).repeat_interleave(_LAYER)[:length]
    shapes = tuple((min(_LAYER, length - start),) for start in range(0, length, _LAYER))
    return lambda: torch.randn(length, generator=chance) * scales, shapes, False


def _sparse(length: int, chance: torch.Generator) -> tuple[Draw, MatrixShapes, bool]:
    rows, rest = divmod(length, _ROW)

    def draw() -> Tensor:
        active = torch.randperm(rows, generator=chance)[: math.ceil(_ACTIVE * rows)]
        vector = torch.zeros(length)
        vector[: rows * _ROW].view(rows, _ROW)[active] = torch.randn(len(active), _ROW, generator=chance)
        return vector

    return draw, ((rows, _ROW), *(((rest,),) if rest else ())), False


def _one_hot(length: int, chance: torch.Generator) -> tuple[Draw, MatrixShapes, bool]:
    stretches = length // _SPIKE_EVERY

    def draw() -> Tensor:
        vector = torch.randn(length, generator=chance) / 1000
        places = torch.randint(_SPIKE_EVERY, (stretches,), generator=chance) + torch.arange(stretches) * _SPIKE_EVERY
        vector[places] = 1.0 - 2.0 * torch.randint(2, (stretches,), generator=chance)
        return vector

    return draw, (), False


def _low_rank(length: int, chance: torch.Generator) -> tuple[Draw, MatrixShapes, bool]:
    # As many filters as channels, a multiple of 4, so that slices come out even.
    filters = math.isqrt(length // 9) // 4 * 4
    inputs = 9 * filters
    rest = length - filters * inputs
    count = min(_DIRECTIONS, filters)
    energies = 0.7 ** torch.arange(count)
    sizes = torch.sqrt(energies / energies.sum())
    outputs, across = (
        torch.linalg.qr(torch.randn(side, count, generator=chance))[0] * sizes * math.sqrt(side)
        for side in (filters, inputs)
    )

    def draw() -> Tensor:
        weights = outputs @ torch.randn(count, count, generator=chance) @ across.T
        vector = torch.randn(length, generator=chance) / 10
        vector[: filters * inputs] += weights.view(-1)
        return vector

    return draw, ((filters, filters, 3, 3), *(((rest,),) if rest else ())), True


LAWS: dict[str, Callable[[int, torch.Generator], tuple[Draw, MatrixShapes, bool]]] = {
    "gaussian": _gaussian,
    "lognormal-1": lambda length, chance: _lognormal(1.0, length, chance),
    "lognormal-2": lambda length, chance: _lognormal(2.0, length, chance),
    "sparse": _sparse,
    "one-hot": _one_hot,
    "low-rank": _low_rank,
}
