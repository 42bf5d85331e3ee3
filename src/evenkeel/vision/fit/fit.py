"""Fits Collage-CNNs to a user's classifier: its scores on the user's images are all that is learned from.

Ask the classifier about a few views of every image, choose how large the network may be, train it, write it as ONNX
with its card. Every stage keeps what it has done in the output folder, so that a stopped fit goes on where it was.
"""

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.images.image_set import ImageSet
from evenkeel.images.sketch import hashes, sketch
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard
from evenkeel.models.labels import Numbering, number_alike, number_labels, sample_by_label
from evenkeel.models.measure import fit_temperature
from evenkeel.vision.fit.card import AnsweredImages, class_lines, summary, write_model
from evenkeel.vision.fit.feeding import better_fed, count_ways
from evenkeel.vision.fit.light import write_light
from evenkeel.vision.fit.lock import locked
from evenkeel.vision.fit.loop import (
    FitRecipe,
    Held,
    Progress,
    TileReader,
    agreement,
    answers_of,
    as_tiles_show,
    begun_as,
    fit_tiles,
    in_bfloat16,
    soft_temperature,
    start_from,
    whiten,
)
from evenkeel.vision.fit.options import FitOptions, Silent, Watcher
from evenkeel.vision.fit.plan import PLAN, FitPlan, identity_of
from evenkeel.vision.fit.serving import write_serving
from evenkeel.vision.fit.size import Size, choose_own_side, choose_size, max_measured, max_own_measured
from evenkeel.vision.fit.views import ViewBank
from evenkeel.vision.networks.architecture import TileNet
from evenkeel.vision.networks.own_tiles import OwnTiles

__all__ = ["fit"]

LEAST_IMAGES = 500
_NEARLY_ALL = 0.95  # answers of one class, which are then pointed out
_MIX_SHOWN = 5  # classes
_SOFTENED = 5000  # images by which the scores that are taught are softened
_TRIAL_STEPS = 8  # timed to turn minutes into epochs
_OWN_TILES = 64  # in a step that trains the classifier's own weights: they are near already, so many small steps help
_BLENDED = 0.7  # of the steps that train the classifier's own weights
_COMPARED = 0.05  # of the whole training: how long each of several beginnings is trained to see which is better
_LEFT_OUT = (
    1 / 3,
    2 / 3,
)  # of the residual blocks of the classifier, late ones first: smaller networks that are compared
_SHOWN_AGAIN = 300  # held-out images that tell what a tile keeps of them
_EXAMINED = 1000  # held-out images by which they are compared


def fit(
    classifier: BlackBox,
    images: ImageSet,
    out: Path,
    options: FitOptions,
    watcher: Watcher | None = None,
    test: ImageSet | None = None,
    more: ImageSet | None = None,
) -> list[ModelCard]:
    """Fits Collage-CNNs for `classifier`, one for each grid, and writes ONNX files and their cards into `out`.

    For grid 1 it is a light classifier, which reads whole images.

    `images` are of the kind that the classifier answers; their labels, if any, only serve to calibrate and to
    report accuracy. Accuracy and agreement are of `test`, or of the held-out images without it. `more` images are
    learned from too, and nothing else: they may show things of no class, as the classifier answers them as well.

    Raises:
        ConfigurationError: too few images, a classifier with one answer for all, a cost that cannot be met, an output
            folder that holds another fit or in which one is at work, a full disk.
    """
    torch.set_num_threads(options.threads)
    kept, held = _split(images, options)
    if options.tiles is not None and options.tiles > len(kept):
        raise ConfigurationError(
            f"tiles: one step would show {options.tiles:,}, and there are {len(kept):,} images to train on; give fewer"
        )
    _fill_a_collage(held, "held-out", options)
    if test is not None:
        _fill_a_collage(test, "test", options)
    reach = _reach(options, classifier)
    if f"{classifier.name}.json" == PLAN:
        raise ConfigurationError(f"classifier: its card would be {PLAN}, which a fit writes itself; name it otherwise")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be made: {error.strerror or error}") from error
    with locked(out):
        if (out / PLAN).is_file() and not options.resume:
            raise ConfigurationError(f"{out} holds a fit already; go on with it with --resume, or give another --out")
        learned_from = f"{len(kept):,} images" + ("" if more is None else f" and {len(more):,} more")
        learned = hashes(images.pixels)[kept]
        if more is not None:
            learned = np.concatenate([learned, hashes(more.pixels)])
        run = _FitRun(classifier, out, options, watcher or Silent(), learned_from, sketch(learned))
        if test is not None and (twice := int(np.isin(hashes(test.pixels), learned).sum())):
            run.watcher.say(
                f"WARNING: {twice:,} of {len(test):,} test images are among those that are learned from, pixel by "
                "pixel; what is measured on them is too good"
            )
        answers = run.answers(images, held, test)
        plan = run.plan(identity_of(classifier, images, more, options))
        run.warn_of_small(images, plan)
        bank = run.bank(images, kept, more, answers.held, reach)
        run.choose_weights(plan, bank, answers.held)
        cards = run.models(plan, bank, answers)
        run.serving(cards, answers)
        return cards


@dataclass(frozen=True)
class _ClassifierAnswers:
    """Holds what the classifier makes of the images that are not learned from.

    Attributes:
        held: held-out images, which confidence is calibrated with; labels only where they can be trusted with that.
        shown: images that accuracy and agreement are of.
        class_names: of the classifier's classes, numbers where they are not known.
        scores: of the held-out images.
    """

    held: AnsweredImages
    shown: AnsweredImages
    class_names: tuple[str, ...]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class _FitRun:
    """Describes one fit at work: whose, where, how, who looks on, from how many images, and their sketch."""

    classifier: BlackBox
    out: Path
    options: FitOptions
    watcher: Watcher
    learned_from: str
    sketch: str

    def answers(self, images: ImageSet, held: ImageSet, test: ImageSet | None) -> _ClassifierAnswers:
        """Shows the classifier's answers before any long work: what labels are worth, and whether it is fed right."""
        classifier, say = self.classifier, self.watcher.say
        scores = classifier.log_probabilities(held.pixels)
        answers: NDArray[np.int64] = scores.argmax(1)
        class_names = classifier.class_names
        labels = trusted = numbering = None
        if held.labels is not None and images.labels is not None:
            numbering = self._numbering(images, held, answers)
            for line in numbering.lines():
                say(line)
            with self.watcher.stage("feeding the classifier in other ways", count_ways(classifier)) as done:
                better = better_fed(classifier, held.pixels, held.labels, held.class_names, done)
            if better is not None:
                say(f"WARNING: {better}")
            class_names, labels = numbering.class_names, numbering.numbered(held.labels)
            trusted = labels if numbering.trusted else None
        known = tuple(map(str, range(classifier.classes))) if class_names is None else class_names
        say(f"its answers to {len(held):,} held-out images: {_mix(answers, known)}")
        if np.bincount(answers).max() > _NEARLY_ALL * len(answers):
            say(
                "nearly all of them are one class: unless the images are too, check how its input is made (--scale, "
                "--mean, --std, --bgr, --layout)"
            )
        shown = AnsweredImages(replace(held, labels=labels), answers, "held-out")
        if test is not None:
            shown = self._tested(test, class_names, numbering, images.class_names)
        return _ClassifierAnswers(
            AnsweredImages(replace(held, labels=trusted), answers, "held-out"), shown, known, scores
        )

    def _numbering(self, images: ImageSet, held: ImageSet, answers: NDArray[np.int64]) -> Numbering:
        """Matches labels by the held-out images, and by more images of labels that are rare among those."""
        assert images.labels is not None
        assert held.labels is not None
        labels = np.concatenate([held.labels, images.labels])
        more = sample_by_label(labels, np.arange(len(held)))[len(held) :] - len(held)
        if len(more):
            answers = np.concatenate([answers, self.classifier.scores(images.pixels[more]).argmax(1)])
        labels = np.concatenate([held.labels, images.labels[more]])
        classifier = self.classifier
        return number_labels(labels, held.class_names, classifier.class_names, classifier.classes, answers)

    def _tested(
        self,
        test: ImageSet,
        class_names: tuple[str, ...] | None,
        known: Numbering | None,
        known_names: tuple[str, ...] | None,
    ) -> AnsweredImages:
        """Gives the test images, with labels where they can be matched: as those of the images to learn from."""
        answers = self.classifier.scores(test.pixels).argmax(1)
        labels, names, classes = test.labels, test.class_names, self.classifier.classes
        if labels is not None:
            alike = None if known is None else number_alike(known, known_names, labels, names, answers)
            numbering = alike or number_labels(labels, names, class_names, classes, answers)
            for line in numbering.lines():
                self.watcher.say(f"test images: {line}")
            labels = numbering.numbered(labels)
        return AnsweredImages(replace(test, labels=labels), answers, "test")

    def plan(self, identity: dict[str, Any]) -> FitPlan:
        """Loads the plan in the folder, or makes a new one: sizes as large as the cost allows."""
        if (self.out / PLAN).is_file():
            return FitPlan.load(self.out, identity)
        options = self.options
        chosen: dict[int, list[Size]] = {}
        grids = list(options.grids[:1] if options.shared else options.grids)
        for grid in grids:
            weights, left_out = (options.weights, None) if options.start is None else begun_as(options.start)
            own = [] if weights == "fresh" else self._own_sizes(grid, left_out)
            fresh = [self._fresh_size(grid)] if not own or weights == "auto" else []
            chosen[grid] = own + fresh
        rivals = {grid: chosen.get(grid, chosen[grids[0]]) for grid in options.grids}
        plan = FitPlan(self.out, identity, {grid: sizes[-1] for grid, sizes in rivals.items()}, rivals=rivals)
        plan.save()
        return plan

    def warn_of_small(self, images: ImageSet, plan: FitPlan) -> None:
        """Says so where most images were smaller than the tiles that are to show them."""
        chosen = [(grid, size) for grid, sizes in plan.rivals.items() for size in sizes] or plan.sizes.items()
        side = max((size.side for grid, size in chosen if grid > 1), default=0)
        if images.shorter_side is not None and images.shorter_side < side:
            self.watcher.say(
                f"WARNING: half of the images are no larger than {images.shorter_side} pixels along their shorter "
                f"side, and a tile has {side}: they were enlarged, which shows nothing more. Fit with images as they "
                "will be served; if those are as small, a lower --cost will do"
            )

    def _fresh_size(self, grid: int) -> Size:
        classifier, options = self.classifier, self.options
        most = max_measured(classifier.height, classifier.width)
        with self.watcher.stage(f"{grid}x{grid}: measuring sizes, at most", most) as done:
            size, cost = choose_size(
                classifier.one_pass(),
                grid,
                options.cost,
                classifier.classes,
                classifier.height,
                classifier.width,
                options.precision,
                done,
            )
        self.watcher.say(f"{grid}x{grid}: {size}, cost {cost:.2f} measured")
        return size

    def _own_sizes(self, grid: int, left_out: int | None) -> list[Size]:
        """Finds the sides at which the classifier's own weights are affordable: of all of it, and of less of it.

        Without so many late residual blocks as `left_out` says, or without some shares of them, if it is None. None is
        found, with the reason said, where the cost is too low for all of it.
        """
        sizes: list[Size] = []
        try:
            sizes.append(self._own_size(grid, left_out or 0, 0))
        except ConfigurationError as error:
            if self.options.weights == "classifier":
                raise
            self.watcher.say(f"{grid}x{grid}: fresh weights, since {error}")
        if sizes and left_out is None:
            network = sizes[0].network(self.classifier)
            assert isinstance(network, OwnTiles)
            blocks = network.graph.residual_blocks
            for less in sorted({math.ceil(share * blocks) for share in _LEFT_OUT} - {0}):
                with suppress(ConfigurationError):  # no larger side is affordable without them
                    sizes.append(self._own_size(grid, less, sizes[-1].side))
        return sizes

    def _own_size(self, grid: int, left_out: int, above: int) -> Size:
        classifier, options = self.classifier, self.options
        most = max_own_measured(classifier.height, classifier.width)
        without = f" without {left_out} blocks" if left_out else ""
        stage = f"{grid}x{grid}: measuring the classifier{without} at smaller sides, at most"
        with self.watcher.stage(stage, most) as done:
            size, cost = choose_own_side(classifier, grid, options.cost, options.precision, done, left_out, above)
        self.watcher.say(f"{grid}x{grid}: {size}, cost {cost:.2f} measured")
        return size

    def choose_weights(self, plan: FitPlan, bank: ViewBank, held: AnsweredImages) -> None:
        """Trains the candidates of a grid for a while, where there are several; the plan keeps what agrees most."""
        for size in sorted({size for sizes in plan.rivals.values() for size in sizes if size.own}):
            self._show_untrained(size, held)
        found: dict[tuple[Size, ...], dict[str, float]] = {}
        for grid, sizes in plan.rivals.items():
            rivals = tuple(sizes)
            if len(rivals) > 1 and rivals not in found:
                known = found[rivals] = plan.compared.setdefault(grid, {})
                for size in rivals:
                    if str(size) not in known:  # a fit that was stopped here has compared some of them
                        known[str(size)] = round(self._tried(size, bank, held), 4)
                        plan.save()
                shown = "; ".join(f"{size}: {share:.1%}" for size, share in known.items())
                self.watcher.say(f"{grid}x{grid}: agreement after a short training each: {shown}")
            shares = found.get(rivals, {})
            plan.sizes[grid] = max(rivals, key=lambda size: shares.get(str(size), 0.0))
            plan.compared[grid] = dict(shares)
        plan.rivals = {}
        plan.save()

    def _show_untrained(self, size: Size, held: AnsweredImages) -> None:
        """Says what the classifier still knows at the side of a tile, before it is trained there."""
        some = slice(0, _EXAMINED)
        network, wanted = size.network(self.classifier), held.answers[some]
        found = answers_of(network, held.images.pixels[some], size.side)
        self.watcher.say(
            f"{size}: untrained, it agrees with its answers at full size on {(found == wanted).mean():.1%} of "
            f"{len(wanted):,} held-out images"
        )
        few = slice(0, _SHOWN_AGAIN)
        again = self.classifier.scores(as_tiles_show(held.images.pixels[few], size.side)).argmax(1)
        self.watcher.say(
            f"{size}: with what such a tile shows of an image, enlarged to full size, it keeps "
            f"{(again == wanted[few]).mean():.1%} of its answers to {len(again):,} of them: much more cannot be learned"
        )
        if len(np.unique(found)) == 1:
            instead = "it goes on only if it agrees more than fresh weights after a short training of both"
            if self.options.weights == "classifier":
                instead = "it is trained all the same; --weights fresh or a higher --cost may do better"
            self.watcher.say(
                f"WARNING: with tiles of {size.side} pixels the classifier gives class {found[0]} to every image, "
                f"where at its own size it gives {len(np.unique(wanted)):,} classes: {instead}"
            )

    def _tried(self, size: Size, bank: ViewBank, held: AnsweredImages) -> float:
        """Trains a network of this size for a while; gives the share of held-out images on which it agrees."""
        options = self.options
        network, recipe = self._begun(size, bank), self._recipe(size, bank)
        epochs = options.epochs or self._affordable_epochs(size, bank, recipe)
        recipe = replace(recipe, epochs=_COMPARED * epochs)
        trial = self.out / "trial.checkpoint"
        trial.unlink(missing_ok=True)
        with self.watcher.stage(
            f"trying {size}", max(1, round(recipe.epochs * (bank.per_epoch // recipe.tiles)))
        ) as done:
            for _ in fit_tiles(network, bank, recipe, trial, size.side, options.torch_device):
                done(1)
        trial.unlink(missing_ok=True)
        some = slice(0, _EXAMINED)
        return agreement(network, held.images.pixels[some], held.answers[some], size.side)

    def bank(
        self, images: ImageSet, kept: NDArray[np.int64], more: ImageSet | None, held: AnsweredImages, reach: int
    ) -> ViewBank:
        """Makes views of the images to train on, all of them scored: of those at the places `kept`, and of `more`."""
        options = self.options
        bank = ViewBank(
            images.pixels,
            self.classifier.classes,
            self.out / "scores.npy",
            views=options.views,
            reach=reach,
            mirror=options.mirror,
            seed=options.seed,
            rows=kept,
            others=None if more is None else more.pixels,
        )
        with self.watcher.stage("asking the classifier", bank.missing) as done:
            for scored in bank.fill(self.classifier.log_probabilities):
                done(scored)
        answers = np.unique(np.concatenate([bank.answers(), held.answers]))
        if len(answers) == 1:
            raise ConfigurationError(
                f"the classifier gives class {answers[0]} for all of {len(bank) + len(held.images):,} images, so there "
                "is nothing to learn; check that the images are of several classes, and prepared as it expects"
            )
        unknown = len(answers) - len(np.unique(held.answers))
        if unknown:
            self.watcher.say(
                f"{unknown:,} of the {len(answers):,} classes that it gives are given to no held-out image, so nothing "
                "will be known of their fills; --held-out keeps more images for that"
            )
        return bank

    def models(self, plan: FitPlan, bank: ViewBank, answers: _ClassifierAnswers) -> list[ModelCard]:
        """Trains, measures and writes the networks of all grids."""
        networks: dict[Size, tuple[TileReader, dict[str, Any]]] = {}
        cards = []
        for grid, size in plan.sizes.items():
            if size not in networks:
                networks[size] = self._train(grid, size, bank, plan, answers.held)
            network, notes = networks[size]
            try:
                write = write_light if grid == 1 else partial(write_model, grid=grid)
                card = write(
                    network,
                    side=size.side,
                    classifier=self.classifier,
                    class_names=answers.class_names,
                    held=answers.held,
                    shown=answers.shown,
                    cost=self.options.cost,
                    notes=notes,
                    out=self.out,
                )
            except OSError as error:
                raise ConfigurationError(
                    f"the {_named(grid)} cannot be written into {self.out}: {error.strerror or error}; free some "
                    "space and go on with --resume, the training is kept"
                ) from error
            for line in (summary(card), *(class_lines(card) if card.kind == "collage" else ())):
                self.watcher.say(line)
            if card.relative_cost > self.options.cost:
                self.watcher.say(
                    f"WARNING: the file costs {card.relative_cost:.2f} passes of the classifier, and --cost allows "
                    f"{self.options.cost:g}: measured while the machine does other work, or the size was chosen then. "
                    "Measure again with --resume when it is idle; if the cost stays, fit with a lower --cost into "
                    "another --out"
                )
            cards.append(card)
        return cards

    def serving(self, cards: list[ModelCard], answers: _ClassifierAnswers) -> None:
        """Writes what `evenkeel serve` needs to serve them."""
        labels, temperature = answers.held.images.labels, 1.0
        if labels is not None:  # which alone could tell
            temperature = fit_temperature(answers.scores, labels)
        configuration = write_serving(self.classifier, answers.class_names, temperature, cards, self.out)
        first = " after what its first line says" if configuration.stem == "cascade" else ""
        self.watcher.say(f"serve them with: evenkeel serve {configuration}{first}")

    def _begun(self, size: Size, bank: ViewBank) -> TileReader:
        """Makes the network of this size as it is before training."""
        options = self.options
        torch.manual_seed(options.seed)
        network = size.network(self.classifier)
        if options.start is not None:
            start_from(network, options.start)
        elif isinstance(network, TileNet):
            whiten(network, bank, size.side)
        return network

    def _recipe(self, size: Size, bank: ViewBank) -> FitRecipe:
        recipe = _recipe(bank, self.options)
        if not size.own:
            return recipe
        tiles = min(_OWN_TILES, recipe.tiles) if self.options.tiles is None else recipe.tiles
        own_rate = recipe.own_rate if self.options.rate is None else self.options.rate
        # The classifier's statistics and filters are good already: the mean of more steps is nearer to the best.
        return replace(recipe, tiles=tiles, own_rate=own_rate, average=0.998, blended=_BLENDED)

    def _train(
        self, grid: int, size: Size, bank: ViewBank, plan: FitPlan, answered: AnsweredImages
    ) -> tuple[TileReader, dict[str, Any]]:
        """Trains the network of a grid; gives it and how it was trained."""
        options, recipe = self.options, self._recipe(size, bank)
        if grid not in plan.epochs:
            plan.epochs[grid] = options.epochs or self._affordable_epochs(size, bank, recipe)
            plan.save()
        recipe = replace(recipe, epochs=plan.epochs[grid])
        network = self._begun(size, bank)
        name = f"{grid}x{grid}"
        checkpoint = self.out / f"{name}.checkpoint"
        steps = max(1, round(recipe.epochs * (bank.per_epoch // recipe.tiles)))
        held = Held(answered.images.pixels, answered.answers, options.until)
        progress = Progress(0, steps, math.nan, 0.0)
        with self.watcher.stage(f"fitting {name}", steps) as done:
            reached = 0
            for progress in fit_tiles(network, bank, recipe, checkpoint, size.side, options.torch_device, held):
                done(progress.step - reached, "" if progress.agreement is None else f"agrees {progress.agreement:.1%}")
                reached = progress.step
        if progress.step < steps:
            self.watcher.say(
                f"{name}: stopped after {progress.step:,} of {steps:,} steps, since it agrees with the classifier on "
                f"{options.until:.1%} of the held-out images, as --until wants"
            )
        elif options.until is not None and (progress.agreement or 0.0) < options.until:
            self.watcher.say(
                f"{name}: its agreement did not reach the {options.until:.1%} of --until, on some held-out images; "
                "train for longer with --minutes, or allow a higher --cost"
            )
        notes = self._notes(size, network, bank, recipe, progress)
        return network.to("cpu"), notes | {"agreement_when_compared": plan.compared.get(grid, {})}

    def _affordable_epochs(self, size: Size, bank: ViewBank, recipe: FitRecipe) -> float:
        """Counts the passes over the images that fit into the minutes, from a few steps of a throw-away network."""
        trial = self.out / "trial.checkpoint"
        trial.unlink(missing_ok=True)
        network, short = size.network(self.classifier), replace(recipe, epochs=1.0)
        times = []
        began = time.monotonic()
        steps = fit_tiles(network, bank, short, trial, size.side, self.options.torch_device)
        for _ in islice(steps, _TRIAL_STEPS):
            times.append(time.monotonic() - began)
            began = time.monotonic()
        trial.unlink(missing_ok=True)
        per_step = float(np.median(times[1:] or times))
        return round(max(1.0, self.options.minutes * 60 / per_step * recipe.tiles / bank.per_epoch), 2)

    def _notes(
        self, size: Size, network: TileReader, bank: ViewBank, recipe: FitRecipe, progress: Progress
    ) -> dict[str, Any]:
        options = self.options
        stopped = {}
        if progress.step < progress.steps:  # its agreement on the held-out images is a little too good then
            stopped = {"stopped_at_agreement": options.until, "steps": [progress.step, progress.steps]}
        return {
            "classifier": self.classifier.name,
            "classifier_sha256": self.classifier.sha256,
            "weights_began_as": "the classifier's own" if size.own else "fresh",
            "size": str(size),
            **({"residual_blocks_left_out": size.left_out} if size.left_out else {}),
            "channels": list(size.widths),
            "coarse": size.coarse,
            "trained_on": f"{self.learned_from} in {bank.views} views, scored by the classifier; no labels",
            "learned_images": self.sketch,  # see images/sketch.py
            "reach_pixels": bank.reach,
            "mirrored_views": bank.mirror,
            "epochs": round(recipe.epochs * progress.step / progress.steps, 2),
            **stopped,
            "tiles_per_step": recipe.tiles,
            "distillation_temperature": recipe.temperature,
            "precision": options.precision,
            "steps_of_blends": recipe.blended,
            "rate": recipe.own_rate if size.own else recipe.rate,
            **({"lossy": options.lossy, "jpeg_quality": options.jpeg_quality} if options.lossy else {}),
            "started_from_an_earlier_fit": options.start is not None,
            "seed": options.seed,
            "training_seconds": round(progress.seconds),
            "device": options.torch_device,
            "arithmetic": "bfloat16" if in_bfloat16(network, options.torch_device) else "float32",
            "threads": options.threads,
            "torch": str(torch.__version__),
        }


def _named(grid: int) -> str:
    return "light model" if grid == 1 else f"{grid}x{grid} model"


def _recipe(bank: ViewBank, options: FitOptions) -> FitRecipe:
    some = torch.arange(min(len(bank), _SOFTENED))
    taught = bank.scores(some, torch.zeros_like(some))
    # With few images larger steps would be few, and an epoch over before anything is learned.
    usual = min(FitRecipe.tiles, max(36, bank.per_epoch // 16))
    recipe = FitRecipe(
        tiles=usual if options.tiles is None else options.tiles,
        temperature=soft_temperature(taught),
        jitter=round(0.7 * bank.reach),
        lossy=options.lossy,
        quality=options.jpeg_quality if options.lossy else 0,
        seed=options.seed,
    )
    return recipe if options.rate is None else replace(recipe, rate=options.rate)


def _split(images: ImageSet, options: FitOptions) -> tuple[NDArray[np.int64], ImageSet]:
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
    cells = max(options.grids) ** 2
    if len(images) < cells:
        raise ConfigurationError(
            f"{len(images):,} {kind} images are too few: one collage of grid {max(options.grids)} shows {cells}; give "
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


def _mix(answers: NDArray[np.int64], class_names: tuple[str, ...]) -> str:
    """Gives the shares of the most frequent answers, in a clause."""
    counts = np.bincount(answers, minlength=len(class_names))
    often = np.argsort(-counts, kind="stable")[:_MIX_SHOWN]
    said = [f"{class_names[number]} {counts[number] / len(answers):.1%}" for number in often.tolist() if counts[number]]
    others = int((counts > 0).sum()) - len(said)
    return f"{', '.join(said)}{f', and {others:,} other classes' if others else ''}"
