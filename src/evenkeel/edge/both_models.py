"""Finds what a light and an accurate model say of the same images, as the gateway would have them say it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evenkeel.arrays import Array, FloatArray, IntegerArray, PixelArray
from evenkeel.coding.answers.cascade import Sureness, sureness
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard
from evenkeel.models.session import open_session
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Pairs

__all__ = [
    "BothModels",
    "answers_of_accurate",
    "answers_of_collage",
    "answers_of_light",
    "read_audited",
    "read_recorded",
]

_MAX_BYTES = 1 << 30
_SHOWN = 20  # numbers of items in a message
_BATCH = 64
Done = Callable[[int], object]


@dataclass(frozen=True)
class BothModels:
    """Holds what two models say of the same items.

    Attributes:
        scores: of the light model, [n, classes]; of a single column where only its sureness is known.
        form: how they are read.
        light: classes that the light model answers, [n].
        accurate: classes that the accurate model answers, [n].
        labels: the right classes, [n]; None where nobody knows.
        loss: share of the item's packets that were lost on the way to the light model, [n]; None: none was.
    """

    scores: Array
    form: ScoreForm
    light: IntegerArray
    accurate: IntegerArray
    labels: IntegerArray | None = None
    loss: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.light)

    def sureness(self, kind: Sureness, temperature: float) -> FloatArray:
        """Gives how sure the light model is, [n]."""
        if self.scores.shape[1] == 1:
            return np.asarray(self.scores[:, 0], dtype=np.float64)
        return sureness(self.scores, replace(self.form, temperature=temperature), kind)

    def pairs(self, kind: Sureness, temperature: float) -> Pairs:
        """Gives what thresholds are certified with."""
        labels = self.labels
        return Pairs(
            self.sureness(kind, temperature),
            self.light == self.accurate,
            None if labels is None else self.light == labels,
            None if labels is None else self.accurate == labels,
        )

    def take(self, places: Array) -> "BothModels":
        """Takes some of the items."""
        return BothModels(
            self.scores[places],
            self.form,
            self.light[places],
            self.accurate[places],
            None if self.labels is None else self.labels[places],
            None if self.loss is None else self.loss[places],
        )

    def check(self, promises: Sequence[Promise] = ()) -> None:
        """Refuses answers that cannot show anything.

        A label of -1 is not known. A drop of accuracy needs none where both models say the same.

        Raises:
            ConfigurationError: all are of one class, or a label is missing that a promise needs.
        """
        if self.labels is not None and (self.labels < 0).any():
            missing = self.labels < 0
            if all(promise.kind != "min_accuracy" for promise in promises):
                missing &= self.light != self.accurate
            if missing.any() and any(promise.needs_labels for promise in promises):
                numbers = ", ".join(map(str, np.flatnonzero(missing)[:_SHOWN].tolist()))
                raise ConfigurationError(
                    f"{int(missing.sum()):,} items have no label and need one, numbers {numbers}"
                    f"{', ...' if missing.sum() > _SHOWN else ''}"
                )
        for what, classes in (("the accurate model answers", self.accurate), ("the labels are", self.labels)):
            if classes is not None and len(classes) and classes[0] >= 0 and (classes == classes[0]).all():
                raise ConfigurationError(
                    f"{what} class {int(classes[0])} for every image; a calibration set needs images of all kinds"
                )


def answers_of_light(light: Path, pixels: PixelArray, threads: int, done: Done) -> tuple[Array, ScoreForm]:
    """Gives the scores of a light classifier, and how they are read."""
    model = BlackBox.open(light, threads=threads)
    form = ScoreForm(model.classes, 1.0 if model.card is None else model.card.temperature, model.kind)
    return _in_parts(model, pixels, done), form


def _in_parts(model: BlackBox, pixels: PixelArray, done: Done) -> Array:
    parts = []
    for begin in range(0, len(pixels), _BATCH):
        parts.append(model.scores(pixels[begin : begin + _BATCH]))
        done(len(parts[-1]))
    return np.concatenate(parts)


def answers_of_collage(code: Collage, card: ModelCard, folder: Path, pixels: PixelArray, nhwc: bool, seed: int,
                       threads: int, done: Done) -> tuple[Array, IntegerArray]:  # fmt: skip
    """Gives the confidence `[n, 1]` and the class [n] of each image as one of a full collage of random others.

    Raises:
        EvenkeelError: the Collage-CNN gives no answer for an image.
    """
    if not card.normalisation_inside:
        raise ConfigurationError(f"model {card.name!r}: only a graph that normalises its input by itself is certified")
    session = open_session(folder / card.file, threads)
    sure, classes = np.zeros((len(pixels), 1)), np.full(len(pixels), -1, np.int64)
    order = np.random.default_rng(seed).permutation(len(pixels))
    dtype = np.uint8 if card.datatype == "UINT8" else np.float32
    for begin in range(0, len(order), code.max_items):
        group = order[begin : begin + code.max_items]
        items = [pixels[place] if nhwc else pixels[place].transpose(2, 0, 1) for place in group]
        (task,) = code.spares([code.prepare(item) for item in items])
        reply = session.run([card.output_name], {card.input_name: task.inputs.astype(dtype)})[0]
        for place, answer in code.decode(len(group), {len(group): reply}).items():
            sure[group[place], 0] = answer.confidence
            classes[group[place]] = int(answer.value.argmax())
        done(len(group))
    if (classes < 0).any():
        raise EvenkeelError(f"model {card.name!r} gave no finite scores for {int((classes < 0).sum()):,} images")
    return sure, classes


def answers_of_accurate(accurate: Path, pixels: PixelArray, threads: int, done: Done) -> IntegerArray:
    """Gives the classes that the accurate model answers."""
    classes: IntegerArray = _in_parts(BlackBox.open(accurate, threads=threads), pixels, done).argmax(axis=1)
    return classes


def read_recorded(path: Path) -> BothModels:
    """Reads recorded answers from an npz file: `light` [n, classes], `accurate` [n] or [n, classes]; `labels`, `loss`.

    Raises:
        ConfigurationError: names what is wrong.
    """

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(f"recorded answers {path}: {why}")

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise refuse(f"more than {_MAX_BYTES:,} bytes")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in ("light", "accurate", "labels", "loss") if name in file}
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive raises whatever zipfile, zlib or numpy raise
        raise refuse(f"is no npz file of plain arrays: {error}") from error
    light, accurate = found.get("light"), found.get("accurate")
    if light is None or accurate is None:
        raise refuse("needs the arrays light and accurate")
    if light.ndim != 2 or light.shape[1] < 2 or light.dtype.kind != "f" or not np.isfinite(light).all():
        raise refuse(f"light must be finite scores [n, classes], found {light.dtype} {list(light.shape)}")
    if accurate.ndim == 2 and accurate.shape == light.shape:
        accurate = accurate.argmax(axis=1)
    for name, array in (("accurate", accurate), ("labels", found.get("labels")), ("loss", found.get("loss"))):
        if array is not None and (
            array.shape != light.shape[:1] or array.dtype.kind not in ("f" if name == "loss" else "iu")
        ):
            raise refuse(f"{name} must have one number for each of {len(light):,} items, found {list(array.shape)}")
    loss = found.get("loss")
    if loss is not None and not ((loss >= 0) & (loss <= 1)).all():
        raise refuse("loss must lie between 0 and 1")
    return BothModels(light, ScoreForm(light.shape[1]), light.argmax(axis=1), accurate, found.get("labels"), loss)


def read_audited(path: Path) -> tuple[BothModels, int]:
    """Reads a gateway's audit file, one JSON object `{"score": ..., "agree": ...}` a line; counts lines it skips.

    Every request is audited with the same probability, whoever answered it, so its lines are a fair sample of traffic.

    Raises:
        ConfigurationError: it cannot be read, or no line is an audit's.
    """
    scores, agree, skipped = [], [], 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    one = json.loads(line)
                    score, same = one["score"], one["agree"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    skipped += 1  # a line that was being written when the gateway ended
                    continue
                if type(score) in (int, float) and 0 <= score <= 1 and type(same) is bool:
                    scores.append(float(score))
                    agree.append(same)
                else:
                    skipped += 1
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"audited answers {path} cannot be read: {error}") from error
    if not scores:
        raise ConfigurationError(f"audited answers {path}: holds none")
    # Only whether both agree is known: class 0 stands for the accurate model's, 1 for another one.
    light = np.where(agree, 0, 1).astype(np.int64)
    both = BothModels(np.array(scores)[:, None], ScoreForm(2), light, np.zeros(len(light), np.int64))
    return both, skipped
