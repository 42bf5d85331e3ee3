"""Writes a light classifier: a fitted network of tiles that reads whole images, for a cascade or an edge node."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenkeel.arrays import Array, PixelArray
from evenkeel.images.resize import Filter, resized
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.models.measure import ModelSession, fit_temperature, timed_beside, wilson
from evenkeel.vision.fit.card import AnsweredImages
from evenkeel.vision.fit.loop import FIT_MEAN, FIT_STD
from evenkeel.vision.fit.serving import served_form
from evenkeel.vision.networks.architecture import count_macs, count_parameters
from evenkeel.vision.networks.export import file_sha256, fold_norms, machine_name, write_served

__all__ = ["write_light"]

_INTERPOLATION: Filter = "bicubic"  # as tiles are made
_SEEN = 300  # images that set the scales of 8-bit convolutions


class _WholeImages(nn.Module):
    """Runs a network of tiles on items as the classifier takes them: shrinks them to a tile, and normalises.

    Shrinking is linear, so it is two products with the very numbers by which `images/resize.py` shrinks, which any ONNX
    Runtime can do.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, side: int, classifier: BlackBox) -> None:
        super().__init__()
        self.network = network
        self.shrinks = (classifier.height, classifier.width) != (side, side)
        self.channels_last = not classifier.plain or classifier.layout == "NHWC"
        self.register_buffer("rows", torch.from_numpy(_shrinking(classifier.height, side)))
        self.register_buffer("columns", torch.from_numpy(_shrinking(classifier.width, side).T.copy()))
        # From what the classifier takes to pixels of 0..255.
        factor, shift = torch.ones(3), torch.zeros(3)
        if classifier.plain and classifier.datatype == "FP32":
            normalisation = classifier.normalisation
            factor = torch.tensor(normalisation.std) / normalisation.scale
            shift = torch.tensor(normalisation.mean) / normalisation.scale
        self.register_buffer("scale", factor.reshape(3, 1, 1))
        self.register_buffer("offset", shift.reshape(3, 1, 1))

    def forward(self, items: Tensor) -> Tensor:
        """Gives scores [n, classes]."""
        rows = items.permute(0, 3, 1, 2) if self.channels_last else items
        pixels = rows.float() * self.scale + self.offset
        if self.shrinks:
            pixels = (self.rows @ pixels @ self.columns).clamp(0, 255)
        mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (FIT_MEAN, FIT_STD))
        scores: Tensor = self.network(pixels / (255 * std) - mean / std)
        return scores


def _shrinking(length: int, side: int) -> Array:
    """Gives the matrix float32 [side, length] by which a line of pixels is shrunk."""
    lines = np.repeat(np.eye(length, dtype=np.float32)[..., None], 3, axis=2)
    return np.ascontiguousarray(resized(lines, side, length, interpolation=_INTERPOLATION)[..., 0])


def write_light(
    network: nn.Module,
    side: int,
    classifier: BlackBox,
    class_names: tuple[str, ...],
    held: AnsweredImages,
    shown: AnsweredImages,
    cost: float,
    notes: dict[str, Any],
    out: Path,
) -> ModelCard:
    """Writes the ONNX file and the card of a light classifier into `out`; arguments as for `card.write_model`.

    It takes items as the classifier does, so that both stand in one cascade.

    Raises:
        OSError: it cannot be written.
    """
    name = f"{classifier.name.removesuffix('-base')}-light"
    path = out / f"{name}.onnx"
    folded = fold_norms(network)
    seen = _items(classifier, held.images.pixels[:_SEEN]) if notes["precision"] == "int8" else None
    example = torch.from_numpy(_items(classifier, held.images.pixels[:2]))
    difference = write_served(_WholeImages(folded, side, classifier), example, path, seen)
    session = ModelSession.open(path)

    def scores(pixels: PixelArray) -> Array:
        parts = np.array_split(pixels, max(1, len(pixels) // 256))
        return np.concatenate([session(_items(classifier, part)) for part in parts])

    item = _items(classifier, held.images.pixels[:1])
    base_ms, pass_ms = timed_beside([classifier.one_pass(), lambda: session(item)], cost)
    card = ModelCard(
        name=name,
        kind="classifier",
        file=path.name,
        sha256=file_sha256(path),
        classes=class_names,
        height=classifier.height,
        width=classifier.width,
        temperature=fit_temperature(scores(held.images.pixels), held.truth),
        macs=count_macs(folded, (3, side, side)),
        parameters=count_parameters(network),
        latency_ms=round(pass_ms, 3),
        relative_cost=round(pass_ms / base_ms, 3),
        notes=notes
        | {
            "tile_side": side,
            "calibrated_to": "the classifier's answers" if held.images.labels is None else "labels",
            "classifier_latency_ms": round(base_ms, 3),
            "machine": machine_name(),
            "largest_difference_from_torch": difference,
        },
        **served_form(classifier),
    )
    found, labels, how = scores(shown.images.pixels).argmax(1), shown.images.labels, f"{len(shown.answers):,} images"
    card = replace(
        card,
        accuracy=None if labels is None else wilson(int((found == labels).sum()), len(found), f"{how}, {shown.kind}"),
        agreement=wilson(int((found == shown.answers).sum()), len(found), f"{how}, {shown.kind}"),
    )
    save_card(card, out / f"{name}.json")
    return card


def _items(classifier: BlackBox, pixels: PixelArray) -> Array:
    """Gives the images as they come to the classifier when it is served."""
    return classifier.form.prepared(pixels) if classifier.plain else pixels
