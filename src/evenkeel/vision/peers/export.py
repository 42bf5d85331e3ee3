"""Writes ONNX files of the peers, each with its card; their worth is measured later, on the file, by the benchmark."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.models.cards import Encoder, ModelCard, save_card
from evenkeel.vision.networks.architecture import ClassifierNet, Served, count_macs, count_parameters
from evenkeel.vision.networks.data import CIFAR10_MEAN, CIFAR10_STD
from evenkeel.vision.networks.export import OPSET, example_images, file_sha256, fold_norms, write_served
from evenkeel.vision.peers.detector import Boxes, Detector
from evenkeel.vision.peers.parity_training import ParityServed

__all__ = ["export_detector", "export_parity"]


def export_parity(
    network: ClassifierNet,
    encoder: Encoder,
    group: int,
    name: str,
    classes: Sequence[str],
    side: int,
    notes: dict[str, Any],
    folder: Path,
) -> ModelCard:
    """Writes `name`.onnx and `name`.json into `folder`: a parity model for groups of up to `group` items.

    A sum comes as float32, each item normalised before the adding, as the card tells; a concatenation as uint8. Both
    are [n, side, side, 3].
    """
    folded = fold_norms(network)
    if encoder == "sum":
        model: nn.Module = ParityServed(folded)
        example = torch.randn((2, side, side, 3), generator=torch.Generator().manual_seed(0))
    else:
        model, example = Served(folded, CIFAR10_MEAN, CIFAR10_STD), example_images(side)
    card = ModelCard(
        name=name,
        kind="parity",
        file=f"{name}.onnx",
        sha256="",
        classes=tuple(classes),
        height=side,
        width=side,
        datatype="FP32" if encoder == "sum" else "UINT8",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        normalisation_inside=encoder != "sum",
        encoder=encoder,
        group=group,
        notes=notes,
    )
    return _write(card, network, model, example, folder)


def export_detector(
    network: Detector,
    grid: int,
    tile_side: int,
    name: str,
    classes: Sequence[str],
    notes: dict[str, Any],
    folder: Path,
) -> ModelCard:
    """Writes `name`.onnx and `name`.json into `folder`: from collages uint8 [n, side, side, 3] to boxes."""
    side = grid * tile_side
    card = ModelCard(
        name=name,
        kind="detector",
        file=f"{name}.onnx",
        sha256="",
        classes=tuple(classes),
        height=side,
        width=side,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        grid=grid,
        tile_side=tile_side,
        notes=notes,
    )
    model = Served(Boxes(fold_norms(network), tile_side), CIFAR10_MEAN, CIFAR10_STD)
    return _write(card, network, model, example_images(side), folder)


def _write(card: ModelCard, network: nn.Module, model: nn.Module, example: Tensor, folder: Path) -> ModelCard:
    """Writes `model`, which serves `network`, and its card into `folder`; the card gets what only the file shows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / card.file
    difference = write_served(model, example, path)
    card = replace(
        card,
        sha256=file_sha256(path),
        macs=count_macs(network, (3, card.height, card.width)),
        parameters=count_parameters(network),
        notes={"opset": OPSET, "largest_difference_from_torch": difference, **card.notes},
    )
    save_card(card, folder / f"{card.name}.json")
    return card
