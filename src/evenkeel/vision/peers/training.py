"""Shares what trainings of peers need: views to learn from, and a run that ends in time."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evenkeel.errors import EvenkeelError
from evenkeel.vision.networks.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["TrainingRun", "Views"]

_CHECKPOINT_EVERY_S = 60.0


class Views(Protocol):
    """Gives images in several augmented views each, with the scores that the classifier gives to each view."""

    views: int  # of every image

    def __len__(self) -> int:
        """Counts the images."""
        ...

    def pixels(self, images: Tensor, views: Tensor, /) -> Tensor:
        """Gives pixels uint8 [n, 3, height, width] of view `views[i]` of image `images[i]`, both int64 [n]."""
        ...

    def scores(self, images: Tensor, views: Tensor, /) -> Tensor:
        """Gives the classifier's scores float32 [n, classes] of these views."""
        ...


class TrainingRun:
    """Keeps the clock, the learning rates and the checkpoint of one training.

    Progress runs from 0 to 1 by items or by minutes, whichever comes first, and every learning rate falls straight from
    its peak to zero with it: a training ends with its full schedule on a slow or busy machine too. A run that finds its
    checkpoint goes on from there, and draws other items than it has drawn before.

    Args:
        network: what is trained; its weights are set from the checkpoint, if there is one.
        optimisers: their learning rates at this moment are the peaks.
        minutes: of wall clock at most, earlier runs of the same training included.
        items: to be shown at most.
        seed: of every draw.
        checkpoint: file to save to and to go on from; None: neither.

    Raises:
        EvenkeelError: the loss is not finite any more, or the checkpoint is of another network or damaged.
    """

    def __init__(
        self,
        network: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
        *,
        minutes: float,
        items: float,
        seed: int,
        checkpoint: Path | None,
    ) -> None:
        self.network, self.optimisers, self.seed, self.checkpoint = network, list(optimisers), seed, checkpoint
        self.step, self.shown = 0, 0
        self._peaks = [float(group["lr"]) for group in self._groups()]
        self._budget_s, self._budget_items = minutes * 60, items
        self._spent_s = 0.0
        self._began = self._saved = time.monotonic()
        if checkpoint is not None and checkpoint.is_file():
            self._load(checkpoint)

    @property
    def seconds(self) -> float:
        """Counts the wall clock spent on this training, earlier runs included."""
        return self._spent_s + time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """Gives the progress, from 0 to 1."""
        return min(1.0, max(self.shown / self._budget_items, self.seconds / self._budget_s))

    def passes(self) -> Iterator[torch.Generator]:
        """Gives randomness for one pass over the images after another, until the run is over."""
        while self.progress < 1:
            # By the step, not the pass: one that was broken off and taken up again is not the same pass.
            yield torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def advance(self, loss: float, items: int) -> bool:
        """Takes one step along the gradients at hand, which showed `items`; gives whether another one is due."""
        if not math.isfinite(loss):
            raise EvenkeelError(
                f"the loss is {loss} after {self.step} steps: the training diverged; start it again with a lower rate"
            )
        left = 1 - self.progress
        for group, peak in zip(self._groups(), self._peaks, strict=True):
            group["lr"] = peak * left
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.shown += items
        if time.monotonic() - self._saved > _CHECKPOINT_EVERY_S:
            self.save()
        return self.progress < 1

    def save(self) -> None:
        """Writes the checkpoint."""
        self._saved = time.monotonic()
        if self.checkpoint is None:
            return
        state = {
            "network": self.network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "counts": [self.step, self.shown, self.seconds],
        }
        save_checkpoint(self.checkpoint, state)

    def notes(self, images: int) -> dict[str, Any]:
        """Notes what the training took, for the model's card; `images` in one epoch."""
        return {
            "epochs": round(self.shown / images, 2),
            "steps": self.step,
            "seed": self.seed,
            "training_seconds": round(self.seconds),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def _groups(self) -> list[dict[str, Any]]:
        # Looked up anew each time: an optimiser that is loaded has other ones than before.
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path, "network", "optimisers", "counts")
        try:
            self.network.load_state_dict(state["network"])
            for optimiser, stored in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(stored)
            self.step, self.shown, self._spent_s = state["counts"]
        except (RuntimeError, ValueError) as error:
            raise EvenkeelError(
                f"checkpoint {path} is of another training ({str(error).splitlines()[0]}); remove it to start anew"
            ) from error
