"""Runs `evenkeel fit`: shows its progress and writes its cards."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evenkeel.errors import ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.figures.outputs import check_outputs, write_json
from evenkeel.figures.records import json_document
from evenkeel.figures.tables import Column, Page, table
from evenkeel.images.image_set import ImageSet, read_images
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import Layout, ModelCard

if TYPE_CHECKING:  # it loads torch
    from evenkeel.vision.fit.options import Advance

__all__ = ["FitArguments", "run_fit"]

_NAMES_SHOWN = 10
_FORM = ("layout", "bgr", "output", "scale", "mean", "std", "classes")  # options that say how a classifier is run
_LEAST_SIDE = 8  # pixels
_COLUMNS = (
    Column("accuracy", "right", "%", 100.0),
    Column("agreement", "agrees", "%", 100.0),
    Column("agreement_elsewhere", "elsewhere", "%", 100.0),
    Column("largest_class_share", "largest class", "%", 100.0),
    Column("min_confidence", "fills from", ""),
    Column("cost", "cost", ""),
    Column("latency_ms", "pass", "ms"),
    Column("mmac", "MMAC", ""),
    Column("temperature", "temperature", ""),
)


@dataclass(frozen=True)
class FitArguments:
    """Holds the options of `evenkeel fit`, by the names that `--json` gives them; `--help` says what each one means."""

    classifier: str
    images: Path
    out: Path
    grid: str
    cost: float
    weights: str
    precision: str
    shared: bool
    minutes: float
    epochs: float | None
    until: float | None
    rate: float | None
    tiles: int | None
    start: Path | None
    lossy: float
    jpeg_quality: int
    views: int
    reach: int | None
    mirror: bool
    held_out: int | None
    labels: str
    split: str | None
    limit: int | None
    more_images: Path | None
    more_split: str | None
    more_limit: int | None
    test_images: Path | None
    test_split: str | None
    side: str | None
    layout: Layout | None
    bgr: bool
    output: str | None
    classes: Path | None
    scale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    device: str
    threads: int
    seed: int
    resume: bool
    json_path: Path | None

    def given(self) -> dict[str, Any]:
        """Gives the options that have a value, by their names."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Bars:
    """Shows news, and progress: as bars on a terminal, elsewhere as a line for each tenth of a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        # Names of files may hold brackets, and bytes that are no text.
        line = line.encode(errors="replace").decode()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator["Advance"]:
        if not self._console.is_terminal:
            yield self._lines(name, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=total, note="")

            def advance(done: int, /, note: str = "") -> None:
                progress.update(task, advance=done, note=note)

            yield advance

    def _lines(self, name: str, total: int) -> "Advance":
        reached, began = 0, time.monotonic()

        def advance(done: int, /, note: str = "") -> None:
            nonlocal reached
            shown = reached * 10 // total
            reached = min(total, reached + done)
            if reached * 10 // total > shown:
                after = f"{name}: {reached:,} of {total:,} after {time.monotonic() - began:.0f} s"
                self.say(f"{after}, {note}" if note else after)

        return advance


def run_fit(arguments: FitArguments) -> None:
    """Runs `evenkeel fit`: fits Collage-CNNs to a classifier.

    Raises:
        EvenkeelError: interrupted; the last checkpoint is kept.
    """
    try:
        from evenkeel.vision.fit.fit import fit
        from evenkeel.vision.fit.options import FitOptions
    except ImportError as error:
        raise MissingExtraError("torch or onnx", "train") from error
    tested = arguments.test_images is not None or arguments.test_split is not None
    test_images = arguments.test_images or arguments.images
    _check_overlaps(arguments, test_images if tested else None)
    given = arguments.given()
    options = FitOptions(
        grids=_grids(arguments.grid),
        **{each.name: given[each.name] for each in fields(FitOptions) if each.name in given},
    )
    out, json_path = arguments.out, arguments.json_path
    if json_path is None or out.exists() or json_path.parent.resolve() != out.resolve():  # else the fit makes it
        check_outputs(json=json_path)
    console = Console(stderr=True)
    bars = _Bars(console)
    classifier = BlackBox.open(
        arguments.classifier,
        threads=arguments.threads,
        side=_side(arguments.side),
        **{name: given[name] for name in _FORM if name in given},
    )
    images = _read(arguments.images, arguments.labels, arguments.split, arguments.limit, classifier, bars)
    test = None
    if tested:
        test = _read(test_images, arguments.labels, arguments.test_split, None, classifier, bars)
    more = None
    if arguments.more_images is not None:
        more = _read(arguments.more_images, "none", arguments.more_split, arguments.more_limit, classifier, bars)
    try:
        cards = fit(classifier, images, out, options, bars, test, more)
    except KeyboardInterrupt as error:
        raise EvenkeelError(
            f"interrupted; what was done is kept in {out}: go on with the same command and --resume"
        ) from error
    rows = [_row(card) for card in cards]
    columns = [column for column in _COLUMNS if column.key in rows[0]]
    Console().print(table(Page(rows, [Column("collage", "collage")], columns)))
    bars.say(f"(on {'held-out' if test is None else 'test'} images, with the 95 % interval below)")
    if json_path is not None:
        write_json(json_path, json_document(given, [asdict(card) for card in cards]))


def _check_overlaps(arguments: FitArguments, test_images: Path | None) -> None:
    """Refuses images that would be both learned from and measured on."""
    images, split, test_split = arguments.images, arguments.split, arguments.test_split
    if test_images is not None and _overlap(images, split, test_images, test_split):
        raise ConfigurationError(
            "test-split: the test images would be among those to learn from; give two different parts with --split and "
            "--test-split, or other --test-images"
        )
    more_images, more_split = arguments.more_images, arguments.more_split
    for name, value in (("more-split", more_split), ("more-limit", arguments.more_limit)):
        if more_images is None and value is not None:
            raise ConfigurationError(f"{name}: it names a part of --more-images, which is missing")
    if _overlap(more_images, more_split, images, split):  # where the held-out images are
        raise ConfigurationError("more-images: they are among --images; name another part with --more-split")
    if test_images is not None and _overlap(more_images, more_split, test_images, test_split):
        raise ConfigurationError(
            "more-images: the test images would be among those to learn from; name another part with --more-split"
        )


def _overlap(path: Path | None, split: str | None, other: Path, other_split: str | None) -> bool:
    return path == other and (None in (split, other_split) or split == other_split)


def _read(
    path: Path, labels_from: str, split: str | None, limit: int | None, classifier: BlackBox, bars: _Bars
) -> ImageSet:
    with ExitStack() as stack:
        advance, reached = None, 0

        def report(done: int, total: int) -> None:
            nonlocal advance, reached
            if advance is None:
                advance = stack.enter_context(bars.stage(f"reading {path.name}", total))
            advance(done - reached)
            reached = done

        images = read_images(
            path,
            height=classifier.height,
            width=classifier.width,
            labels_from=labels_from,
            limit=limit,
            split=split,
            interpolation=classifier.interpolation,
            report=report,
        )
    labels = "without labels" if images.labels is None else "with labels, used only to report accuracy and to calibrate"
    bars.say(f"{len(images):,} images, {images.pixels.nbytes / 1e9:,.1f} GB of pixels, {labels}")
    for note in images.notes:
        bars.say(f"  {note}")
    if images.skipped_count:
        bars.say(f"{images.skipped_count:,} could not be read and are left out:")
        for name, reason in images.skipped[:_NAMES_SHOWN]:
            bars.say(f"  {name}: {reason}")
        if images.skipped_count > _NAMES_SHOWN:
            bars.say(f"  and {images.skipped_count - _NAMES_SHOWN:,} more")
    return images


def _side(text: str | None) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text or "")
    if text is not None and not found:
        raise ConfigurationError(f"side: expected pixels like 224, or height x width like 48x192, found {text!r}")
    if found is None:
        return None
    side = int(found[1]), int(found[2] or found[1])
    if min(side) < _LEAST_SIDE:
        raise ConfigurationError(f"side: must be {_LEAST_SIDE} pixels or more, found {text!r}")
    return side


def _grids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(f"grid: expected numbers like 3 or 2,3,4, found {text!r}") from error


def _row(card: ModelCard) -> dict[str, Any]:
    row = {
        "collage": f"{card.grid}x{card.grid}",
        "cost": card.relative_cost,
        "latency_ms": card.latency_ms,
        "mmac": card.macs / 1e6,
        "temperature": card.temperature,
        "largest_class_share": card.largest_class_share,
    }
    if card.min_confidence:
        row["min_confidence"] = card.min_confidence
    measured = {
        "accuracy": card.accuracy,
        "agreement": card.agreement,
        "agreement_elsewhere": card.agreement_elsewhere,
    }
    for name, found in measured.items():
        if found is not None:
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row
