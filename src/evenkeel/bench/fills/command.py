"""Runs `evenkeel bench fills`: options, then measurements, then rows, then what is published."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from evenkeel.arrays import Array
from evenkeel.bench.fills.backups import (
    UserClassifier,
    berrut_backup,
    cheap_backup,
    collage_backup,
    detector_backup,
    open_classifier,
    parity_backup,
    with_clear_names,
)
from evenkeel.bench.fills.figure import fills as fills_figure
from evenkeel.bench.fills.measure import (
    Grouping,
    MeasuredBackup,
    answers_of,
    pass_times_ms,
    same_class_groups,
    scores_of,
)
from evenkeel.bench.fills.rows import notes_of, page_of, rows_of
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.models import shipped
from evenkeel.models.labels import number_by_asking

__all__ = ["FillsArguments", "run_fills"]


@dataclass(frozen=True)
class FillsArguments:
    """Holds the options of `evenkeel bench fills`; `--help` says what each one means."""

    classifier: str
    images: Path | None
    split: str | None
    labels: str
    limit: int | None
    collages: tuple[str, ...]
    detectors: tuple[str, ...]
    parity_sums: tuple[str, ...]
    parity_concats: tuple[str, ...]
    cheaps: tuple[str, ...]
    berrut: str | None
    shuffles: int
    partial: bool
    same_class: bool
    rounds: int
    seed: int
    outputs: Outputs


def run_fills(arguments: FillsArguments) -> None:
    """Runs `evenkeel bench fills`: every backup on the same images."""
    arguments.outputs.check()
    progress_console = Console(stderr=True)
    classifier = open_classifier(arguments.classifier)
    backups = _backups(arguments, classifier)
    images, labels = _images(arguments, classifier, progress_console)
    _check(arguments, backups, labels, len(images))
    _warn_of_learned(backups, images, progress_console)
    grouping = Grouping(arguments.shuffles, arguments.seed, arguments.partial, arguments.same_class)
    with bars(progress_console, 24) as progress:

        def begin(what: str, total: int) -> Callable[[int], object]:
            return partial(progress.advance, progress.add_task(what, total=total))

        scores = scores_of(classifier.run, images, begin(classifier.name, len(images)))
        answers = [answers_of(backup, images, scores, labels, grouping, begin) for backup in backups]
        times_ms = None
        if arguments.rounds:
            done = begin("timing", arguments.rounds)
            times_ms = pass_times_ms(classifier.one_pass, backups, images, arguments.rounds)
            done(arguments.rounds)
    rows = rows_of(classifier, scores, labels, backups, answers, times_ms)
    publish(
        [page_of(rows)],
        rows,
        arguments_of(arguments) | {"images_read": len(images)},
        arguments.outputs,
        notes=notes_of(rows, arguments.shuffles, len(images)),
        draw=lambda: fills_figure(rows),
    )


def _backups(arguments: FillsArguments, classifier: UserClassifier) -> list[MeasuredBackup]:
    backups = [collage_backup(spec, classifier) for spec in arguments.collages]
    backups += [detector_backup(spec, classifier) for spec in arguments.detectors]
    backups += [parity_backup(spec, "sum", classifier) for spec in arguments.parity_sums]
    backups += [parity_backup(spec, "concat", classifier) for spec in arguments.parity_concats]
    backups += [cheap_backup(spec, classifier) for spec in arguments.cheaps]
    backups += [berrut_backup(items, classifier) for items in _counts(arguments.berrut)]
    if not backups and arguments.classifier == shipped.NAMES[0]:
        backups = [collage_backup(name, classifier) for name in shipped.COLLAGES]
        backups += [berrut_backup(items, classifier) for items in (4, 9)]
    if not backups:
        raise ConfigurationError(
            "no backup to measure: give --collage, --parity-sum, --parity-concat, --cheap, --detector or --berrut"
        )
    return with_clear_names(backups)


def _counts(text: str | None) -> list[int]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise ConfigurationError(f"berrut: expected numbers of items such as 4,8,9, found {text!r}")
    return [int(part) for part in parts]


def _images(
    arguments: FillsArguments, classifier: UserClassifier, console: Console
) -> tuple[Array, NDArray[np.int64] | None]:
    """Reads the images in the classifier's size, and their labels as the classifier numbers them."""
    if arguments.images is None and arguments.split is not None:
        raise ConfigurationError("split: the shipped images have none; give --images")
    from evenkeel.images.image_set import read_images

    found = read_images(
        shipped.IMAGES if arguments.images is None else arguments.images,
        height=classifier.height,
        width=classifier.width,
        labels_from=arguments.labels,
        split=arguments.split,
        limit=arguments.limit,
        interpolation=classifier.interpolation,
    )
    for note in found.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    if found.skipped_count:
        console.print(f"{found.skipped_count} images cannot be read and are left out:", soft_wrap=True)
        for name, reason in found.skipped[:10]:
            console.print(f"  {name}: {reason}", soft_wrap=True, markup=False)
    if found.labels is None:
        return found.pixels, None
    numbering = number_by_asking(
        classifier.run, found.pixels, found.labels, found.class_names, classifier.classes, classifier.form.classes
    )
    for line in numbering.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return found.pixels, numbering.numbered(found.labels)


def _warn_of_learned(backups: Sequence[MeasuredBackup], images: Array, console: Console) -> None:
    """Says where images are measured on that a model has learned from."""
    if all(backup.learned is None for backup in backups):
        return
    from evenkeel.images.sketch import again, hashes

    found = hashes(images)
    for backup in backups:
        hits, judged = again(backup.learned, found)
        if hits:
            console.print(
                f"WARNING: {backup.method} learned from these images, or from some ({hits:,} of {judged:,} that "
                "its card can tell); what is measured on them is too good. Give images that it has not seen",
                soft_wrap=True,
                highlight=False,
            )


def _check(
    arguments: FillsArguments, backups: Sequence[MeasuredBackup], labels: NDArray[np.int64] | None, images: int
) -> None:
    """Refuses what these images are too few for, or lack labels for."""
    for backup in backups:
        if backup.code.max_items > images:
            raise ConfigurationError(
                f"images: {backup.method} needs groups of {backup.code.max_items}, found {images} images"
            )
    if arguments.same_class:
        if labels is None:
            raise ConfigurationError("same-class: the images have no labels")
        for backup in backups:
            same_class_groups(labels, backup.code.max_items, arguments.seed)
    if arguments.outputs.figure is not None and (labels is None or not arguments.rounds):
        raise ConfigurationError("figure: shows accuracy against cost; it needs images with labels, and --rounds")
