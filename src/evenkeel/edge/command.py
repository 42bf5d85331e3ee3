"""Runs `evenkeel certify`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.arrays import IntegerArray
from evenkeel.coding.answers.by_name import CascadeSettings, CollageSettings, OwnModel
from evenkeel.coding.answers.cascade import Sureness
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.edge.both_models import (
    BothModels,
    answers_of_accurate,
    answers_of_collage,
    answers_of_light,
    read_audited,
    read_recorded,
)
from evenkeel.edge.certifying import Certified, Tested, certify_all
from evenkeel.edge.figure import certified_figure
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.figures.outputs import Outputs, arguments_of, check_outputs, write
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.figures.tables import Column, Page
from evenkeel.images.image_set import ImageSet, read_images
from evenkeel.models.cards import ModelCard, class_difference, load_card
from evenkeel.models.digest import card_digest
from evenkeel.models.labels import number_labels
from evenkeel.promises.certificate import BUCKETS, Certificate, check_promises, read_certificate
from evenkeel.promises.promise import KINDS, Promise
from evenkeel.serving.config import CodeConfig, ServeConfig, load_raw, read_config

__all__ = ["CertifyArguments", "run_certify"]

_DAY_S = 86400.0
_LABELS = (Column("promise", "promise"), Column("packet_loss", "loss"))
_COLUMNS = (
    Column("threshold_text", "threshold"),
    Column("offload", "offload", "%", factor=100),
    Column("offload_bound", "at most", "%", factor=100),
    Column("value", "on test", "%", factor=100),
    Column("naive_text", "naive", "threshold"),
    Column("calibration_size", "images", "n"),
    Column("examined", "looked at", "n"),
    Column("status", "status"),
)


@dataclass(frozen=True)
class CertifyArguments:
    """Holds the options of `evenkeel certify`; `--help` says what each one means."""

    config: Path
    images: Path | None
    recorded: Path | None
    audited: Path | None
    min_accuracy: tuple[float, ...]
    max_accuracy_drop: tuple[float, ...]
    min_agreement: tuple[float, ...]
    guarantee: float
    score: Sureness | None
    model: str | None
    labels: str
    split: str | None
    limit: int | None
    out: Path
    yaml: Path | None
    days: float
    seed: int
    threads: int
    outputs: Outputs

    @property
    def promises(self) -> list[Promise]:
        """Gives what is to be kept."""
        kinds = (kind for kind in KINDS if kind != "min_fill_agreement")
        return [Promise(kind, level, self.guarantee) for kind in kinds for level in getattr(self, kind)]


@dataclass(frozen=True)
class _Models:
    """Holds the pair that is certified."""

    light: ModelCard
    light_path: Path
    accurate: ModelCard
    accurate_path: Path
    collage: Collage | None  # None: a cascade

    @property
    def digests(self) -> dict[str, str]:
        return {
            self.light.name: card_digest(self.light, self.light_path.parent),
            self.accurate.name: card_digest(self.accurate, self.accurate_path.parent),
        }


def run_certify(arguments: CertifyArguments) -> None:
    """Runs `evenkeel certify`: finds thresholds, writes their certificate, and says what is not certifiable.

    Raises:
        EvenkeelError: nothing could be certified.
    """
    promises = arguments.promises
    check_promises(promises)
    sources = [each for each in (arguments.images, arguments.recorded, arguments.audited) if each is not None]
    if len(sources) != 1:
        raise ConfigurationError("give one of --images, --recorded and --audited")
    if not 0 < arguments.days <= 3650:
        raise ConfigurationError(f"days: must be above 0 and at most 3650, found {arguments.days:g}")
    arguments.outputs.check()
    check_outputs(out=arguments.out, yaml=arguments.yaml)
    config = read_config(load_raw(arguments.config), arguments.config.parent)
    before = None
    if arguments.audited is not None:
        if config.certificate is None:
            raise ConfigurationError("--audited: the configuration names no policy.certificate, so there are no audits")
        before = read_certificate(config.certificate)
    models = _models(config, arguments.model)
    console = Console(stderr=True)
    if models.collage is not None:
        if any(promise.needs_labels for promise in promises):
            raise ConfigurationError(
                "a fill is promised to agree with the replica's answer: give --min-agreement alone"
            )
        promises = [Promise("min_fill_agreement", promise.level, promise.guarantee) for promise in promises]
    both = _both(arguments, models, console)
    certified = certify_all(both, promises, seed=arguments.seed, score=arguments.score)
    certificate = _certificate(arguments, models, certified, before)
    kept = [each for each in certificate.thresholds if each.certified]
    notes = [""]
    if kept:
        certificate.save(arguments.out)
        notes.append(f"certificate {certificate.id}: {arguments.out}")
        if arguments.yaml is not None:
            write(arguments.yaml, certificate.plain_yaml().encode())
            notes.append(f"thresholds as YAML: {arguments.yaml}")
    rows = [_row(each) for each in certified.thresholds]
    publish(
        [Page([row | _shown(row, each) for row, each in zip(rows, certified.thresholds, strict=True)],
              _LABELS, _COLUMNS, notes=_notes(certified))],
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=notes,
        further={"certificate": certificate.id if kept else None, "score": certified.score,
                 "temperature": certified.temperature, "sizes": certified.sizes},
        draw=lambda: certified_figure(certified),
    )  # fmt: skip
    if not kept:
        raise EvenkeelError("; ".join(str(each.found) for each in certified.thresholds))


def _models(config: ServeConfig, wanted: str | None) -> _Models:
    """Finds the pair: the light model of a cascade, or else a Collage-CNN, beside the served model."""
    accurate = config.card()
    candidates: list[tuple[CodeConfig, ModelCard, Path]] = []
    for code in config.codes:
        if code.model is not None and isinstance(code.settings, (CascadeSettings, CollageSettings)):
            candidates.append((code, load_card(code.model), code.model))
    cascades = [each for each in candidates if isinstance(each[0].settings, CascadeSettings)]
    fitting = [each for each in cascades or candidates if wanted in (None, each[1].name)]
    if len(fitting) != 1:
        names = ", ".join(card.name for _, card, _ in candidates) or "none"
        raise ConfigurationError(
            f"a certificate is for one light model, beside {accurate.name}; the configuration's codes of kind cascade "
            f"or collage have {names}; choose one with --model"
        )
    code, light, path = fitting[0]
    if light.classes != accurate.classes:
        difference = class_difference(light.classes, accurate.classes)
        raise ConfigurationError(f"{light.name} and {accurate.name} must have the same classes: {difference}")
    if code.run or config.run:
        raise ConfigurationError("run: what replaces a model's file has no digest, so it cannot be certified")
    collage = None
    if isinstance(code.settings, CollageSettings):
        own = OwnModel(accurate.name, ScoreForm.from_card(accurate), accurate.layout)
        made = code.settings.code(own, light)
        assert isinstance(made, Collage)
        collage = made
    elif light.input_shape != accurate.input_shape or light.datatype != accurate.datatype:
        raise ConfigurationError(
            f"{light.name} takes {light.datatype} {list(light.input_shape)}, {accurate.name} {accurate.datatype} "
            f"{list(accurate.input_shape)}; both models of a cascade must take the same items"
        )
    return _Models(light, path, accurate, config.model, collage)


def _both(arguments: CertifyArguments, models: _Models, console: Console) -> BothModels:
    if arguments.audited is not None:
        both, skipped = read_audited(arguments.audited)
        if skipped:
            console.print(f"{skipped:,} lines of {arguments.audited} are no audits and were skipped", highlight=False)
        return both
    if arguments.recorded is not None:
        both = read_recorded(arguments.recorded)
    else:
        assert arguments.images is not None
        accurate = models.accurate
        images = read_images(
            arguments.images, height=accurate.height, width=accurate.width, labels_from=arguments.labels,
            limit=arguments.limit, split=arguments.split, interpolation=accurate.interpolation,
        )  # fmt: skip
        both = _ask(arguments, models, images, console)
    both.check(arguments.promises)
    return both


def _ask(arguments: CertifyArguments, models: _Models, images: ImageSet, console: Console) -> BothModels:
    pixels, threads = images.pixels, arguments.threads
    with bars(console, 24) as progress:
        task = progress.add_task(models.accurate.name, total=2 * len(pixels))

        def done(count: int) -> None:
            progress.advance(task, count)

        accurate = answers_of_accurate(models.accurate_path, pixels, threads, done)
        progress.update(task, description=models.light.name)
        light: IntegerArray
        if models.collage is None:
            scores, form = answers_of_light(models.light_path, pixels, threads, done)
            light = scores.argmax(axis=1)
        else:
            form = ScoreForm.from_card(models.light)
            scores, light = answers_of_collage(
                models.collage, models.light, models.light_path.parent, pixels, models.accurate.layout == "NHWC",
                arguments.seed, threads, done,
            )  # fmt: skip
    return BothModels(scores, form, light, accurate, _labels(models, images, accurate, console))


def _labels(models: _Models, images: ImageSet, accurate: IntegerArray, console: Console) -> IntegerArray | None:
    """Gives the images' labels as classes of the models; None where there are none, or they cannot be matched."""
    if images.labels is None:
        return None
    classes = models.accurate.classes
    numbering = number_labels(images.labels, images.class_names, classes, len(classes), accurate)
    for line in [] if numbering.trusted else numbering.lines():
        console.print(line, highlight=False, markup=False)
    labels = numbering.numbered(images.labels)
    return labels if numbering.trusted else None


def _certificate(
    arguments: CertifyArguments, models: _Models, certified: Certified, before: Certificate | None
) -> Certificate:
    now_s = time.time()
    fills = models.collage is not None
    source = arguments.images or arguments.recorded or arguments.audited
    return Certificate(
        "fills" if fills else "cascade",
        models.light.name,
        models.accurate.name,
        models.digests,
        certified.score if before is None else before.score,
        models.light.temperature if fills else certified.temperature if before is None else before.temperature,
        tuple(each.found for each in certified.thresholds),
        now_s,
        now_s + arguments.days * _DAY_S,
        f"{source.name if source else ''}, {sum(certified.sizes.values()):,} items",
        certified.sizes,
    )


def _row(each: Tested) -> dict[str, Any]:
    found = each.found
    return {
        "promise": f"{found.promise.kind} {found.promise.level:g}",
        "guarantee": found.promise.guarantee,
        "loss": BUCKETS[found.bucket],
        "threshold": found.threshold,
        "certified": found.certified,
        "needed": found.needed,
        "calibration_size": found.n,
        "offload": each.test_offload,
        "offload_low": None,
        "offload_high": None,
        "offload_bound": found.offload_high,
        "value": each.value,
        "value_low": each.low,
        "value_high": each.high,
        "disagreement_bound": found.disagreement_high,
        "naive_threshold": each.naive,
        "examined": each.examined,
    }


def _shown(row: dict[str, Any], each: Tested) -> dict[str, Any]:
    needed = "no set would do" if each.found.needed is None else f"about {each.found.needed:,} needed"
    return {
        "packet_loss": "none" if not each.found.bucket else f"to {row['loss']:.0%}",
        "threshold_text": "–" if each.found.threshold is None else f"{each.found.threshold:.4f}",
        "naive_text": f"{each.naive:.4f}",
        "status": "certified" if each.found.certified else f"not certifiable, {needed}",
    }


def _notes(certified: Certified) -> list[str]:
    sizes = ", ".join(f"{size:,} to {name}" for name, size in certified.sizes.items())
    return [
        f"score: {certified.score} at temperature {certified.temperature:.3g}; images: {sizes}",
        "offload: share of the test images that goes to the accurate model; at most: certified bound of it",
        "naive: the threshold that the calibration images alone would give; it breaks its promise half of the time",
        "looked at: calibration images whose label, or answer of the accurate model, the tests needed",
    ]
