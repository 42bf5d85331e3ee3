"""Trains parity models (ParM) for a classifier: one network that gives the sum of the scores of a group's items.

Source: Kosaian, Rashmi, Venkataraman, Parity Models, SOSP 2019. As there: the classifier's own architecture, mean
squared error, full groups of random images. Where this departs from their public code: the target is the sum of the
scores on the same augmented views that the parity was made of (theirs: on the images as they are); weights may start
from the classifier's own; Muon and a falling rate in place of Adam.

Parities are made by the encoders that serving uses, so that nothing can differ between the two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.coding.answers.parity import ConcatEncoder, ParityEncoder, SumEncoder
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.models.cards import Encoder
from evenkeel.vision.networks.architecture import ClassifierNet
from evenkeel.vision.networks.data import CIFAR10_MEAN, CIFAR10_STD, LabelledImages
from evenkeel.vision.networks.muon import Muon
from evenkeel.vision.networks.train_classifier import Report, normalise
from evenkeel.vision.peers.training import TrainingRun, Views

__all__ = [
    "ParityRecipe",
    "ParityServed",
    "decoded_accuracy",
    "encode_groups",
    "parity_encoder",
    "parity_network",
    "train_parity",
]

_PART = 125  # parities in one backward pass; larger ones leave the cache


@dataclass(frozen=True)
class ParityRecipe:
    """Describes how a parity model is trained."""

    encoder: Encoder
    group: int  # items in a parity, ParM's k
    minutes: float = 30.0  # of wall clock at most
    epochs: float = 100.0  # at most; one shows as many items as there are images
    batch: int = 250  # parities in a step; fewer make more steps in the same time, of which Muon takes a larger share
    rate: float = 0.08  # of Muon, radians a step at the start; lower suits short trainings from the base's weights
    bias_rate: float = 5.0  # of norm biases; a tenth of what a classifier bears, as errors here are not bounded
    head_rate: float = 0.3
    momentum: float = 0.85  # of biases and head
    decay: float = 1e-3  # over the learning rate: what a step takes from biases and head
    seed: int = 0


def parity_encoder(encoder: Encoder, group: int, side: int) -> ParityEncoder:
    """Makes the encoder of serving, for items [side, side, 3] of uint8.

    A sum is of normalised pixels, float32, as in ParM, so that absent items leave no trace; a concatenation holds the
    pixels as they are.
    """
    if encoder == "sum":
        return SumEncoder(group, Pixels(datatype="FP32", normalise=True, mean=CIFAR10_MEAN, std=CIFAR10_STD))
    return ConcatEncoder(group, side, side)


def encode_groups(encoder: ParityEncoder, pixels: Tensor) -> Tensor:
    """Makes what a parity model is fed with: [groups, 3, side, side], normalised.

    For `pixels` uint8 [groups * k, 3, side, side], at least one group. Items k * j to k * j + k - 1 make group j.
    """
    items = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    kept = [encoder.prepare(item) for item in items]
    groups = range(0, len(kept), encoder.max_items)
    parities = torch.from_numpy(np.stack([encoder.combine(kept[at : at + encoder.max_items]) for at in groups]))
    planes = parities.permute(0, 3, 1, 2)
    return normalise(planes) if planes.dtype == torch.uint8 else planes


class ParityServed(nn.Module):
    """Runs a parity model as its file does: float32 sums of normalised items [n, side, side, 3] to scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, parities: Tensor) -> Any:
        """Gives scores [n, classes]."""
        return self.network(parities.permute(0, 3, 1, 2))


def parity_network(base: ClassifierNet, recipe: ParityRecipe, views: Views, from_base: bool) -> ClassifierNet:
    """Makes a network of the base's architecture: with its weights, or new ones whose first layer fits parities."""
    whiten, head = base.whiten, base.head
    firsts = (cast(nn.Conv2d, cast(nn.Sequential, block)[0]) for block in base.blocks)
    first, second, third = (convolution.out_channels for convolution in firsts)
    network = ClassifierNet(head.out_features, (first, second, third), whiten.stride[0])
    if from_base:
        network.load_state_dict(base.state_dict())
        if recipe.encoder == "sum":  # whose spread is the root of k as large, and the first layer has no norm behind it
            with torch.no_grad():
                network.whiten.weight.mul_(recipe.group**-0.5)
    else:
        generator = torch.Generator().manual_seed(recipe.seed)
        count = min(len(views) // recipe.group, 2000) * recipe.group
        indices = torch.randperm(len(views), generator=generator)[:count]
        pixels = views.pixels(indices, torch.zeros_like(indices))
        network.set_whitening(encode_groups(parity_encoder(recipe.encoder, recipe.group, pixels.shape[-1]), pixels))
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def train_parity(
    base: ClassifierNet,
    views: Views,
    held: LabelledImages,
    recipe: ParityRecipe,
    from_base: bool = True,
    checkpoint: Path | None = None,
    report: Report = print,
) -> tuple[ClassifierNet, dict[str, Any]]:
    """Trains a parity model for `base`; gives notes for its card too. `held` images only show how it goes.

    Args:
        base: the classifier; gives the architecture and, with `from_base`, the first weights.
        views: what is learned from, one group at least.
        held: images that are not among the views, one group at least.
        recipe: how.
        from_base: start from the base's weights, an advantage that ParM does not take.
        checkpoint: file that a stopped training goes on from.
        report: takes progress lines.
    """
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    network = parity_network(base, recipe, views, from_base)
    encoder = parity_encoder(recipe.encoder, recipe.group, held.pixels.shape[-1])
    run = TrainingRun(
        network,
        _optimisers(network, recipe),
        minutes=recipe.minutes,
        items=recipe.epochs * len(views),
        seed=recipe.seed,
        checkpoint=checkpoint,
    )
    whole = len(held) // recipe.group * recipe.group
    held_inputs = encode_groups(encoder, held.pixels[:whole])
    held_scores = _scores(base, normalise(held.pixels[:whole]))
    name = f"parity {recipe.encoder} {recipe.group}"
    for generator in run.passes():
        network.train()
        order = torch.randperm(len(views), generator=generator)
        grouped = order[: len(order) // recipe.group * recipe.group]
        for indices in torch.split(grouped, recipe.batch * recipe.group):
            shown = torch.randint(views.views, indices.shape, generator=generator)
            inputs = encode_groups(encoder, views.pixels(indices, shown))
            targets = _by_group(views.scores(indices, shown), recipe.group).sum(1)
            loss = _gradients(network, inputs, targets, recipe.group)
            going = run.advance(loss, len(indices))
            if run.step % 20 == 0 or run.step == 1:
                report(f"{name}: {run.progress:6.1%}, step {run.step}, loss {loss:.4f}, {run.seconds:.0f} s")
            if not going:
                break
        accuracy, agreement = decoded_accuracy(network, held_inputs, held_scores, held.labels[:whole])
        report(f"{name}: epoch {run.shown / len(views):.2f}, decoded {accuracy:.4f}, as the base {agreement:.4f}")
    run.save()
    notes = {
        "encoder": recipe.encoder,
        "group": recipe.group,
        "weights_from_base": from_base,
        "targets": "sum of the base's scores on the views that made the parity",
        "groups": "full, as in ParM",
        "batch": recipe.batch,
        **run.notes(len(views)),
    }
    return network.eval(), notes


def _optimisers(network: ClassifierNet, recipe: ParityRecipe) -> list[torch.optim.Optimizer]:
    parts = [(network.biases, recipe.bias_rate), ([network.head.weight], recipe.head_rate)]
    groups = [{"params": part, "lr": rate, "weight_decay": recipe.decay / rate} for part, rate in parts]
    return [torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True), Muon(network.filters, recipe.rate)]


def _gradients(network: nn.Module, inputs: Tensor, targets: Tensor, group: int) -> float:
    """Adds the gradients of the mean squared error over `group`, which is about 1 for a model that says nothing."""
    total = 0.0
    for part, wanted in zip(torch.split(inputs, _PART), torch.split(targets, _PART), strict=True):
        loss = nn.functional.mse_loss(network(part), wanted) * (len(part) / len(inputs) / group)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def decoded_accuracy(network: nn.Module, inputs: Tensor, scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Gives shares of decoded items that match the labels, and the base's own answers, each item missing in turn.

    Args:
        network: the parity model.
        inputs: parities [groups, 3, side, side], normalised.
        scores: the base's [groups * k, classes].
        labels: [groups * k].
    """
    own = _by_group(scores, len(scores) // len(inputs))
    missing = _scores(network, inputs)[:, None] - (own.sum(1, keepdim=True) - own)
    found = missing.argmax(2).flatten()
    return float((found == labels).float().mean()), float((found == scores.argmax(1)).float().mean())


@torch.no_grad()
def _scores(network: nn.Module, inputs: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(part) for part in torch.split(inputs, 250)])


def _by_group(scores: Tensor, group: int) -> Tensor:
    """Gives `scores` [groups * k, classes] as [groups, k, classes]."""
    return scores.reshape(-1, group, scores.shape[1])
