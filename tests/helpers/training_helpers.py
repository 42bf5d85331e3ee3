"""Ranks as threads, and buckets without DistributedDataParallel."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives


def in_threads(world: int, work: Callable[[Collectives], Any], timeout_s: float = 30) -> list[Any]:
    """What `work` gives on each rank."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, thread_collectives(world, timeout_s=timeout_s)))


@dataclass
class Bucket:
    """What a hook reads of DDP's buckets."""

    place: int
    last: bool
    members: list[Tensor]
    flat: Tensor
    views: list[Tensor]

    def index(self) -> int:
        return self.place

    def is_last(self) -> bool:
        return self.last

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.views

    def parameters(self) -> list[Tensor]:
        return self.members


class Model:
    """Parameters of given shapes, laid out into buckets as DDP does."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        self.parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]

    def buckets(self, gradients: Sequence[Tensor], layout: Sequence[Sequence[int]]) -> list[Bucket]:
        """Buckets of the parameters `layout`, holding their `gradients`; strides as those of the gradients."""
        buckets = []
        for place, numbers in enumerate(layout):
            flat = torch.zeros(sum(gradients[number].numel() for number in numbers), dtype=gradients[0].dtype)
            views, offset = [], 0
            for number in numbers:
                gradient = gradients[number]
                views.append(flat.as_strided(gradient.size(), gradient.stride(), offset).copy_(gradient))
                offset += gradient.numel()
            members = [self.parameters[number] for number in numbers]
            buckets.append(Bucket(place, place == len(layout) - 1, members, flat, views))
        return buckets

    def step(self, state: Any, gradients: Sequence[Tensor], layout: Sequence[Sequence[int]]) -> list[Tensor]:
        """The averages that `state` gives, by parameter number, as one backward pass would see them."""
        buckets = self.buckets(gradients, layout)
        futures = [state.average(bucket) for bucket in buckets]
        averages: dict[int, Tensor] = {}
        for numbers, bucket, future in zip(layout, buckets, futures, strict=True):
            answer, offset = future.wait(), 0
            for number, view in zip(numbers, bucket.views, strict=True):
                averages[number] = answer.as_strided(view.size(), view.stride(), offset).clone()
                offset += view.numel()
        return [averages[number] for number in sorted(averages)]


SHAPES = [(40, 30), (40,), (5, 40), (5,)]
GIANT = [[3, 2, 1, 0]]  # DDP's first step
SPLIT = [[3, 2], [1, 0]]  # and all later ones


def gradients_of(rank: int, step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Gradients that the ranks have partly in common."""
    common = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(1000 + 100 * step + rank)
    return [torch.randn(shape, generator=common) + torch.randn(shape, generator=own) for shape in shapes]


def mean_of(world: int, step: int) -> list[Tensor]:
    """The true averages of `gradients_of`."""
    every = [gradients_of(rank, step) for rank in range(world)]
    return [torch.stack(same).mean(0) for same in zip(*every, strict=True)]


def run(state: Any, model: Model, rank: int, steps: Sequence[int]) -> list[list[Tensor]]:
    """Averages of the steps; the first one in one bucket, as in a new process."""
    return [
        model.step(state, gradients_of(rank, step), GIANT if number == 0 else SPLIT)
        for number, step in enumerate(steps)
    ]


def nmse(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    error = sum(float((a - b).square().sum()) for a, b in zip(found, true, strict=True))
    return error / sum(float(b.square().sum()) for b in true)


def equal(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    """True when all tensors of all steps are the same bits."""
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )
