"""Runs the user's classifier as a black box: images in, scores out. Neither torch nor its weights are needed."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import LEAST_PROBABILITY, PixelArray, ScoreArray
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.models.cards import Layout, ModelCard, load_card
from evenkeel.models.classifier_form import (
    ACCEPTED,
    Colours,
    FormHints,
    InputForm,
    Normalisation,
    input_form,
    output_name,
)
from evenkeel.models.digest import file_digest
from evenkeel.models.labels import read_class_names
from evenkeel.models.measure import interleaved_latencies_ms
from evenkeel.models.onnx_costs import count_costs
from evenkeel.models.session import open_session
from evenkeel.models.shipped import NAMES, card_path
from evenkeel.text_values import is_text

__all__ = ["BlackBox", "log_softmax"]

ScoreKind = Literal["logits", "probabilities"]


class BlackBox:
    """Holds a classifier of which nothing is known but its answers; made by `BlackBox.open`.

    Attributes:
        name: of its card, or its file's without suffix.
        path: its ONNX file.
        card: its model card; None where it came as a bare ONNX file.
        card_path: of that card; None for a bare file and for a shipped model.
        sha256: of that file; of file and weights together where the weights lie in files of their own.
        height: of the images that it takes, pixels.
        width: the same.
        classes: how many it tells apart.
        class_names: by its card or a file of them; None where they are not known.
        interpolation: how images are scaled to its size, by its card or as a card says that leaves it out.
        kind: its scores are `logits` or `probabilities`.
        layout: of its input.
        datatype: of its input.
        input_name: in the graph.
        output_name: in the graph.
        normalisation: of pixels 0..255 for a float input; none for a graph that normalises by itself.
        form: of its input, all of it.
        plain: a card can say what it takes and gives, so that workers run its file as it is.
        macs: multiply-accumulates of one image; None where unknown.
        parameters: None where unknown.
    """

    def __init__(
        self, path: Path, card: ModelCard | None, session: Any, form: InputForm, output_name: str, sha256: str
    ) -> None:
        self.form = form
        self._session = session
        self.name = path.stem if card is None else card.name
        self.path = path
        self.card = card
        self.card_path: Path | None = None
        self.sha256 = sha256
        self.height, self.width = form.height, form.width
        self.layout, self.datatype = form.layout, form.datatype
        self.normalisation = form.normalisation
        self.input_name, self.output_name = form.name, output_name
        self.class_names = None if card is None else card.classes
        self.interpolation = ModelCard.interpolation if card is None else card.interpolation
        self._one_by_one = form.fixed_batch
        self.classes, self.kind, self.plain = self._probe()
        costs = count_costs(path, form.name, form.shape)
        self.macs = costs.macs or (card.macs if card is not None else 0) or None
        self.parameters = costs.parameters or (card.parameters if card is not None else 0) or None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int = 1,
        side: int | tuple[int, int] | None = None,
        layout: Layout | None = None,
        bgr: bool = False,
        output: str | None = None,
        scale: float | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        classes: str | Path | None = None,
    ) -> "BlackBox":
        """Opens the classifier at `path`, and runs it on made-up images to see that it answers as a classifier does.

        Args:
            path: an ONNX file, a model card (.json), or the name of a shipped model.
            threads: that one pass may use.
            side: height and width of the images, for a graph that leaves them open; one number for a square.
            layout: NHWC or NCHW, where the graph leaves it open.
            bgr: whether the graph takes the colours in the order blue, green, red.
            output: name of the scores among the graph's outputs, where several may be.
            scale: for float inputs without a card, which take `(pixels * scale - mean) / std`, with pixels 0..255
                and a mean and std per channel of red, green, blue. None: 1 / 255, which gives 0..1. With scale 1 the
                graph gets 0..255.
            mean: None: 0.
            std: None: 1.
            classes: a file with the names of its classes, in the order of its scores; see `read_class_names`.

        Raises:
            ConfigurationError: not there, not ONNX, of a form that is no image classifier's; what is taken is in the
                message beside what was found.
        """
        if str(path) not in NAMES and not is_text(str(Path(path).resolve())):
            raise ConfigurationError(
                f"classifier {str(path)!r}: its name or its folder's is not UTF-8 text, and cards and "
                "configurations are; rename it"
            )
        card, file = _card_and_file(path)
        given = [name for name, value in (("scale", scale), ("mean", mean), ("std", std)) if value is not None]
        wanted = FormHints((side, side) if isinstance(side, int) else side, layout, bgr, output)
        others = [*wanted.names(), *(["classes"] if classes is not None else [])]
        if card is not None and (given or others):
            names = ", ".join([*given, *others])
            raise ConfigurationError(f"classifier {path}: {names} stands in its model card; leave it away here")
        normalisation = Normalisation(
            1 / 255 if scale is None else scale,
            (0.0, 0.0, 0.0) if mean is None else mean,
            (1.0, 1.0, 1.0) if std is None else std,
        )
        sha256 = _sha256(file, card)
        session = open_session(file, threads)
        form = input_form(session, file, card, wanted, normalisation)
        if given and form.datatype == "UINT8":
            raise ConfigurationError(
                f"classifier {path} takes uint8 pixels and normalises them itself; leave {', '.join(given)} away"
            )
        made = cls(file, card, session, form, output_name(session, file, card, wanted), sha256)
        if classes is not None:
            made.class_names = read_class_names(classes, made.classes)
        if card is not None and str(path) not in NAMES:
            made.card_path = Path(path)
        return made

    def scores(self, pixels: PixelArray, batch: int = 64) -> ScoreArray:
        """Gives its scores, float32 [n, classes], all finite.

        Args:
            pixels: uint8 [n, height, width, 3].
            batch: images in one pass, where the graph takes several.

        Raises:
            ConfigurationError: pixels of another shape or type.
            EvenkeelError: it failed, or gave scores that are not finite.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (self.height, self.width, 3):
            raise ConfigurationError(
                f"classifier {self.name} takes images uint8 [n, {self.height}, {self.width}, 3], "
                f"these are {pixels.dtype} {list(pixels.shape)}"
            )
        answers = np.empty((len(pixels), self.classes), np.float32)
        step = 1 if self._one_by_one else max(1, batch)
        for begin in range(0, len(pixels), step):
            part = pixels[begin : begin + step]
            try:
                answers[begin : begin + step] = self._run(part)
            except Exception as error:  # onnxruntime's own errors have no common base
                raise EvenkeelError(
                    f"classifier {self.name} failed on images {begin} to {begin + len(part) - 1}: {error}"
                ) from error
        finite = np.isfinite(answers).all(axis=1)
        if not finite.all():
            raise EvenkeelError(
                f"classifier {self.name} gave scores that are not finite for {int((~finite).sum()):,} of "
                f"{len(pixels):,} images, first for number {int(finite.argmin()):,}; leave such images out"
            )
        return answers

    def log_probabilities(self, pixels: PixelArray, batch: int = 64) -> ScoreArray:
        """Gives natural logarithms of its probabilities, float32 [n, classes]; arguments and errors as for `scores`."""
        return self.as_log_probabilities(self.scores(pixels, batch))

    def as_log_probabilities(self, scores: ScoreArray) -> ScoreArray:
        """Gives the logarithms of probabilities that its `scores` [..., classes] stand for."""
        if self.kind == "probabilities":
            scores = np.log(np.maximum(scores, np.float32(LEAST_PROBABILITY)))
        return log_softmax(scores)

    def fed(self, normalisation: Normalisation, colours: Colours) -> "BlackBox":
        """Gives the same classifier fed in another way; with grey images or pixels as they are, not all applies."""
        other = copy.copy(self)
        other.form = replace(self.form, normalisation=normalisation, colours=colours)
        other.normalisation = normalisation
        return other

    def one_pass(self) -> Callable[[], object]:
        """Makes a function that runs it once on one image on one thread, from uint8 pixels to scores; to be timed."""
        session = open_session(self.path)
        image = np.random.default_rng(0).integers(0, 256, (1, self.height, self.width, 3), dtype=np.uint8)
        names, form = [self.output_name], self.form
        return lambda: session.run(names, {form.name: form.prepared(image)})

    def latency_ms(self, rounds: int = 100) -> float:
        """Measures the median milliseconds of one pass over one image on one thread, from uint8 pixels to scores."""
        return interleaved_latencies_ms([self.one_pass()], rounds)[0]

    def _run(self, pixels: PixelArray) -> NDArray[Any]:
        found = self._output(pixels)
        if found.ndim == 1 and len(pixels) == 1:
            return found[None]  # a graph for one image may leave the row's axis away
        if found.ndim > 2 and len(found) == len(pixels) and found[:1].size == max(found.shape[1:]):
            return found.reshape(len(found), -1)  # [n, classes, 1, 1] and the like
        return found

    def _output(self, pixels: PixelArray) -> NDArray[Any]:
        found = self._session.run([self.output_name], {self.form.name: self.form.prepared(pixels)})[0]
        return cast(NDArray[Any], found)

    def _refuse(self, what: str) -> ConfigurationError:
        return ConfigurationError(f"classifier {self.path}: {what}; expected {ACCEPTED}")

    def _probe(self) -> tuple[int, ScoreKind, bool]:
        """Finds the number of classes, the kind of scores, and whether a card can say how the graph is run."""
        images = _probe_images(self.height, self.width)
        rows = []
        for image in images:
            try:
                row = self._run(image[None])
            except Exception as error:
                raise self._refuse(f"an image {list(self.form.shape)} cannot be run: {error}") from error
            if row.ndim != 2 or row.shape[0] != 1:
                raise self._refuse(f"an image {list(self.form.shape)} gives scores {list(row.shape)}")
            rows.append(row)
        classes = rows[0].shape[1]
        scores = np.concatenate(rows).astype(np.float64)
        if classes < 2:
            raise self._refuse(f"its scores {[1, classes]} tell no classes apart; it needs two or more")
        if self.card is not None and classes != len(self.card.classes):
            raise self._refuse(f"it gives {classes} scores, its card lists {len(self.card.classes)} classes")
        if not np.isfinite(scores).all():
            raise self._refuse("its scores of a plain image are not finite; check how its input is to be normalised")
        if not self._one_by_one:
            self._one_by_one = not self._takes_batches(images, scores)
        raw = self._output(images[:1])
        if self.card is not None and raw.ndim != 2:
            raise self._refuse(
                f"an image gives scores {list(raw.shape)}, and its card can say [1, {classes}] only; give the ONNX "
                "file itself to evenkeel fit, which writes one that does"
            )
        return classes, self._kind(scores), self.form.fits_a_card and raw.ndim == 2 and raw.dtype == np.float32

    def _takes_batches(self, images: PixelArray, alone: NDArray[np.float64]) -> bool:
        """True if images get the same scores together as alone; a graph may have one row built in deep inside."""
        try:
            together = self._run(images)
        except Exception:
            return False
        reach = 1e-2 * max(float(np.abs(alone).max()), 1e-6)
        return together.shape == alone.shape and bool(np.allclose(together, alone, rtol=0, atol=reach))

    def _kind(self, scores: NDArray[np.float64]) -> ScoreKind:
        shares = bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=2e-3))
        if self.card is None:
            return "probabilities" if shares else "logits"
        if self.card.scores == "probabilities" and not shares:
            raise self._refuse(
                "its card says that scores are probabilities, but they are not all above 0 with a sum of 1 "
                f"({np.array2string(scores[0, :4], precision=3)}...)"
            )
        return self.card.scores


def log_softmax(scores: NDArray[np.floating[Any]]) -> ScoreArray:
    """Gives the logarithms of the softmax of `scores` [..., classes], float32."""
    shifted = scores.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return cast(ScoreArray, (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32))


def _card_and_file(path: str | Path) -> tuple[ModelCard | None, Path]:
    place = card_path(str(path)) if str(path) in NAMES else Path(path)
    if not place.is_file():
        raise ConfigurationError(
            f"classifier {path}: no such file; give an ONNX file, a model card (.json) or one of {', '.join(NAMES)}"
        )
    if place.suffix.lower() != ".json":
        return None, place
    card = load_card(place)
    if card.kind != "classifier":
        raise ConfigurationError(f"model card {place}: field 'kind' is {card.kind}; a classifier is needed here")
    file = place.parent / card.file
    if not file.is_file():
        raise ConfigurationError(f"model card {place}: {file} is not there")
    return card, file


def _sha256(file: Path, card: ModelCard | None) -> str:
    try:
        if card is not None:
            own = hashlib.sha256(file.read_bytes()).hexdigest()
            if own != card.sha256.lower():
                raise ConfigurationError(
                    f"model card of {file}: field 'sha256' is {card.sha256}, but the file has {own}; "
                    "one of the two is not the one that was measured"
                )
        return file_digest(file)
    except OSError as error:
        raise ConfigurationError(f"classifier {file} cannot be read: {error.strerror or error}") from error


def _probe_images(height: int, width: int) -> PixelArray:
    """Makes black, grey, white, a ramp and noise."""
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    plain = [np.full((height, width, 3), value, np.uint8) for value in (0, 128, 255)]
    return np.stack([*plain, np.broadcast_to(ramp, (height, width, 3)), noise])
