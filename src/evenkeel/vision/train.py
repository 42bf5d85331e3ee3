"""Plain PyTorch loops that train the classifier and the Collage-CNN on CIFAR-10, with checkpoint and resume.

Progress runs from 0 to 1 by epochs or by minutes, whichever comes first, and the learning rate follows it: a training
ends with its full schedule on a slow or busy machine too.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.vision.architecture import Classifier, CollageNet
from evenkeel.vision.data import (
    MEAN,
    STD,
    Images,
    alternating_flip,
    collage,
    random_blanks,
    random_flip,
    random_grid,
    translate,
)

__all__ = [
    "ClassifierRecipe",
    "CollageRecipe",
    "Trained",
    "classifier_scores",
    "normalise",
    "one_cycle",
    "train_classifier",
    "train_collage",
]

Report = Callable[[str], None]
_CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier is trained; the defaults are airbench94's, rescaled from batches of 1,024."""

    minutes: float = 57.0  # wall clock at most; the learning rate is down by then
    epochs: float = 10.0  # at most
    batch: int = 128  # the fastest per image on one core among 64, 128 and 256, to within the noise
    rate: float = 0.19  # peak; higher learns faster until it diverges
    bias_factor: float = 64.0  # batch-norm biases learn this much faster
    momentum: float = 0.85
    decay: float = 1.3e-3
    smoothing: float = 0.2  # of labels; higher holds confidence down
    reach: int = 2  # pixels of random translation; more for longer trainings
    lookahead_every: int = 40  # steps between pulls to the slow weights
    widths: tuple[int, int, int] = (64, 256, 256)  # channels; wider is more accurate and costs more
    seed: int = 0


@dataclass(frozen=True)
class CollageRecipe:
    """How the Collage-CNN is trained."""

    minutes: float = 60.0
    epochs: float = 200.0  # in tiles shown, blanks not counted
    tiles: int = 144  # cells in a step, blank ones too: 36, 16 or 9 canvases
    rate: float = 0.15
    momentum: float = 0.9
    decay: float = 4e-4
    smoothing: float = 0.05
    reach: int = 3
    full_share: float = 0.5  # of collages without any blank cell
    average: float = 0.999  # of the weights, per step; nearer 1 is smoother and later
    teaching: float = 0.9  # weight of the teacher's scores, where there is a teacher
    teacher_temperature: float = 2.0
    widths: tuple[int, int, int] = (32, 64, 128)
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained network, and what the training took."""

    network: nn.Module
    notes: dict[str, Any]


def normalise(pixels: Tensor) -> Tensor:
    """Float images from uint8 `pixels` [n, 3, h, w], channels last in memory, which trains fastest on a CPU."""
    mean = torch.tensor(MEAN).reshape(3, 1, 1) * 255
    spread = torch.tensor(STD).reshape(3, 1, 1) * 255
    return ((pixels.float() - mean) / spread).contiguous(memory_format=torch.channels_last)


def one_cycle(progress: float, peak: float, start: float = 0.2, end: float = 0.0) -> float:
    """Share of the peak learning rate at `progress` 0..1: `start` up to 1 at `peak`, then straight down to `end`."""
    if progress < peak:
        return start + (1 - start) * progress / peak
    return max(end, 1 - (1 - end) * (progress - peak) / (1 - peak))


class _Run:
    """What both loops share: the clock, the learning rates, and the checkpoint that a stopped training goes on from."""

    def __init__(
        self, network: nn.Module, optimiser: torch.optim.SGD, minutes: float, images: float, path: Path | None
    ) -> None:
        self.network, self.optimiser, self.path = network, optimiser, path
        self.slow = copy.deepcopy(network).requires_grad_(False)
        self.budget_s, self.budget_images = minutes * 60, images
        self.peaks = [float(group["lr"]) for group in optimiser.param_groups]
        self.step, self.epoch, self.images, self.spent_s = 0, 0, 0, 0.0
        self._began = self._saved = time.monotonic()
        if path is not None and path.is_file():
            self._load(path)

    @property
    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self._began

    @property
    def progress(self) -> float:
        return min(1.0, max(self.images / self.budget_images, self.seconds / self.budget_s))

    def generator(self, seed: int) -> torch.Generator:
        """Fresh randomness for this pass: by the step, so that a resumed pass does not repeat what it has shown."""
        return torch.Generator().manual_seed(seed * 1_000_003 + self.step)

    def advance(self, loss: Tensor, share: float, images: int) -> None:
        """One optimiser step at `share` of the peak learning rate."""
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimiser.step()
        self.step += 1
        self.images += images
        if time.monotonic() - self._saved > _CHECKPOINT_EVERY_S:
            self.save()

    @torch.no_grad()
    def average(self, decay: float, back: bool = False) -> None:
        """Move the slow weights and statistics towards the fast ones; with `back`, then set the fast ones to them."""
        fast = self.network.state_dict()
        for name, slow in self.slow.state_dict().items():
            if slow.is_floating_point():
                slow.lerp_(fast[name], 1 - decay)
                if back:
                    fast[name].copy_(slow)

    def save(self) -> None:
        self._saved = time.monotonic()
        if self.path is None:
            return
        state = {
            "network": self.network.state_dict(),
            "slow": self.slow.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "counts": [self.step, self.epoch, self.images, self.seconds],
        }
        unfinished = self.path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.path)  # a training that is stopped while it saves keeps the last whole one

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.slow.load_state_dict(state["slow"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.epoch, self.images, self.spent_s = state["counts"]

    def notes(self, size: int, seed: int) -> dict[str, Any]:
        return {
            "epochs": round(self.images / size, 2),
            "steps": self.step,
            "seed": seed,
            "training_seconds": round(self.seconds),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }


def train_classifier(
    train: Images,
    held: Images,
    recipe: ClassifierRecipe,
    checkpoint: Path | None = None,
    report: Report = print,
) -> Trained:
    """A classifier trained on `train`; `held` images only show how it goes."""
    torch.manual_seed(recipe.seed)
    network = Classifier(widths=recipe.widths)
    network.set_whitening(normalise(train.pixels[torch.randperm(len(train))[:5000]]))
    _channels_last(network)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    fast = {id(bias) for bias in biases}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in fast]
    factor = recipe.bias_factor
    optimiser = torch.optim.SGD(
        [
            {"params": others, "lr": recipe.rate, "weight_decay": recipe.decay},
            {"params": biases, "lr": recipe.rate * factor, "weight_decay": recipe.decay / factor},
        ],
        momentum=recipe.momentum,
        nesterov=True,
    )
    run = _Run(network, optimiser, recipe.minutes, recipe.epochs * len(train), checkpoint)
    while run.progress < 1:
        generator = run.generator(recipe.seed)
        network.train()
        for indices in _parts(torch.randperm(len(train), generator=generator), recipe.batch):
            pixels = alternating_flip(train.pixels[indices], indices, run.epoch, recipe.seed)
            pixels = translate(pixels, recipe.reach, generator)
            scores = network(normalise(pixels))
            loss = nn.functional.cross_entropy(scores, train.labels[indices], label_smoothing=recipe.smoothing)
            run.advance(loss, one_cycle(run.progress, peak=0.23, end=0.03), len(indices))
            if run.step % recipe.lookahead_every == 0:
                run.average(0.95**5 * run.progress**3, back=True)
            if run.step % 50 == 0:
                report(f"classifier {run.progress:6.1%} epoch {run.images / len(train):5.2f} loss {loss.item():.3f}")
            if run.progress >= 1:
                break
        run.epoch += 1
        report(
            f"classifier epoch {run.epoch} held-out accuracy {_accuracy(run.slow, held):.4f} after {run.seconds:.0f} s"
        )
    run.average(1.0, back=True)
    run.save()
    notes = {"batch": recipe.batch, "label_smoothing": recipe.smoothing, **run.notes(len(train), recipe.seed)}
    return Trained(run.slow.eval(), notes)


def train_collage(
    train: Images,
    held: Images,
    recipe: CollageRecipe,
    checkpoint: Path | None = None,
    report: Report = print,
    teacher_scores: Tensor | None = None,
) -> Trained:
    """A Collage-CNN trained on fresh random collages of `train`; `held` images only show how it goes.

    With `teacher_scores` [len(train), classes] it also learns from the logits of the classifier that it will back up.
    """
    torch.manual_seed(recipe.seed)
    network = CollageNet(widths=recipe.widths)
    _channels_last(network)
    # Decay on gains and biases does more harm than good.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [
            {"params": decayed, "lr": recipe.rate, "weight_decay": recipe.decay},
            {"params": others, "lr": recipe.rate, "weight_decay": 0.0},
        ],
        momentum=recipe.momentum,
        nesterov=True,
    )
    run = _Run(network, optimiser, recipe.minutes, recipe.epochs * len(train), checkpoint)
    while run.progress < 1:
        generator = run.generator(recipe.seed)
        order = torch.randperm(len(train), generator=generator)
        network.train()
        for indices in _parts(order, recipe.tiles)[:-1]:  # the last one may not fill whole canvases
            grid = random_grid(generator)
            cells = grid * grid
            blank = random_blanks(len(indices) // cells, grid, generator, recipe.full_share)
            pixels = translate(random_flip(train.pixels[indices], generator), recipe.reach, generator)
            shown = ~blank.flatten()
            scores = network(normalise(collage(pixels, grid, blank))).flatten(0, 1)[shown]
            indices = indices[shown]
            loss = nn.functional.cross_entropy(scores, train.labels[indices], label_smoothing=recipe.smoothing)
            if teacher_scores is not None:
                loss = loss.lerp(_teach(scores, teacher_scores[indices], recipe.teacher_temperature), recipe.teaching)
            run.advance(loss, one_cycle(run.progress, peak=0.15, start=0.05), len(indices))
            run.average(min(recipe.average, 1 - 10 / (10 + run.step)))
            if run.step % 500 == 0:
                report(f"collage {run.progress:6.1%} epoch {run.images / len(train):6.2f} loss {loss.item():.3f}")
            if run.progress >= 1:
                break
        run.epoch += 1
        if run.epoch % 4 == 0 or run.progress >= 1:
            accuracy = _collage_accuracy(run.slow, held, 3)
            report(f"collage pass {run.epoch} held-out 3x3 accuracy {accuracy:.4f} after {run.seconds:.0f} s")
    run.save()
    notes = {
        "tiles_per_step": recipe.tiles,
        "label_smoothing": recipe.smoothing,
        "full_share": recipe.full_share,
        "distilled": teacher_scores is not None,
        **run.notes(len(train), recipe.seed),
    }
    return Trained(run.slow.eval(), notes)


@torch.no_grad()
def classifier_scores(network: nn.Module, images: Images) -> Tensor:
    """Logits [n, classes] of `images`, the mean of both ways round: what a Collage-CNN is taught."""
    network.eval()
    return torch.cat(
        [(network(normalise(part)) + network(normalise(part.flip(3)))) / 2 for part in _parts(images.pixels, 500)]
    )


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[place : place + size] for place in range(0, len(rows), size)]


def _channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _teach(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence from the teacher's softened answer, times temperature squared. Source: Hinton et al. 2015, sec. 2."""
    return temperature**2 * nn.functional.kl_div(
        (scores / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )


@torch.no_grad()
def _accuracy(network: nn.Module, images: Images) -> float:
    network.eval()
    scores = torch.cat([network(normalise(part)) for part in _parts(images.pixels, 500)])
    return float((scores.argmax(1) == images.labels).float().mean())


@torch.no_grad()
def _collage_accuracy(network: nn.Module, images: Images, grid: int) -> float:
    network.eval()
    whole = len(images) // grid**2 * grid**2
    canvases = collage(images.pixels[:whole], grid)  # held-out images are in random order already
    scores = torch.cat([network(normalise(part)) for part in _parts(canvases, 50)]).flatten(0, 1)
    return float((scores.argmax(1) == images.labels[:whole]).float().mean())
