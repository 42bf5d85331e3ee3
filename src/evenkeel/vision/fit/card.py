"""Writes a fitted network's files: its ONNX file, and the card with what was measured of that file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.images.image_set import ImageSet
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.models.gate import by_class, gate
from evenkeel.models.measure import (
    LATENCY_ROUNDS,
    ModelSession,
    fit_temperature,
    reliability_table,
    shuffled_groups,
    timed_beside,
    wilson,
)
from evenkeel.vision.fit.loop import FIT_MEAN, FIT_STD
from evenkeel.vision.networks.architecture import CollageNet, Served, count_macs, count_parameters
from evenkeel.vision.networks.export import file_sha256, fold_norms, machine_name, write_onnx

__all__ = ["AnsweredImages", "class_lines", "summary", "write_model"]

_WEAKEST = 5  # classes
_SUREST = (0.9, 0.7, 0.5)  # shares of the fills, whose agreement is shown
_SEEN = 100  # collages that set the scales of 8-bit convolutions


@dataclass(frozen=True)
class AnsweredImages:
    """Holds images, the classifier's answers to them `[images]`, and what they are: held-out or test.

    Their labels, where there are some, are numbers of the classifier's classes.
    """

    images: ImageSet
    answers: NDArray[np.int64]
    kind: str

    @property
    def truth(self) -> NDArray[np.int64]:
        """Gives labels, or the classifier's answers where there are none."""
        return self.answers if self.images.labels is None else self.images.labels


def write_model(
    network: nn.Module,
    grid: int,
    side: int,
    classifier: BlackBox,
    class_names: tuple[str, ...],
    held: AnsweredImages,
    shown: AnsweredImages,
    cost: float,
    notes: dict[str, Any],
    out: Path,
) -> ModelCard:
    """Writes the ONNX file and the card of one grid into `out`, with what was measured on the written file.

    Args:
        network: trained.
        grid: tiles along one side of a collage.
        side: pixels along one side of a tile.
        classifier: whose answers it gives.
        class_names: of the classifier's classes.
        held: images that it was not trained on, which its confidence is calibrated with.
        shown: images that accuracy and agreement are of.
        cost: that is allowed; where the file seems to cost more, it is measured again.
        notes: how it was trained; without `mirrored_views` free cells stay blank.
        out: a folder.

    Raises:
        OSError: it cannot be written.
    """
    name, length = f"{classifier.name.removesuffix('-base')}-collage-{grid}x{grid}", grid * side
    path, eight_bit = out / f"{name}.onnx", notes["precision"] == "int8"
    folded = CollageNet(fold_norms(network), grid, side)
    card = ModelCard(
        name=name,
        kind="collage",
        file=path.name,
        sha256="",
        classes=class_names,
        height=length,
        width=length,
        mean=FIT_MEAN,
        std=FIT_STD,
        grid=grid,
        tile_side=side,
        interpolation="bicubic",
        squeezed=classifier.height != classifier.width,
        macs=count_macs(folded, (3, length, length)),
        parameters=count_parameters(network),
        notes=notes,
    )
    seen = np.concatenate(list(islice(_collages(card, held.images)[1], _SEEN))) if eight_bit else None
    difference = write_onnx(folded, path, length, FIT_MEAN, FIT_STD, seen)
    session = ModelSession.open(path)
    gain = _mirror_gain(session, card, held) if notes["mirrored_views"] else None
    canvas = np.random.default_rng(0).integers(0, 256, (1, length, length, 3), dtype=np.uint8)
    base_ms, pass_ms = timed_beside([classifier.one_pass(), lambda: session(canvas)], cost)
    measured = {
        "calibrated_to": "the classifier's answers" if held.images.labels is None else "labels",
        "classifier_latency_ms": round(base_ms, 3),
        "classifier_macs": classifier.macs,
        "latency_how": f"median of {LATENCY_ROUNDS} interleaved passes, batch 1, one thread, processor time, CPU",
        "machine": machine_name(),
        "largest_difference_from_torch": difference,
        "held_out_lost_to_int8": _lost(session, folded, card, held) if eight_bit else None,
        "held_out_gain_of_a_mirrored_look": gain,
    }
    card = replace(
        card,
        sha256=file_sha256(path),
        latency_ms=round(pass_ms, 3),
        relative_cost=round(pass_ms / base_ms, 3),
        notes=notes | measured,
        # Right and left may mean something, in digits for example: whether they do is measured, not assumed.
        mirrored=gain is not None and gain >= 0,
        **_calibration(session, card, held),
    )
    card = _with_quality(session, card, shown)
    save_card(card, out / f"{name}.json")
    return card


def summary(card: ModelCard) -> str:
    """Says in one line what the card of a fitted network says."""
    accuracy = "" if card.accuracy is None else f"accuracy {card.accuracy.value:.2%}, "
    agreement = "" if card.agreement is None else f"agreement {card.agreement.value:.2%}, "
    return (
        f"{card.name}: {accuracy}{agreement}cost {card.relative_cost:.2f} ({card.latency_ms:.2f} ms, "
        f"{card.macs / 1e6:.0f} million multiply-accumulates, {card.parameters:,} parameters)"
    )


def class_lines(card: ModelCard) -> list[str]:
    """Says what agreement is worth class by class, line by line: it hides classes that are rare."""
    assert card.agreement is not None
    assert card.largest_class_share is not None
    largest, found = card.notes["largest_class"], card.notes["above_min_confidence"]
    elsewhere = "there are no others"
    if card.agreement_elsewhere is not None:
        there = card.agreement_elsewhere
        elsewhere = f"agreement on the others {there.value:.1%} ({there.low:.1%} to {there.high:.1%})"
    lines = [f"{card.name}: {largest} is {card.largest_class_share:.1%} of the classifier's answers; {elsewhere}"]
    weakest = sorted(card.notes["agreement_by_class"], key=lambda row: row[2] / row[1])[:_WEAKEST]
    lines.append(
        "  lowest by class: "
        + ", ".join(f"{name} {agreed / images:.0%} of {images:,}" for name, images, agreed in weakest)
    )
    surest = [
        f"{agrees:.1%} of the surest {share:.0%} (from {least:.2f} on)"
        for share, least, agrees in card.notes["agreement_of_surest"]
    ]
    lines.append(f"  by confidence: {', '.join(surest)} agree")
    if card.agreement.low <= card.largest_class_share:
        lines.append(
            f"WARNING: always saying {largest} would agree in {card.largest_class_share:.1%}; the fills do hardly more"
        )
    if card.min_confidence > 1:
        lines.append(
            "WARNING: rare classes are filled wrongly whatever the confidence, so the card lets no fill through "
            "(min_confidence). Give more images of them, a higher --cost, or a longer training"
        )
    elif card.min_confidence > 0:
        lines.append(
            f"  fills less sure than {card.min_confidence:.4f} are not used (min_confidence), since rare classes would "
            f"be filled wrongly: {found['filled']:.1%} pass, {found['agreement'] or 0:.1%} of them agree; of "
            f"{found['elsewhere']:,} images of other classes {found['elsewhere_filled_wrongly']:,} are filled wrongly"
        )
    return lines


def _lost(session: ModelSession, network: CollageNet, card: ModelCard, held: AnsweredImages) -> float:
    """Measures by how much fewer of the held-out images are right in 8 bits than in floating point."""
    cells, scores = _collage_scores(session, card, held.images)
    served, truth = Served(network, FIT_MEAN, FIT_STD), held.truth[cells]
    with torch.no_grad():
        exact = np.concatenate([served(torch.from_numpy(each))[0] for each in _collages(card, held.images)[1]])
    right, right_exactly = ((each.argmax(1) == truth).mean() for each in (scores, exact))
    return round(float(right_exactly - right), 5)


def _mirror_gain(session: ModelSession, card: ModelCard, held: AnsweredImages) -> float:
    """Measures how many more held-out images are right when a mirrored look is averaged with the plain one."""
    cells, scores = _collage_scores(session, card, held.images)
    _, looks = _collage_scores(session, card, replace(held.images, pixels=held.images.pixels[:, :, ::-1]))
    truth = held.truth[cells]
    both, alone = (float((each.argmax(1) == truth).mean()) for each in (scores + looks, scores))
    return round(both - alone, 5)


def _calibration(session: ModelSession, card: ModelCard, held: AnsweredImages) -> dict[str, Any]:
    cells, scores = _collage_scores(session, card, held.images)
    truth = held.truth[cells]
    temperature = fit_temperature(scores, truth)
    confidences = ScoreForm(len(card.classes), temperature).confidences(scores)
    return {
        "temperature": temperature,
        "reliability": reliability_table(confidences, scores.argmax(1) == truth),
        # Rounded up, so that what it is to hold back does not pass by a digit.
        "min_confidence": math.ceil(gate(held.answers[cells], scores.argmax(1), confidences) * 1e6) / 1e6,
    }


def _with_quality(session: ModelSession, card: ModelCard, shown: AnsweredImages) -> ModelCard:
    """Adds to the card what its fills of the `shown` images are worth, as a whole and class by class."""
    cells, scores = _collage_scores(session, card, shown.images)
    found, answers, labels = scores.argmax(1), shown.answers[cells], shown.images.labels
    how = f"{len(cells):,} {shown.kind} images in shuffled full {card.grid}x{card.grid} collages"
    classes = by_class(answers, found)
    others = answers != classes.largest
    confidences = ScoreForm.from_card(card).confidences(scores)
    passing = confidences >= card.min_confidence
    by_name = [[card.classes[each], classes.images[each], classes.agreed[each]] for each in classes.images]
    return replace(
        card,
        accuracy=None if labels is None else wilson(int((found == labels[cells]).sum()), len(cells), how),
        agreement=wilson(int((found == answers).sum()), len(cells), how),
        agreement_elsewhere=wilson(int((found == answers)[others].sum()), int(others.sum()), how)
        if others.any()
        else None,
        largest_class_share=round(classes.largest_share, 5),
        notes=card.notes
        | {
            "largest_class": card.classes[classes.largest],
            "agreement_by_class": by_name,  # name, images that the classifier gives it, fills that agree
            "agreement_of_surest": _of_surest(confidences, found == answers),  # share, least confidence, agreement
            "above_min_confidence": {
                "filled": round(float(passing.mean()), 5),
                "agreement": round(float((found == answers)[passing].mean()), 5) if passing.any() else None,
                "elsewhere_filled_wrongly": int((passing & others & (found != answers)).sum()),
                "elsewhere": int(others.sum()),
            },
        },
    )


def _of_surest(confidences: NDArray[np.floating[Any]], agreed: NDArray[np.bool_]) -> list[list[float]]:
    """Gives rows of a share of the fills, the surest; the lowest confidence among them; and how many of them agree."""
    order = np.argsort(-confidences, kind="stable")
    rows = []
    for share in _SUREST:
        chosen = order[: math.ceil(share * len(order))]
        rows.append([share, round(float(confidences[chosen[-1]]), 4), round(float(agreed[chosen].mean()), 5)])
    return rows


def _collage_scores(
    session: ModelSession, card: ModelCard, images: ImageSet
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Gives the images that the cells held [n], and their scores [n, classes]."""
    cells, canvases = _collages(card, images)
    return cells, np.concatenate([session(canvas)[0] for canvas in canvases])


def _collages(card: ModelCard, images: ImageSet) -> tuple[NDArray[np.int64], Iterator[NDArray[np.uint8]]]:
    """Gives the images that the cells hold [n], and the collages [1, side, side, 3], encoded as the gateway does."""
    code = Collage.from_card(card)
    groups = shuffled_groups(len(images), card.cells, seed=card.grid)
    canvases = (code.spares([code.prepare(images.pixels[item]) for item in group])[0].inputs for group in groups)
    return groups.reshape(-1), canvases
