"""Trains the paper's detector on fresh random collages, from the classifier's answers.

As in the paper, it learns labels, not scores: the class that the classifier gives to the very view in the collage.
Tiles are augmented one by one. The authors' affine distortion of the whole collage is left out: it moves tiles off
their cells.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.coding.answers.boxes import decode_boxes
from evenkeel.vision.networks.data import LabelledImages, collage, random_blanks
from evenkeel.vision.networks.muon import Muon
from evenkeel.vision.networks.train_classifier import Report, normalise
from evenkeel.vision.peers.detector import Boxes, Detector, detector_loss
from evenkeel.vision.peers.training import TrainingRun, Views

__all__ = ["DetectorRecipe", "boxed_classes", "train_detector"]


@dataclass(frozen=True)
class DetectorRecipe:
    """Describes how the detector is trained."""

    grid: int = 3
    minutes: float = 30.0  # of wall clock at most
    epochs: float = 200.0  # at most, in tiles shown; blanks are counted too
    collages: int = 64  # in a step, the authors' batch
    full_share: float = 0.75  # of collages without a blank cell; the paper knows no other
    rate: float = 0.05  # of Muon, radians a step at the start
    other_rate: float = 0.01  # of norms and head; at five times as much it learns nothing
    momentum: float = 0.9
    decay: float = 5e-4  # of norms and head; the authors'
    seed: int = 0


def train_detector(
    network: Detector,
    views: Views,
    held: LabelledImages,
    recipe: DetectorRecipe,
    checkpoint: Path | None = None,
    report: Report = print,
) -> tuple[Detector, dict[str, Any]]:
    """Trains `network`; gives it and notes for its card. `held` images only show how it goes.

    Args:
        network: a new detector.
        views: what is learned from, one collage at least.
        held: images that are not among the views, one collage at least.
        recipe: how.
        checkpoint: file that a stopped training goes on from.
        report: takes progress lines.
    """
    torch.set_num_threads(1)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    run = TrainingRun(
        network,
        _optimisers(network, recipe),
        minutes=recipe.minutes,
        items=recipe.epochs * len(views),
        seed=recipe.seed,
        checkpoint=checkpoint,
    )
    cells, side = recipe.grid**2, held.pixels.shape[-1]
    for number, generator in enumerate(run.passes(), start=1):
        network.train()
        order = torch.randperm(len(views), generator=generator)
        for indices in torch.split(order[: len(order) // cells * cells], recipe.collages * cells):
            shown = torch.randint(views.views, indices.shape, generator=generator)
            blank = random_blanks(len(indices) // cells, recipe.grid, generator, recipe.full_share)
            canvases = normalise(collage(views.pixels(indices, shown), recipe.grid, blank))
            labels = views.scores(indices, shown).argmax(1).reshape(-1, cells)
            loss = detector_loss(network(canvases), labels, blank, recipe.grid, side)
            torch.autograd.backward(loss)
            going = run.advance(loss.item(), len(indices))
            if run.step % 100 == 0 or run.step == 1:
                report(f"detector: {run.progress:6.1%}, step {run.step}, loss {loss.item():.4f}, {run.seconds:.0f} s")
            if not going:
                break
        if number % 4 == 0 or run.progress >= 1:
            answered, accuracy = _judge(network, held, recipe.grid)
            report(
                f"detector: epoch {run.shown / len(views):.2f}, held-out accuracy {accuracy:.4f}, "
                f"answered {answered:.4f}"
            )
    run.save()
    notes = {
        "collages_per_step": recipe.collages,
        "full_share": recipe.full_share,
        "labels": "the class that the base gives to the same view",
        "augmentation": "of single tiles; none of whole collages",
        **run.notes(len(views)),
    }
    return network.eval(), notes


def boxed_classes(boxes: Tensor, grid: int, side: int) -> Tensor:
    """Gives the class of every cell [n, grid * grid] by the paper's decoder, -1 where no box is; `boxes` of `Boxes`."""
    classes = np.full((len(boxes), grid * grid), -1)
    for row, found in enumerate(boxes.numpy()):
        for cell, box in decode_boxes(found, grid, side, grid * grid).items():
            classes[row, cell] = found[box, 5:].argmax()
    return torch.from_numpy(classes)


@torch.no_grad()
def _judge(network: Detector, held: LabelledImages, grid: int) -> tuple[float, float]:
    """Gives the shares of held-out items in full collages that get an answer, and that get the right one."""
    cells, side = grid * grid, held.pixels.shape[-1]
    whole = len(held) // cells * cells  # held-out images are in random order already
    model = Boxes(network, side).eval()
    canvases = normalise(collage(held.pixels[:whole], grid))
    found = boxed_classes(torch.cat([model(part) for part in torch.split(canvases, 50)]), grid, side).flatten()
    return float((found >= 0).float().mean()), float((found == held.labels[:whole]).float().mean())


def _optimisers(network: Detector, recipe: DetectorRecipe) -> list[torch.optim.Optimizer]:
    filters = [module.weight for module in network.features.modules() if isinstance(module, nn.Conv2d)]
    chosen = {id(parameter) for parameter in filters}
    others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    rest = torch.optim.SGD(
        others, lr=recipe.other_rate, momentum=recipe.momentum, nesterov=True, weight_decay=recipe.decay
    )
    return [rest, Muon(filters, recipe.rate)]
