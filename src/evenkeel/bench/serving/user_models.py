"""Reads a user's own classifier, the collages that were fitted to it, and images, for an experiment with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from evenkeel.arrays import Array
from evenkeel.errors import ConfigurationError
from evenkeel.images.image_set import read_images
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card
from evenkeel.serving.config import read_config

__all__ = ["UserModels"]

_MOST_IMAGES = 400
_LEAST_IMAGES = 20
_TIMED = 30  # passes


@dataclass(frozen=True, eq=False)
class UserModels:
    """Holds a classifier that is served, what backs it up, and images with the classifier's own answers.

    Attributes:
        card: of the classifier, a file.
        name: of the same.
        codes: of its backups, as a configuration has them.
        images: [n, ...] as the server takes them.
        answers: its own [n], which fills are compared with.
        pass_ms: processor time of one pass.
        held_back: in words, of each collage whose card lets only sure fills through.
    """

    card: Path
    name: str
    codes: tuple[Any, ...]
    images: Array
    answers: Array
    pass_ms: float
    held_back: tuple[str, ...] = ()

    @classmethod
    def read(cls, card: Path, images: Path, split: str | None = None) -> Self:
        """Reads the classifier of `card`, the codes in the `serve.yaml` beside it, and some `images`, spread over all.

        Raises:
            ConfigurationError: there is no such file, or no collage in it; too few images.
        """
        if card.suffix != ".json":
            raise ConfigurationError(
                f"classifier: {card} is no model card (.json); give the one that `evenkeel fit` wrote into its folder"
            )
        classifier = BlackBox.open(str(card))
        assert classifier.card is not None
        path = card.parent / "serve.yaml"
        if not path.is_file():
            raise ConfigurationError(
                f"classifier: there is no serve.yaml beside {card}; fit collages to the classifier first: evenkeel fit "
                f"--classifier {card} --images ..., and give the card in the folder of that"
            )
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
        read_config(raw, card.parent)
        codes = tuple(_absolute(code, card.parent) for code in raw.get("codes", ()))
        if all(code == "replicate" for code in codes):
            raise ConfigurationError(f"{path}: it names no collage, so there is nothing to compare")
        read = read_images(
            images,
            height=classifier.height,
            width=classifier.width,
            labels_from="none",
            limit=_MOST_IMAGES,
            split=split,
            interpolation=classifier.interpolation,
        )
        if len(read) < _LEAST_IMAGES:
            raise ConfigurationError(f"images: {images} holds {len(read)}; give {_LEAST_IMAGES} at least")
        answers = classifier.scores(read.pixels).argmax(1)
        pixels: Array = read.pixels  # in the card's form, but not normalised: the server does that
        if classifier.layout == "NCHW":
            pixels = pixels.transpose(0, 3, 1, 2)
        pixels = np.ascontiguousarray(pixels, np.uint8 if classifier.datatype == "UINT8" else np.float32)
        pass_ms, held_back = classifier.latency_ms(_TIMED), tuple(filter(None, map(_held_back, codes)))
        return cls(card.resolve(), classifier.card.name, codes, pixels, answers, pass_ms, held_back)


def _absolute(code: Any, folder: Path) -> Any:
    """Gives a code of a configuration in `folder` as one in any other place has to name it."""
    if isinstance(code, dict):
        return {name: _absolute(value, folder) if name == "model" else value for name, value in code.items()}
    return str((folder / code).resolve()) if (folder / str(code)).is_file() else code


def _held_back(code: Any) -> str | None:
    """Says which fills of a code the card of its model holds back; None where it has no card, or uses all of them."""
    path = Path(str(code.get("model") if isinstance(code, dict) else code))
    if path.suffix != ".json" or not path.is_file():
        return None
    card = load_card(path)
    if not card.min_confidence:
        return None
    return f"{card.name} fills only from confidence {card.min_confidence:.2f} on, as its card's min_confidence asks."
