"""Writes what `evenkeel serve` needs besides the fitted cards: a configuration, a card for a bare classifier."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from evenkeel.errors import ConfigurationError
from evenkeel.files import why_unwritten, write_whole
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.vision.fit.plain_graph import write_plain_graph
from evenkeel.vision.networks.export import file_sha256

__all__ = ["write_serving"]


def write_serving(
    classifier: BlackBox, class_names: tuple[str, ...], temperature: float, cards: Sequence[ModelCard], out: Path
) -> Path:
    """Writes `serve.yaml` into `out`, and the classifier with a card beside it where it came as a bare ONNX file.

    Args:
        classifier: that the cards back up.
        class_names: for its card.
        temperature: of its scores, for its card.
        cards: the fitted ones, in `out`.
        out: the folder.

    Raises:
        ConfigurationError: the disk is full.
    """
    try:
        if classifier.card is not None and classifier.card_path is not None:
            model = str(classifier.card_path.resolve())
        elif classifier.card is not None:
            model = classifier.name  # a shipped one
        else:
            model = _add_card(classifier, class_names, temperature, out)
        lines = [f"model: {_quoted(model)}", "codes:", "  - replicate"]
        lines += [f"  - {_quoted(f'{card.name}.json')}" for card in sorted(cards, key=lambda card: card.grid)]
        lines += ["replicas: 2", "backups: 1"]
        path = out / "serve.yaml"
        write_whole(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {why_unwritten(error)}") from error
    return path


def _quoted(text: str) -> str:
    """Quotes a text for YAML, whatever is in it: a colon, a hash, a bracket."""
    return json.dumps(text, ensure_ascii=False)


def _add_card(classifier: BlackBox, class_names: tuple[str, ...], temperature: float, out: Path) -> str:
    path = out / f"{classifier.name}.onnx"
    own: dict[str, Any] = {}
    if classifier.plain:
        _copy(classifier, path)
        own = {
            "layout": classifier.layout,
            "datatype": classifier.datatype,
            "input_name": classifier.input_name,
            "output_name": classifier.output_name,
        }
        if classifier.datatype == "FP32":
            # Cards normalise as (pixels / 255 - mean) / std; here pixels are multiplied by `scale` first.
            normalisation = classifier.normalisation
            factor = 255 * normalisation.scale
            own |= {
                "normalisation_inside": False,
                "mean": tuple(mean / factor for mean in normalisation.mean),
                "std": tuple(std / factor for std in normalisation.std),
            }
    else:
        if path.exists() and path.samefile(classifier.path):
            path = out / f"{classifier.name}-plain.onnx"
        own["input_name"], own["output_name"] = write_plain_graph(classifier, path)
    card = ModelCard(
        name=classifier.name,
        kind="classifier",
        file=path.name,
        sha256=file_sha256(path),
        classes=class_names,
        height=classifier.height,
        width=classifier.width,
        scores=classifier.kind,
        temperature=temperature,
        macs=classifier.macs or 0,
        parameters=classifier.parameters or 0,
        **own,
    )
    save_card(card, out / f"{classifier.name}.json")
    return f"{classifier.name}.json"


def _copy(classifier: BlackBox, path: Path) -> None:
    if path.exists() and path.samefile(classifier.path):
        return
    model = onnx.load(str(classifier.path), load_external_data=False)
    if any(uses_external_data(tensor) for tensor in model.graph.initializer):
        # A worker reads one file, so the weights move into it.
        write_whole(path, onnx.load(str(classifier.path)).SerializeToString())
    else:
        write_whole(path, classifier.path.read_bytes())
