"""Fits Collage-CNNs to a user's classifier: its scores on the user's images are all that is learned from.

Ask the classifier about a few views of every image, choose how large the network may be, train it, write it as ONNX
with its card. Every stage keeps what it has done in the output folder, so that a stopped fit goes on where it was.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evenkeel.cards import ModelCard, save_card
from evenkeel.coding.collage import Collage
from evenkeel.coding.score_form import ScoreForm
from evenkeel.errors import ConfigurationError
from evenkeel.vision.architecture import CollageNet, TileNet, count_macs, count_parameters
from evenkeel.vision.black_box import BlackBox
from evenkeel.vision.export import file_sha256, fold_norms, machine_name, write_onnx
from evenkeel.vision.fit_loop import MEAN, STD, FitRecipe, fit_tiles, soft_temperature, start_from
from evenkeel.vision.fit_serving import write_serving
from evenkeel.vision.images import ImageSet
from evenkeel.vision.lock import locked
from evenkeel.vision.measure import (
    Session,
    fit_temperature,
    interleaved_latencies_ms,
    reliability_table,
    shuffled_groups,
    wilson,
)
from evenkeel.vision.size import Size, choose_size
from evenkeel.vision.views import ViewBank

__all__ = ["FitOptions", "Watcher", "fit"]

LEAST_IMAGES = 500
_PLAN = "plan.json"
_TRIAL_STEPS = 8  # timed to turn minutes into epochs
_LATENCY_ROUNDS = 200


class Watcher(Protocol):
    """Whoever looks on."""

    def say(self, line: str) -> None:
        """One line of news."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A stage with `total` parts; call what it gives with the number of parts that are done."""


class Silent:
    """Nobody looks on."""

    def say(self, line: str) -> None:
        """Nothing is said."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Nothing is shown."""
        return nullcontext(lambda done: None)


@dataclass(frozen=True)
class FitOptions:
    """What is wanted.

    Attributes:
        grids: of the Collage-CNNs, each with 2 to 8 tiles along one side.
        cost: of one collage pass, in passes of the classifier, at most.
        shared: one network reads every grid: the largest that the first grid can afford.
        epochs: passes over the images; None: as many as `minutes` allow.
        minutes: of training for each network, on this machine as it is now.
        views: of each image that the classifier is asked about.
        reach: pixels by which a view is moved at most; None: a tenth of the image's side.
        mirror: whether views are also mirrored left to right.
        rate: of learning, at the start; see `FitRecipe`. None: its default.
        start: an earlier fit of a network of the same size, whose weights to start from: its output folder.
        held_out: images that are not trained on, but calibrate the confidence; None: a twentieth, 200 to 2,000.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        resume: go on with what the output folder holds.
    """

    grids: tuple[int, ...] = (3,)
    cost: float = 0.6
    shared: bool = False
    epochs: float | None = None
    minutes: float = 60.0
    views: int = 4
    reach: int | None = None
    mirror: bool = True
    rate: float | None = None
    start: Path | None = None
    held_out: int | None = None
    device: str = "auto"
    threads: int = 1
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if not self.grids or len(set(self.grids)) < len(self.grids) or not all(2 <= grid <= 8 for grid in self.grids):
            raise ConfigurationError(f"grid: expected different numbers from 2 to 8, found {list(self.grids)}")
        for name in ("cost", "minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name}: must be a number above zero, found {getattr(self, name)}")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ConfigurationError(f"epochs: must be a number above zero, found {self.epochs}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ConfigurationError(f"rate: must be above 0 and at most 1, found {self.rate}")
        if self.views < 1:
            raise ConfigurationError(f"views: must be at least 1, found {self.views}")
        cores = os.cpu_count() or 1
        if not 1 <= self.threads <= cores:
            raise ConfigurationError(
                f"threads: must be from 1 to {cores}, the cores of this machine, found {self.threads}"
            )
        if not 0 <= self.seed < 2**31:  # what is made of it must fit into 64 bits
            raise ConfigurationError(f"seed: must be from 0 to {2**31 - 1}, found {self.seed}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigurationError(f"device: must be auto, cpu or cuda, found {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device: torch finds no CUDA device; take --device cpu")

    @property
    def torch_device(self) -> str:
        """Where the networks are trained."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


@dataclass(frozen=True)
class _Plan:
    """What was decided at the start, so that a resumed fit does the same."""

    sizes: dict[int, Size]
    epochs: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """Images that accuracy and agreement are of, with the classifier's answers."""

    images: ImageSet
    answers: NDArray[np.int64]
    kind: str


def fit(
    classifier: BlackBox,
    images: ImageSet,
    out: Path,
    options: FitOptions,
    watcher: Watcher | None = None,
    test: ImageSet | None = None,
) -> list[ModelCard]:
    """Collage-CNNs for `classifier`, one for each grid, in `out`: ONNX files and their cards.

    `images` are of the kind that the classifier is asked about; their labels, if any, only serve to calibrate and to
    report accuracy. Accuracy and agreement are of `test`, or of the held-out images without it.

    Raises:
        ConfigurationError: too few images, a classifier with one answer for all, a cost that cannot be met, an output
            folder that holds another fit or in which one is at work, a full disk.
    """
    watcher = Silent() if watcher is None else watcher
    torch.set_num_threads(options.threads)
    train, held = _split(images, options)
    _fill_a_collage(held, "held-out", options)
    if test is not None:
        _fill_a_collage(test, "test", options)
    reach = _reach(options, classifier)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be made: {error.strerror or error}") from error
    with locked(out):
        if (out / _PLAN).is_file() and not options.resume:
            raise ConfigurationError(f"{out} holds a fit already; go on with it with --resume, or give another --out")
        return _fit(classifier, images, train, held, out, options, reach, watcher, test)


def _fit(
    classifier: BlackBox,
    images: ImageSet,
    train: ImageSet,
    held: ImageSet,
    out: Path,
    options: FitOptions,
    reach: int,
    watcher: Watcher,
    test: ImageSet | None,
) -> list[ModelCard]:
    held_answers = _answers(classifier, held)
    identity = _identity(classifier, images, options)
    plan = _plan(out, identity, classifier, options, watcher)
    bank = ViewBank(
        train.pixels,
        classifier.classes,
        out / "scores.npy",
        views=options.views,
        reach=reach,
        mirror=options.mirror,
        seed=options.seed,
    )
    with watcher.stage("asking the classifier", bank.missing) as done:
        for scored in bank.fill(classifier.log_probabilities):
            done(scored)
    taught = bank.scores(torch.arange(len(bank)), torch.zeros(len(bank), dtype=torch.long))
    # With few images larger steps would be few, and an epoch over before anything is learned.
    tiles = min(FitRecipe.tiles, max(36, len(bank) // 16))
    recipe = FitRecipe(
        tiles=tiles, temperature=soft_temperature(taught[:5000]), jitter=round(0.7 * reach), seed=options.seed
    )
    if options.rate is not None:
        recipe = replace(recipe, rate=options.rate)
    measured_on = _Measured(held, held_answers, "held-out")
    if test is not None:
        measured_on = _Measured(test, classifier.scores(test.pixels).argmax(1), "test")
    networks: dict[Size, tuple[TileNet, dict[str, Any]]] = {}
    cards = []
    for grid in options.grids:
        size = plan.sizes[grid]
        if size not in networks:
            networks[size] = _train(size, bank, recipe, out, plan, grid, identity, options, watcher, classifier)
        network, notes = networks[size]
        try:
            cards.append(_finish(network, notes, grid, size, classifier, held, held_answers, measured_on, out))
        except OSError as error:
            raise ConfigurationError(
                f"the {grid}x{grid} model cannot be written into {out}: {error.strerror or error}; free some space and "
                "go on with --resume, the training is kept"
            ) from error
        watcher.say(_told(cards[-1]))
    names = _class_names(classifier, held)
    configuration = write_serving(classifier, names, _own_temperature(classifier, held), cards, out)
    watcher.say(f"serve them with: evenkeel serve {configuration}")
    return cards


def _split(images: ImageSet, options: FitOptions) -> tuple[ImageSet, ImageSet]:
    held_out = options.held_out
    if held_out is None:
        held_out = min(2000, max(200, len(images) // 20))
    if len(images) < max(LEAST_IMAGES, 2 * held_out):
        raise ConfigurationError(
            f"{len(images):,} images are too few: {max(LEAST_IMAGES, 2 * held_out):,} are needed at least, and some "
            "thousands to be worth the while; they need no labels, so recorded requests will do"
        )
    return images.hold_out(held_out, options.seed + 94)


def _fill_a_collage(images: ImageSet, kind: str, options: FitOptions) -> None:
    most = max(options.grids) ** 2
    if len(images) < most:
        raise ConfigurationError(
            f"{len(images):,} {kind} images are too few: one collage of grid {max(options.grids)} shows {most}; give "
            "more, or take a smaller grid"
        )


def _reach(options: FitOptions, classifier: BlackBox) -> int:
    shorter = min(classifier.height, classifier.width)
    if options.reach is None:
        return max(1, round(0.1 * shorter))
    if not 0 <= options.reach < shorter:
        raise ConfigurationError(
            f"reach: must be below {shorter}, the shorter side of the classifier's images, found {options.reach}"
        )
    return options.reach


def _identity(classifier: BlackBox, images: ImageSet, options: FitOptions) -> dict[str, Any]:
    """What a fit that is resumed must have in common with the one that was stopped."""
    identity: dict[str, Any] = {
        "classifier": classifier.sha256,
        "images": hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest(),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(options).items()
            if name not in ("resume", "device")
        },
    }
    if classifier.datatype == "FP32":  # its scores depend on what is done to the pixels before
        identity["normalisation"] = asdict(classifier.normalisation)
    return identity


def _answers(classifier: BlackBox, images: ImageSet) -> NDArray[np.int64]:
    """The classifier's answers to the held-out images, asked first: they tell whether there is anything to learn."""
    answers: NDArray[np.int64] = classifier.scores(images.pixels).argmax(1)
    if answers.min() == answers.max():
        raise ConfigurationError(
            f"the classifier gives class {answers[0]} for all of {len(images):,} images, so there is nothing to learn; "
            "check that the images are of several classes, and prepared as it expects"
        )
    return answers


def _plan(out: Path, identity: dict[str, Any], classifier: BlackBox, options: FitOptions, watcher: Watcher) -> _Plan:
    path = out / _PLAN
    if path.is_file():
        return _stored_plan(path, identity)
    chosen: dict[int, Size] = {}
    grids = list(options.grids[:1] if options.shared else options.grids)
    for grid in grids:
        size, cost = choose_size(
            classifier.one_pass(), grid, options.cost, classifier.classes, classifier.height, classifier.width
        )
        watcher.say(f"{grid}x{grid}: channels {size.widths}, tiles of {size.side} pixels, cost {cost:.2f} measured")
        chosen[grid] = size
    plan = _Plan({grid: chosen.get(grid, chosen[grids[0]]) for grid in options.grids})
    _store_plan(path, identity, plan)
    return plan


def _stored_plan(path: Path, identity: dict[str, Any]) -> _Plan:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        sizes = {int(grid): Size(tuple(size["widths"]), int(size["side"])) for grid, size in raw["sizes"].items()}
        epochs = {int(grid): float(value) for grid, value in raw["epochs"].items()}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give another --out") from error
    if raw.get("identity") != json.loads(json.dumps(identity)):
        raise ConfigurationError(
            f"{path.parent} holds the fit of another classifier, other images or other options; give the same again "
            "to go on with it, or another --out"
        )
    return _Plan(sizes, epochs)


def _store_plan(path: Path, identity: dict[str, Any], plan: _Plan) -> None:
    sizes = {str(grid): asdict(size) for grid, size in plan.sizes.items()}
    text = json.dumps({"identity": identity, "sizes": sizes, "epochs": plan.epochs}, indent=2)
    unfinished = path.with_suffix(".part")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error


def _train(
    size: Size,
    bank: ViewBank,
    recipe: FitRecipe,
    out: Path,
    plan: _Plan,
    grid: int,
    identity: dict[str, Any],
    options: FitOptions,
    watcher: Watcher,
    classifier: BlackBox,
) -> tuple[TileNet, dict[str, Any]]:
    classes, device = classifier.classes, options.torch_device
    if grid not in plan.epochs:
        epochs = options.epochs
        if epochs is None:
            epochs = _affordable_epochs(size, classes, bank, recipe, options, out)
        plan.epochs[grid] = epochs
        _store_plan(out / _PLAN, identity, plan)
    recipe = replace(recipe, epochs=plan.epochs[grid])
    torch.manual_seed(options.seed)
    network = size.network(classes)
    name = f"{grid}x{grid}"
    if options.start is not None:
        start_from(network, options.start)
    checkpoint = out / f"{name}.checkpoint"
    seconds, steps = 0.0, max(1, round(recipe.epochs * (len(bank) // recipe.tiles)))
    with watcher.stage(f"fitting {name}", steps) as done:
        reached = 0
        for progress in fit_tiles(network, bank, recipe, checkpoint, size.side, device):
            done(progress.step - reached)
            reached, seconds = progress.step, progress.seconds
    notes = {
        "classifier": classifier.name,
        "classifier_sha256": classifier.sha256,
        "channels": list(size.widths),
        "trained_on": f"{len(bank):,} images in {bank.views} views, scored by the classifier; no labels",
        "reach_pixels": bank.reach,
        "mirrored_views": bank.mirror,
        "epochs": round(recipe.epochs, 2),
        "tiles_per_step": recipe.tiles,
        "distillation_temperature": recipe.temperature,
        "rate": recipe.rate,
        "started_from_an_earlier_fit": options.start is not None,
        "seed": options.seed,
        "training_seconds": round(seconds),
        "device": device,
        "threads": options.threads,
        "torch": str(torch.__version__),
    }
    return network.to("cpu"), notes


def _affordable_epochs(
    size: Size, classes: int, bank: ViewBank, recipe: FitRecipe, options: FitOptions, out: Path
) -> float:
    """How many passes over the images fit into the minutes, by the time of a few steps of a network to be forgotten."""
    trial = out / "trial.checkpoint"
    trial.unlink(missing_ok=True)
    network, short = size.network(classes), replace(recipe, epochs=1.0)
    times = []
    began = time.monotonic()
    for _ in islice(fit_tiles(network, bank, short, trial, size.side, options.torch_device), _TRIAL_STEPS):
        times.append(time.monotonic() - began)
        began = time.monotonic()
    trial.unlink(missing_ok=True)
    per_step = float(np.median(times[1:] or times))
    return round(max(1.0, options.minutes * 60 / per_step * recipe.tiles / len(bank)), 2)


def _finish(
    network: TileNet,
    notes: dict[str, Any],
    grid: int,
    size: Size,
    classifier: BlackBox,
    held: ImageSet,
    held_answers: NDArray[np.int64],
    measured_on: _Measured,
    out: Path,
) -> ModelCard:
    """The files of one grid, with what was measured on the written file."""
    name, side = f"{classifier.name.removesuffix('-base')}-collage-{grid}x{grid}", grid * size.side
    path = out / f"{name}.onnx"
    folded = CollageNet(fold_norms(network), grid, size.side)
    difference = write_onnx(folded, path, side, MEAN, STD)
    session = Session.open(path)
    card = ModelCard(
        name=name,
        kind="collage",
        file=path.name,
        sha256=file_sha256(path),
        classes=_class_names(classifier, held),
        height=side,
        width=side,
        mean=MEAN,
        std=STD,
        grid=grid,
        tile_side=size.side,
        interpolation="bicubic",
        macs=count_macs(folded, (3, side, side)),
        parameters=count_parameters(network),
        notes=notes,
    )
    cells, scores = _collage_scores(session, card, held)
    truth = (held_answers if held.labels is None else held.labels)[cells]
    temperature = fit_temperature(scores, truth)
    confidences = ScoreForm(classifier.classes, temperature).confidences(scores)
    reliability = reliability_table(confidences, scores.argmax(1) == truth)
    shown = measured_on.images
    cells, scores = _collage_scores(session, card, shown)
    found, answers = scores.argmax(1), measured_on.answers[cells]
    right = None if shown.labels is None else int((found == shown.labels[cells]).sum())
    how = f"{len(cells):,} {measured_on.kind} images in shuffled full {grid}x{grid} collages"
    canvas = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    base_ms, pass_ms = interleaved_latencies_ms([classifier.one_pass(), lambda: session(canvas)], _LATENCY_ROUNDS)
    measured = {
        "calibrated_to": "the classifier's answers" if held.labels is None else "labels",
        "classifier_latency_ms": round(base_ms, 3),
        "classifier_macs": classifier.macs,
        "latency_how": f"median of {_LATENCY_ROUNDS} interleaved passes, batch 1, one thread, processor time, CPU",
        "machine": machine_name(),
        "largest_difference_from_torch": difference,
    }
    card = replace(
        card,
        temperature=temperature,
        reliability=reliability,
        latency_ms=round(pass_ms, 3),
        relative_cost=round(pass_ms / base_ms, 3),
        accuracy=None if right is None else wilson(right, len(cells), how),
        agreement=wilson(int((found == answers).sum()), len(cells), how),
        notes=notes | measured,
    )
    save_card(card, out / f"{name}.json")
    return card


def _class_names(classifier: BlackBox, images: ImageSet) -> tuple[str, ...]:
    if classifier.class_names is not None:
        return classifier.class_names
    if images.class_names is not None and len(images.class_names) == classifier.classes:
        return images.class_names
    return tuple(str(number) for number in range(classifier.classes))


def _collage_scores(
    session: Session, card: ModelCard, images: ImageSet
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which images the cells held [n], and their scores [n, classes]: encoded as the gateway encodes them."""
    code = Collage.from_card(card)
    groups = shuffled_groups(len(images), card.cells, seed=card.grid)
    prepared = [code.prepare(pixels) for pixels in images.pixels]
    scores = []
    for group in groups:
        canvas = code.spares([prepared[item] for item in group])[0].inputs
        scores.append(session(canvas)[0])
    return groups.reshape(-1), np.concatenate(scores)


def _own_temperature(classifier: BlackBox, held: ImageSet) -> float:
    """Of the classifier's own scores; 1 without labels, which alone could tell."""
    if held.labels is None:
        return 1.0
    return fit_temperature(classifier.log_probabilities(held.pixels), held.labels)


def _told(card: ModelCard) -> str:
    accuracy = "" if card.accuracy is None else f"accuracy {card.accuracy.value:.2%}, "
    agreement = "" if card.agreement is None else f"agreement {card.agreement.value:.2%}, "
    return (
        f"{card.name}: {accuracy}{agreement}cost {card.relative_cost:.2f} ({card.latency_ms:.2f} ms, "
        f"{card.macs / 1e6:.0f} million multiply-accumulates, {card.parameters:,} parameters)"
    )
