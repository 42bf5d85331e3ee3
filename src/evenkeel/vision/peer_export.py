"""ONNX files of the peers, each with its card; what they are worth is measured later, on the file, by the benchmark."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from evenkeel.cards import ModelCard, save_card
from evenkeel.vision.architecture import Classifier, Served, count_macs, count_parameters
from evenkeel.vision.data import MEAN, STD
from evenkeel.vision.detector import Boxes, Detector
from evenkeel.vision.export import OPSET, fold_norms
from evenkeel.vision.parity_training import EncoderName, ParityServed

__all__ = ["export_detector", "export_parity"]


def export_parity(
    network: Classifier,
    encoder: EncoderName,
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
    generator = torch.Generator().manual_seed(0)
    if encoder == "sum":
        model: nn.Module = ParityServed(folded)
        example = torch.randn((2, side, side, 3), generator=generator)
    else:
        model = Served(folded, MEAN, STD)
        example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
    path = folder / f"{name}.onnx"
    difference = _write(model, example, path)
    card = ModelCard(
        name=name,
        kind="parity",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        classes=tuple(classes),
        height=side,
        width=side,
        datatype="FP32" if encoder == "sum" else "UINT8",
        mean=MEAN,
        std=STD,
        normalisation_inside=encoder != "sum",
        encoder=encoder,
        group=group,
        macs=count_macs(network, (3, side, side)),
        parameters=count_parameters(network),
        notes={"opset": OPSET, "largest_difference_from_torch": difference, **notes},
    )
    save_card(card, folder / f"{name}.json")
    return card


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
    model = Served(Boxes(fold_norms(network), tile_side), MEAN, STD)
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
    path = folder / f"{name}.onnx"
    difference = _write(model, example, path)
    card = ModelCard(
        name=name,
        kind="detector",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        classes=tuple(classes),
        height=side,
        width=side,
        mean=MEAN,
        std=STD,
        grid=grid,
        tile_side=tile_side,
        macs=count_macs(network, (3, side, side)),
        parameters=count_parameters(network),
        notes={"opset": OPSET, "largest_difference_from_torch": difference, **notes},
    )
    save_card(card, folder / f"{name}.json")
    return card


def _write(model: nn.Module, example: Tensor, path: Path) -> float:
    """The largest difference of an output from torch's, once `model` is written to `path`; any number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model.eval()
    with warnings.catch_warnings():
        # The older exporter writes one file without external data, and plain operators; it announces its successor.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=["images"],
            output_names=["scores"],
            dynamic_axes={"images": {0: "n"}, "scores": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = model(example).numpy()
    (found,) = session.run(["scores"], {"images": example.numpy()})
    return float(f"{np.abs(np.asarray(found) - wanted).max():.1e}")
