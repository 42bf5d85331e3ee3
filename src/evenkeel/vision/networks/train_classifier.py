"""Trains the classifier that a Collage-CNN is then fitted to: plain PyTorch on a CPU, with checkpoint and resume."""

import copy
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.vision.networks.architecture import ClassifierNet
from evenkeel.vision.networks.checkpoint import load_checkpoint, save_checkpoint
from evenkeel.vision.networks.data import CIFAR10_MEAN, CIFAR10_STD, LabelledImages, alternating_flip, translate
from evenkeel.vision.networks.muon import Muon

__all__ = ["ClassifierRecipe", "Report", "normalise", "train_classifier"]

Report = Callable[[str], None]
_CHECKPOINT_EVERY_S = 60.0
_PART = 125  # images in one backward pass; larger ones leave the cache


@dataclass(frozen=True)
class ClassifierRecipe:
    """Describes how the classifier is trained."""

    epochs: float = 11.0
    batch: int = 1000
    rate: float = 0.18  # of Muon, radians a step at the start; falls straight to zero
    bias_rate: float = 53.0  # of norm biases, for 1,000 images a step; they set how sparse the features are
    head_rate: float = 0.83  # likewise
    decay: float = 4e-3  # what a step of 1,000 images takes from biases and head at the start
    smoothing: float = 0.1  # of labels
    reach: int = 3  # pixels of random translation
    widths: tuple[int, int, int] = (128, 384, 384)
    stem_stride: int = 1
    workers: int = 2  # threads, each with its own part of the batch
    seed: int = 0


def normalise(pixels: Tensor) -> Tensor:
    """Makes float images from uint8 `pixels` [n, 3, h, w], channels last in memory, which trains fastest on a CPU."""
    mean = torch.tensor(CIFAR10_MEAN).reshape(3, 1, 1) * 255
    spread = torch.tensor(CIFAR10_STD).reshape(3, 1, 1) * 255
    return ((pixels.float() - mean) / spread).contiguous(memory_format=torch.channels_last)


class _Worker:
    """Shares the network's parameters, and has gradients and batch statistics of its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        for mine, shared in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.data = shared.data

    def take(self, parts: "queue.SimpleQueue[tuple[Tensor, Tensor]]", share: float, smoothing: float) -> float:
        """Adds the gradients of parts until none is left; returns the sum of their losses."""
        total = 0.0
        while True:
            try:
                pixels, labels = parts.get_nowait()
            except queue.Empty:
                return total
            loss = nn.functional.cross_entropy(self.network(normalise(pixels)), labels, label_smoothing=smoothing)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.item()


def _gradients(network: nn.Module, workers: list[_Worker], pixels: Tensor, labels: Tensor, smoothing: float) -> float:
    """Sets the gradients of the mean loss on `network`; workers take parts as they get free, so none waits long."""
    parts: queue.SimpleQueue[tuple[Tensor, Tensor]] = queue.SimpleQueue()
    size = min(_PART, -(-len(labels) // len(workers)))
    pairs = [(pixels[at : at + size], labels[at : at + size]) for at in range(0, len(labels), size)]
    for pair in pairs:
        parts.put(pair)
    losses = [0.0] * len(workers)

    def run(place: int) -> None:
        losses[place] = workers[place].take(parts, 1 / len(pairs), smoothing)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(1, len(workers))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    for shared, *mine in zip(network.parameters(), *(w.network.parameters() for w in workers), strict=True):
        found = [own.grad for own in mine if own.grad is not None]
        shared.grad = torch.stack(found).sum(0) if found else None
        for own in mine:
            own.grad = None
    return sum(losses) / len(pairs)


@torch.no_grad()
def _gather_statistics(network: nn.Module, workers: list[_Worker]) -> None:
    for shared, *mine in zip(network.buffers(), *(w.network.buffers() for w in workers), strict=True):
        if shared.is_floating_point():
            shared.copy_(torch.stack(list(mine)).mean(0))


def train_classifier(
    train: LabelledImages,
    held: LabelledImages,
    recipe: ClassifierRecipe,
    checkpoint: Path | None = None,
    report: Report = print,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a classifier on `train`; gives notes for its card too. `held` images only show how it goes."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    classes = int(train.labels.max()) + 1
    network = ClassifierNet(classes, recipe.widths, recipe.stem_stride)
    network.set_whitening(normalise(train.pixels[torch.randperm(len(train))[:5000]]))
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    bias_rate, head_rate = recipe.bias_rate * recipe.batch / 1000, recipe.head_rate * recipe.batch / 1000
    decay = recipe.decay * recipe.batch / 1000
    groups = [
        {"params": network.biases, "lr": bias_rate, "weight_decay": decay / bias_rate},
        {"params": [network.head.weight], "lr": head_rate, "weight_decay": decay / head_rate},
    ]
    optimisers = [torch.optim.SGD(groups, momentum=0.85, nesterov=True), Muon(network.filters, recipe.rate)]
    peaks = [float(group["lr"]) for optimiser in optimisers for group in optimiser.param_groups]
    step, spent_s = 0, 0.0
    if checkpoint is not None and checkpoint.is_file():
        state = load_checkpoint(checkpoint, "network", "optimisers", "step", "spent_s")
        network.load_state_dict(state["network"])
        for optimiser, stored in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        step, spent_s = state["step"], state["spent_s"]
    workers = [_Worker(network) for _ in range(recipe.workers)]
    per_epoch = len(train) // recipe.batch
    steps = round(recipe.epochs * per_epoch)
    began = saved = time.monotonic()

    def save() -> None:
        if checkpoint is None:
            return
        _gather_statistics(network, workers)
        state = {
            "network": network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "step": step,
            "spent_s": spent_s + time.monotonic() - began,
        }
        save_checkpoint(checkpoint, state)

    while step < steps:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch))
        network.train()
        for worker in workers:
            worker.network.train()
        for start in range(place * recipe.batch, per_epoch * recipe.batch, recipe.batch):
            indices = order[start : start + recipe.batch]
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + 500_000 + step)
            pixels = alternating_flip(train.pixels[indices], indices, epoch, recipe.seed)
            pixels = translate(pixels, recipe.reach, generator)
            loss = _gradients(network, workers, pixels, train.labels[indices], recipe.smoothing)
            share = 1 - step / steps
            every = [group for optimiser in optimisers for group in optimiser.param_groups]
            for group, peak in zip(every, peaks, strict=True):
                group["lr"] = peak * share
            for optimiser in optimisers:
                optimiser.step()
            step += 1
            if step % 10 == 0 or step == 1:
                seconds = spent_s + time.monotonic() - began
                report(f"classifier step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s")
            if time.monotonic() - saved > _CHECKPOINT_EVERY_S:
                save()
                saved = time.monotonic()
            if step >= steps:
                break
        _gather_statistics(network, workers)
        report(f"classifier epoch {step / per_epoch:.2f}: held-out accuracy {_accuracy(network, held):.4f}")
    save()
    notes = {
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "label_smoothing": recipe.smoothing,
        "seed": recipe.seed,
        "training_seconds": round(spent_s + time.monotonic() - began),
        "threads": recipe.workers,
        "torch": str(torch.__version__),
    }
    return network.eval(), notes


@torch.no_grad()
def _accuracy(network: nn.Module, images: LabelledImages) -> float:
    network.eval()
    right = 0
    for start in range(0, len(images), 250):
        scores = network(normalise(images.pixels[start : start + 250]))
        right += int((scores.argmax(1) == images.labels[start : start + 250]).sum())
    return right / len(images)
