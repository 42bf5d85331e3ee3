"""Runs `evenkeel bench fills`: shows and writes its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from evenkeel.bench.fills.measure import Fills, MeasuredBackup, collect, from_scores, same_class_groups, spare_tasks
from evenkeel.bench.fills.rows import Truth, cost_fields, fill_fields, gate_fields, partial_fields, same_class_fields
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.errors import ConfigurationError
from evenkeel.figures.drawing import save
from evenkeel.figures.outputs import asked_for, check_outputs, write, write_json
from evenkeel.figures.progress import bars
from evenkeel.figures.records import json_document
from evenkeel.figures.tables import Column, markdown, table
from evenkeel.models import shipped
from evenkeel.models.labels import number_by_asking
from evenkeel.models.measure import interleaved_times_ms, shuffled_groups

__all__ = ["FillsArguments", "measure", "run_fills"]

_BATCH = 100
_WIDE = 2000  # images below which intervals are wide enough to say so
_COLUMNS = (
    Column("cost", "cost", "passes"),
    Column("macs", "compute", "MMAC", 1e-6),
    Column("parameters", "weights", "M", 1e-6),
    Column("latency_ms", "pass", "ms"),
    Column("accuracy", "right", "%", 100.0),
    Column("drop", "drop", "points", 100.0),
    Column("agreement", "agree", "%", 100.0),
    Column("agreement_elsewhere", "elsewhere", "%", 100.0),
    Column("accuracy_coverage_90", "surest .9", "%", 100.0),
    Column("overall_unavailable_5", "all, .05 lost", "%", 100.0),
)
_FURTHER = (Column("accuracy_same_class", "same class", "%", 100.0),)

Tell = Callable[[str, int], object]  # what is being done, how many groups (or images) more


@dataclass(frozen=True)
class FillsArguments:
    """What is asked of every backup.

    Attributes:
        shuffles: random permutations of the images that are cut into groups.
        seed: of the shuffles.
        partly: also groups of 1..N items.
        same_class: also groups of one class.
        rounds: of timing; 0 leaves cost and latency out.
    """

    shuffles: int = 1
    seed: int = 1
    partly: bool = False
    same_class: bool = False
    rounds: int = 100


def run_fills(arguments: dict[str, Any]) -> None:
    """`evenkeel bench fills`: every backup on the same images, a table, and files where asked for."""
    check_outputs(json=arguments["json_path"], markdown=arguments["markdown"], figure=arguments["figure"])
    asked = FillsArguments(
        arguments["shuffles"],
        arguments["seed"],
        arguments["partial"],
        arguments["same_class"],
        arguments["rounds"],
    )
    console, progress_console = Console(), Console(stderr=True)
    classifier = open_classifier(arguments["classifier"])
    backups = _backups(arguments, classifier)
    images, labels = _images(arguments, classifier, progress_console)
    _check_counts(asked, backups, labels, len(images))
    _warn_of_learned(backups, images, progress_console)
    if arguments["figure"] is not None and (labels is None or not asked.rounds):
        raise ConfigurationError("figure: shows accuracy against cost; it needs images with labels, and --rounds")
    with bars(progress_console, 24) as progress:
        tasks: dict[str, Any] = {}

        def begin(what: str, total: int) -> Tell:
            tasks[what] = progress.add_task(what, total=total)
            return lambda name, done: progress.advance(tasks[name], done)

        rows = measure(classifier, backups, images, labels, asked, begin)
    console.print(table(rows, _columns(rows), "method"))
    for note in _notes(rows, asked, len(images)):
        console.print(note, soft_wrap=True)
    if arguments["json_path"] is not None:
        document = json_document(asked_for(arguments) | {"images_read": len(images)}, rows)
        write_json(arguments["json_path"], document)
        console.print(f"rows: {arguments['json_path']}", soft_wrap=True)
    if arguments["markdown"] is not None:
        write(arguments["markdown"], markdown(rows, _columns(rows), "method").encode())
        console.print(f"table: {arguments['markdown']}", soft_wrap=True)
    if arguments["figure"] is not None:
        save(fills_figure(rows), arguments["figure"])
        console.print(f"figure: {arguments['figure']}", soft_wrap=True)


def measure(
    classifier: UserClassifier,
    backups: Sequence[MeasuredBackup],
    images: Array,
    labels: NDArray[np.int64] | None,
    asked: FillsArguments,
    begin: Callable[[str, int], Tell],
) -> list[dict[str, Any]]:
    """One row for the classifier itself, then one for each backup.

    Args:
        classifier: whose replies are lost.
        backups: who fills.
        images: uint8 `[images, height, width, 3]`, of the classifier's size.
        labels: `[images]`; None leaves everything but agreement out.
        asked: how.
        begin: told of each piece of work and its size; gives who is told of its progress.
    """
    tell = begin(classifier.name, len(images))
    parts = []
    for first in range(0, len(images), _BATCH):
        parts.append(classifier.run(images[first : first + _BATCH]))
        tell(classifier.name, len(parts[-1]))
    scores = np.concatenate(parts)
    truth = Truth(scores.argmax(axis=1).astype(np.int64), labels)
    own = from_scores(scores, classifier.form.confidences(scores))
    rows = [
        {
            "method": "classifier",
            "model": classifier.name,
            "images_per_backup": 1,
            "macs": classifier.macs,
            "parameters": classifier.parameters,
            **fill_fields(own, None, truth),
        }
    ]
    for backup in backups:
        rows.append(
            {
                "method": backup.method,
                "model": backup.model,
                "images_per_backup": backup.code.max_items,
                "macs": backup.macs,
                "parameters": backup.parameters,
                **_answers(backup, images, scores, truth, asked, begin),
            }
        )
    if asked.rounds:
        passes: list[Callable[[], object]] = [classifier.one_pass]
        passes += [_pass(backup, images) for backup in backups]
        tell = begin("timing", asked.rounds)
        times_ms = interleaved_times_ms(passes, asked.rounds)
        tell("timing", asked.rounds)
        for place, row in enumerate(rows):
            row |= cost_fields(times_ms, place)
    return rows


def _answers(
    backup: MeasuredBackup,
    images: Array,
    scores: Array,
    truth: Truth,
    asked: FillsArguments,
    begin: Callable[[str, int], Tell],
) -> dict[str, Any]:
    most = backup.code.max_items
    full = [shuffled_groups(len(images), most, asked.seed + shuffle) for shuffle in range(asked.shuffles)]
    some = [shuffled_groups(len(images), items, asked.seed) for items in range(1, most)]
    # A cheap model answers each item by itself, so it is the same in any group.
    some = some if asked.partly and not isinstance(backup.code, Cheap) else []
    same = [same_class_groups(truth.labels, most, asked.seed)] if asked.same_class and truth.labels is not None else []
    tell = begin(backup.method, sum(map(len, [*full, *some, *same])))

    def fill(groups: NDArray[np.int64]) -> tuple[Fills, Fills | None]:
        return collect(backup, images, scores, groups, partial(tell, backup.method))

    fills, unhurt = _joined([fill(groups) for groups in full])
    row = fill_fields(fills, unhurt, truth) | gate_fields(fills, truth, backup.code.min_confidence)
    if some:
        by_items = [(groups.shape[1], fill(groups)[0]) for groups in some]
        row |= partial_fields([*by_items, (most, fills)], truth)
    if same:
        row |= same_class_fields(fill(same[0])[0], truth)
    return row


def _joined(parts: Sequence[tuple[Fills, Fills | None]]) -> tuple[Fills, Fills | None]:
    unhurt = [kept for _, kept in parts if kept is not None]
    return Fills.join([fills for fills, _ in parts]), Fills.join(unhurt) if unhurt else None


def _pass(backup: MeasuredBackup, images: Array) -> Callable[[], object]:
    """Runs all spare tasks of one full group."""
    inputs = [task.inputs for task in spare_tasks(backup.code, list(images[: backup.code.max_items]))]

    def run() -> None:
        for rows in inputs:
            backup.run(rows)

    return run


def _backups(arguments: dict[str, Any], classifier: UserClassifier) -> list[MeasuredBackup]:
    backups = [collage_backup(spec, classifier) for spec in arguments["collages"]]
    backups += [detector_backup(spec, classifier) for spec in arguments["detectors"]]
    backups += [parity_backup(spec, "sum", classifier) for spec in arguments["parity_sums"]]
    backups += [parity_backup(spec, "concat", classifier) for spec in arguments["parity_concats"]]
    backups += [cheap_backup(spec, classifier) for spec in arguments["cheaps"]]
    backups += [berrut_backup(items, classifier) for items in _counts(arguments["berrut"])]
    if not backups and arguments["classifier"] == shipped.NAMES[0]:
        backups = [collage_backup(name, classifier) for name in shipped.NAMES[1:]]
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
    arguments: dict[str, Any], classifier: UserClassifier, console: Console
) -> tuple[Array, NDArray[np.int64] | None]:
    """The images in the classifier's size, and their labels as the classifier numbers them."""
    path = arguments["images"]
    if path is None:
        path = shipped.IMAGES
        if arguments["split"] is not None:
            raise ConfigurationError("split: the shipped images have none; give --images")
    from evenkeel.images.image_set import read_images

    found = read_images(
        path,
        height=classifier.height,
        width=classifier.width,
        labels_from=arguments["labels"],
        split=arguments["split"],
        limit=arguments["limit"],
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
    for line in numbering.told():
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


def _check_counts(
    asked: FillsArguments, backups: Sequence[MeasuredBackup], labels: NDArray[np.int64] | None, images: int
) -> None:
    for backup in backups:
        if backup.code.max_items > images:
            raise ConfigurationError(
                f"images: {backup.method} needs groups of {backup.code.max_items}, found {images} images"
            )
    if asked.same_class:
        if labels is None:
            raise ConfigurationError("same-class: the images have no labels")
        for backup in backups:
            same_class_groups(labels, backup.code.max_items, asked.seed)


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    return [column for column in (*_COLUMNS, *_FURTHER) if any(row.get(column.key) is not None for row in rows)]


def _notes(rows: Sequence[dict[str, Any]], asked: FillsArguments, images: int) -> list[str]:
    notes = ["groups: distinct images, shuffled, classes mixed; intervals: 95 %, over images"]
    if asked.shuffles > 1:
        notes.append(f"{asked.shuffles} shuffles ask every image again: more groups, not more images")
    if images < _WIDE:
        notes.append(f"only {images} images: the intervals are wide; give more with --images")
    if any("by_items" in row for row in rows):
        notes.append("partly filled groups (--json, --figure): the first cells, as the gateway fills them")
    if any(row.get("accuracy_same_class") is not None for row in rows):
        notes.append("same class: all items of a group are of one class, which no traffic is; an ablation")
    share = rows[0].get("largest_class_share")
    if share is not None:
        notes.append(
            "elsewhere: agreement on images that the classifier does not give its most frequent class, which is "
            f"{100 * share:.1f} % of its answers"
        )
    for row in rows:
        if row.get("min_confidence"):
            notes.append(
                f"{row['method']}: its card lets no fill below confidence {row['min_confidence']:.4g} through; "
                f"{100 * row['filled_above_min_confidence']:.1f} % pass, and {row['elsewhere_filled_wrongly']} images "
                "elsewhere are filled wrongly; the other figures are without it"
            )
        kept = row.get("accuracy_none_lost")
        if kept is not None:
            notes.append(
                f"{row['method']}: not systematic, so every answer is approximate; right with nothing lost: "
                f"{100 * kept:.1f} %"
            )
    return notes
