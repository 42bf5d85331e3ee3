"""Turns a task's data into batches, losses and accuracy. The same on every rank but for the batches."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evenkeel.bench.gradients.data import ARRAYS
from evenkeel.bench.gradients.models import convnet, mlp, transformer
from evenkeel.errors import ConfigurationError

__all__ = ["TrainingTask", "open_task"]

_LENGTH = 128  # characters that a text's model sees
_TESTED_AT_ONCE = 500
_WARM_STEPS = 10  # until the learning rate is reached


class TrainingTask(ABC):
    """Holds a task's data, and says how they are learnt."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Makes a new model; its weights are drawn from torch's own generator."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Makes the optimiser of a model; `rate_factor` multiplies its learning rate."""

    @abstractmethod
    def loss(self, model: nn.Module, seed: int, step: int, rank: int, world: int, batch: int) -> Tensor:
        """Gives the mean loss of a rank's share of a step's examples, which seed and step alone decide."""

    @abstractmethod
    def accuracy(self, model: nn.Module) -> float:
        """Gives the share of the test examples that the model classifies rightly."""

    @staticmethod
    def rate_factor(step: int, steps: int) -> float:
        """Gives the factor of the learning rate: it rises over the first steps, then falls to zero on a line."""
        return min(1.0, (step + 1) / _WARM_STEPS) * (1 - step / steps)


class _Images(TrainingTask):
    def __init__(self, arrays: dict[str, NDArray[Any]], classes: int) -> None:
        self._arrays = arrays
        self._classes = classes
        self._side = arrays["inputs"].shape[1]
        # Two features of the data, not of each batch, so that the test images are seen as the others are.
        some = arrays["inputs"][:: max(1, len(arrays["inputs"]) // 1000)].astype(np.float32)
        self._mean, self._spread = float(some.mean()), float(some.std()) or 1.0

    def model(self) -> nn.Module:
        return (mlp if self._arrays["inputs"].ndim == 3 else convnet)(self._side, self._classes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self._arrays["inputs"].ndim == 3:
            # With more momentum or a higher rate gradients of the step before (Pipe-SGD) lead astray.
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss(self, model: nn.Module, seed: int, step: int, rank: int, world: int, batch: int) -> Tensor:
        chosen = _share_of_epoch(len(self._arrays["targets"]), seed, step, rank, world, batch)
        labels = torch.from_numpy(self._arrays["targets"][chosen])
        return functional.cross_entropy(model(self._seen(self._arrays["inputs"][chosen])), labels)

    def accuracy(self, model: nn.Module) -> float:
        images, labels = self._arrays["test_inputs"], self._arrays["test_targets"]
        right = 0
        with torch.no_grad():
            for first in range(0, len(labels), _TESTED_AT_ONCE):
                some = slice(first, first + _TESTED_AT_ONCE)
                answers = model(self._seen(images[some])).argmax(1).numpy()
                right += int((answers == labels[some]).sum())
        return right / len(labels)

    def _seen(self, images: NDArray[Any]) -> Tensor:
        pixels = torch.from_numpy((images.astype(np.float32) - self._mean) / self._spread)
        return pixels if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


class _Text(TrainingTask):
    def __init__(self, arrays: dict[str, NDArray[Any]], classes: int) -> None:
        self._letters, self._tests, self._classes = arrays["inputs"], arrays["test_inputs"], classes

    def model(self) -> nn.Module:
        return transformer(_LENGTH, self._classes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)

    def loss(self, model: nn.Module, seed: int, step: int, rank: int, world: int, batch: int) -> Tensor:
        random = np.random.default_rng((seed, step, rank))
        begins = random.integers(0, len(self._letters) - _LENGTH, batch)
        rows = self._rows(self._letters, begins)
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def accuracy(self, model: nn.Module) -> float:
        begins = np.arange(0, len(self._tests) - _LENGTH, _LENGTH)
        right = 0
        with torch.no_grad():
            for first in range(0, len(begins), _TESTED_AT_ONCE // 10):
                rows = self._rows(self._tests, begins[first : first + _TESTED_AT_ONCE // 10])
                right += int((model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).sum())
        return right / (len(begins) * _LENGTH)

    @staticmethod
    def _rows(letters: NDArray[Any], begins: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(letters[begins[:, None] + np.arange(_LENGTH + 1)].astype(np.int64))


def open_task(name: str, folder: Path, classes: int) -> TrainingTask:
    """Opens the task `mlp`, `convnet` or `transformer` over the arrays that `TaskData.save` wrote."""
    arrays = {array: np.load(folder / f"{array}.npy", mmap_mode="r") for array in ARRAYS}
    return _Text(arrays, classes) if name == "transformer" else _Images(arrays, classes)


def _share_of_epoch(count: int, seed: int, step: int, rank: int, world: int, batch: int) -> NDArray[np.int64]:
    """Chooses the examples, of `count`, that a rank takes in a step; every epoch shuffles them anew."""
    steps = count // (world * batch)
    if not steps:
        raise ConfigurationError(f"batch: {world} workers with {batch} each need more than {count} examples")
    epoch, place = divmod(step, steps)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    begin = (place * world + rank) * batch
    return order[begin : begin + batch]
