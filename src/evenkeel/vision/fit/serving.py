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

__all__ = ["served_form", "write_serving"]


# What `evenkeel serve` refuses without a certificate, so that no light answer is given that nobody judged.
_CASCADE = (
    "# First: evenkeel certify cascade.yaml --images labelled/ --min-accuracy .80",
    "policy: {name: cascade, certificate: certificate.json}",
)


def write_serving(
    classifier: BlackBox, class_names: tuple[str, ...], temperature: float, cards: Sequence[ModelCard], out: Path
) -> Path:
    """Writes `serve.yaml` into `out`, and the classifier with a card beside it where it came as a bare ONNX file.

    A light classifier is served by a cascade: `cascade.yaml`. Gives the last file that it wrote.

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
        nodes, path = ["replicas: 2", "backups: 1"], out / "serve.yaml"
        named = {card.kind: [_quoted(f"{one.name}.json") for one in _by_size(cards, card.kind)] for card in cards}
        if "collage" in named:
            codes = ["codes:", "  - replicate", *(f"  - {name}" for name in named["collage"])]
            _write(path, [f"model: {_quoted(model)}", *codes, *nodes])
        if "classifier" in named:
            path = out / "cascade.yaml"
            codes = [f"codes: [{{kind: cascade, model: {named['classifier'][0]}}}]"]
            _write(path, [f"model: {_quoted(model)}", *codes, *nodes, *_CASCADE])
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {why_unwritten(error)}") from error
    return path


def _by_size(cards: Sequence[ModelCard], kind: str) -> list[ModelCard]:
    return sorted((card for card in cards if card.kind == kind), key=lambda card: card.grid)


def _write(path: Path, lines: Sequence[str]) -> None:
    write_whole(path, ("\n".join(lines) + "\n").encode())


def served_form(classifier: BlackBox) -> dict[str, Any]:
    """Gives the fields of a card that say how items come which `classifier` is served with."""
    if classifier.card is not None:
        names = ("layout", "datatype", "normalisation_inside", "mean", "std", "interpolation")
        return {name: getattr(classifier.card, name) for name in names}
    if not classifier.plain:
        return {}  # its graph is written anew, for plain pixels
    form: dict[str, Any] = {"layout": classifier.layout, "datatype": classifier.datatype}
    if classifier.datatype == "FP32":
        # Cards normalise as (pixels / 255 - mean) / std; here pixels are multiplied by `scale` first.
        normalisation = classifier.normalisation
        factor = 255 * normalisation.scale
        form |= {
            "normalisation_inside": False,
            "mean": tuple(mean / factor for mean in normalisation.mean),
            "std": tuple(std / factor for std in normalisation.std),
        }
    return form


def _quoted(text: str) -> str:
    """Quotes a text for YAML, whatever is in it: a colon, a hash, a bracket."""
    return json.dumps(text, ensure_ascii=False)


def _add_card(classifier: BlackBox, class_names: tuple[str, ...], temperature: float, out: Path) -> str:
    path = out / f"{classifier.name}.onnx"
    own: dict[str, Any] = {}
    if classifier.plain:
        _copy(classifier, path)
        own = {"input_name": classifier.input_name, "output_name": classifier.output_name}
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
        **served_form(classifier),
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
