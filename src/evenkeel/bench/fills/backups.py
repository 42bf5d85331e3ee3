"""Opens the classifier and the backups of `evenkeel bench fills`, from their cards.

Images come as uint8 `[height, width, 3]` for every model; what a model takes instead is made here, so that codes and
rows are the same for all.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.worker.model import load_model
from evenkeel.bench.fills.float_input import with_float_input
from evenkeel.bench.fills.measure import MeasuredBackup
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.boxes import BoxCollage
from evenkeel.coding.answers.by_name import OwnModel, settings_of
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.errors import ConfigurationError
from evenkeel.models import shipped
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import Encoder, Interpolation, ModelCard, class_difference, load_card, save_card

__all__ = [
    "UserClassifier",
    "berrut_backup",
    "cheap_backup",
    "collage_backup",
    "detector_backup",
    "open_classifier",
    "parity_backup",
    "with_clear_names",
]

Predict = Callable[[Array], Array]


@dataclass(frozen=True)
class UserClassifier:
    """Describes the model whose replies may be late.

    Attributes:
        name: of its card or file.
        run: uint8 `[rows, height, width, 3]` -> scores `[rows, classes]`.
        one_pass: runs it on one image; to be timed.
        form: how its scores are to be read.
        height: of an item, pixels.
        width: of an item, pixels.
        classes: names, where they are known.
        macs: of one pass; None where unknown.
        parameters: None where unknown.
        interpolation: how images are scaled to its size.
        with_float: gives it as it takes float32 `[rows, height, width, 3]`, for Berrut.
    """

    name: str
    run: Predict
    one_pass: Callable[[], object]
    form: ScoreForm
    height: int
    width: int
    classes: tuple[str, ...] | None
    macs: int | None
    parameters: int | None
    interpolation: Interpolation
    with_float: Callable[[], Predict]


def open_classifier(spec: str) -> UserClassifier:
    """Opens the classifier of a card (`.json`), of an ONNX file without a card, or a shipped one.

    Raises:
        ConfigurationError: nothing there, or no classifier.
    """
    box = BlackBox.open(spec)
    form = ScoreForm(box.classes, kind=box.kind) if box.card is None else ScoreForm.from_card(box.card)
    return UserClassifier(
        box.name,
        box.scores,
        box.one_pass(),
        form,
        box.height,
        box.width,
        box.class_names,
        box.macs,
        box.parameters,
        box.interpolation,
        partial(_float_run, box),
    )


def collage_backup(spec: str, classifier: UserClassifier) -> MeasuredBackup:
    """Opens a Collage-CNN; `spec` is a card or the name of a shipped one."""
    path, card = _read_card(spec, "collage", "collage", classifier)
    code = _code("collage", "collage", classifier, card)
    run, learned = load_model(str(path)).run, card.notes.get("learned_images")
    return MeasuredBackup(code.name, code, card.name, run, card.macs or None, card.parameters or None, learned)


def detector_backup(spec: str, classifier: UserClassifier) -> MeasuredBackup:
    """Opens the paper's detector on a collage; `spec` is a card."""
    path, card = _read_card(spec, "detector", "detector", classifier)
    form, pixels = ScoreForm.from_card(card), Pixels.from_card(card, "NHWC")
    code = BoxCollage(Collage(card.grid, card.tile_side, form, pixels=pixels, model=card.name))
    return MeasuredBackup(
        code.name, code, card.name, load_model(str(path)).run, card.macs or None, card.parameters or None
    )


def parity_backup(spec: str, encoder: Encoder, classifier: UserClassifier) -> MeasuredBackup:
    """Opens a parity model (ParM); `spec` is a card, `k=4:` may stand before it and must agree with the card."""
    option = f"parity-{encoder}"
    named = re.match(r"k=(\d+):", spec)
    path, card = _read_card(spec[named.end() :] if named else spec, option, "parity", classifier)
    if encoder == "sum":
        _check_size(card, option, classifier)
    code = _code(f"parity:form={encoder}{f',k={named[1]}' if named else ''}", option, classifier, card)
    return MeasuredBackup(
        code.name, code, card.name, load_model(str(path)).run, card.macs or None, card.parameters or None
    )


def cheap_backup(spec: str, classifier: UserClassifier) -> MeasuredBackup:
    """Opens a small classifier to run on each item; `spec` is `card:items`, the items of one pass."""
    text, _, count = spec.rpartition(":")
    if not text or not count.isdecimal() or int(count) < 1:
        raise ConfigurationError(f"cheap: expected CARD:ITEMS, as in small.json:9, found {spec!r}")
    path, card = _read_card(text, "cheap", "classifier", classifier)
    _check_size(card, "cheap", classifier)
    code = _code(f"cheap:k={count}", "cheap", classifier, card)
    run = _from_images(load_model(str(path)).run, card)
    macs = card.macs * code.max_items or None
    return MeasuredBackup(f"{code.name}{code.max_items}", code, card.name, run, macs, card.parameters or None)


def berrut_backup(items: int, classifier: UserClassifier) -> MeasuredBackup:
    """Makes ApproxIFER with one spare: mixtures of `items` items for the classifier itself, taking float32.

    Raises:
        ConfigurationError: the classifier cannot take float32.
    """
    run = classifier.with_float()
    code = _code(f"berrut:k={items}", "berrut", classifier)
    # It has one spare task, which is one pass of the classifier.
    return MeasuredBackup(code.name, code, classifier.name, run, classifier.macs, classifier.parameters)


def _code(text: str, option: str, classifier: UserClassifier, card: ModelCard | None = None) -> BackupCode:
    """Makes the code that `text` names, for images as rows of `[height, width, 3]`."""
    try:
        return settings_of(text).code(OwnModel(classifier.name, classifier.form, "NHWC"), card)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {error}") from error


def with_clear_names(backups: Sequence[MeasuredBackup]) -> list[MeasuredBackup]:
    """Gives the backups, with the model's name behind a method that there is more than once.

    Raises:
        ConfigurationError: one is given twice.
    """
    methods = [backup.method for backup in backups]
    clear = [
        replace(backup, method=f"{backup.method} {backup.model}") if methods.count(backup.method) > 1 else backup
        for backup in backups
    ]
    names = [backup.method for backup in clear]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{name} is given twice")
    return clear


def _read_card(spec: str, option: str, kind: str, classifier: UserClassifier | None = None) -> tuple[Path, ModelCard]:
    path = shipped.card_path(spec) if spec in shipped.NAMES else Path(spec)
    if path.suffix != ".json":
        known = ", ".join(shipped.NAMES)
        raise ConfigurationError(f"{option}: expected a model card (.json) or one of {known}, found {spec!r}")
    card = load_card(path)
    if card.kind != kind:
        raise ConfigurationError(f"{option}: {card.name} is a {card.kind}; a {kind} is wanted here")
    if classifier is not None and (
        len(card.classes) != classifier.form.classes or classifier.classes not in (None, card.classes)
    ):
        found = f"they have {len(card.classes)} and {classifier.form.classes}"
        if classifier.classes is not None:
            found = class_difference(card.classes, classifier.classes)
        raise ConfigurationError(
            f"{option}: {card.name} and {classifier.name} must have the same classes in the same order; {found}"
        )
    return path, card


def _check_size(card: ModelCard, option: str, classifier: UserClassifier) -> None:
    if (card.height, card.width) != (classifier.height, classifier.width):
        raise ConfigurationError(
            f"{option}: {card.name} takes {card.height} x {card.width} pixels, "
            f"{classifier.name} {classifier.height} x {classifier.width}; they must be alike"
        )


def _from_images(run: Predict, card: ModelCard) -> Predict:
    """Gives `run` for rows `[height, width, 3]` of pixel values of any datatype."""
    pixels = Pixels(card.layout, card.datatype)

    def converted(rows: Array) -> Array:
        taken = rows if pixels.layout == "NHWC" else np.ascontiguousarray(rows.transpose(0, 3, 1, 2))
        return run(taken.astype(pixels.dtype, copy=False))

    return converted


def _float_run(box: BlackBox) -> Predict:
    """Opens the classifier for pixel values of float32, which need not lie in 0..255."""
    card, content = _float_card(box)
    with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
        path = Path(folder) / "float.json"
        (path.parent / card.file).write_bytes(content)
        save_card(replace(card, sha256=sha256(content).hexdigest()), path)
        try:
            run = _from_images(load_model(str(path)).run, card)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"berrut: {box.name} cannot take float32 pixels; give a classifier with datatype FP32 ({error})"
            ) from error
    image = np.random.default_rng(0).integers(0, 256, (1, box.height, box.width, 3), np.uint8)
    if not np.allclose(run(image), box.scores(image), rtol=1e-3, atol=1e-3):
        raise ConfigurationError(f"berrut: {box.name} gives other scores for the same pixels in float32")
    return run


def _float_card(box: BlackBox) -> tuple[ModelCard, bytes]:
    """Makes a card of the classifier for float32 pixels, and the file that goes with it."""
    if not box.plain:
        raise ConfigurationError(
            f"berrut: {box.name} takes or gives what no card can say; give the one that evenkeel fit writes for it"
        )
    content, takes_float = box.path.read_bytes(), box.datatype == "FP32"
    share = 255 * box.normalisation.scale  # cards scale pixels to 0..1
    card = ModelCard(
        name=box.name,
        kind="classifier",
        file="float.onnx",
        sha256=box.sha256,
        classes=tuple(map(str, range(box.classes))),
        height=box.height,
        width=box.width,
        layout=box.layout,
        datatype="FP32",
        input_name=box.input_name,
        output_name=box.output_name,
        scores=box.kind,
        mean=tuple(value / share for value in box.normalisation.mean),
        std=tuple(value / share for value in box.normalisation.std),
        normalisation_inside=not takes_float,
    )
    return card, content if takes_float else with_float_input(content, box.input_name)
