"""Keeps what a fit decided at its start, so that it goes on in the same way after a stop."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from evenkeel.errors import ConfigurationError
from evenkeel.files import why_unwritten, write_whole
from evenkeel.images.image_set import ImageSet
from evenkeel.models.black_box import BlackBox
from evenkeel.vision.fit.options import FitOptions
from evenkeel.vision.fit.size import Size

__all__ = ["PLAN", "FitPlan", "identity_of"]

PLAN = "plan.json"  # in a fit's folder


@dataclass
class FitPlan:
    """Says how large the networks are, and how long they are trained.

    Attributes:
        folder: of the fit.
        identity: what a fit that is resumed must have in common with this one.
        sizes: of each grid's network.
        epochs: of each grid's training, once they are known.
        rivals: sizes of each grid that are still to be compared; none once they are.
        compared: of each grid, what was compared, in words, and the share of held-out images on which it agreed.
    """

    folder: Path
    identity: dict[str, Any]
    sizes: dict[int, Size]
    epochs: dict[int, float] = field(default_factory=dict)
    rivals: dict[int, list[Size]] = field(default_factory=dict)
    compared: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, identity: dict[str, Any]) -> Self:
        """Reads the plan that `folder` holds.

        Raises:
            ConfigurationError: it cannot be read, or is of a fit with another identity.
        """
        path = folder / PLAN
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            sizes = {int(grid): _size(size) for grid, size in raw["sizes"].items()}
            rivals = {int(grid): [_size(each) for each in found] for grid, found in raw.get("rivals", {}).items()}
            epochs = {int(grid): float(value) for grid, value in raw["epochs"].items()}
            compared = {
                int(grid): {str(size): float(share) for size, share in found.items()}
                for grid, found in raw.get("compared", {}).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ConfigurationError(f"{path} cannot be read ({error}); give another --out") from error
        if raw.get("identity") != json.loads(json.dumps(identity)):
            raise ConfigurationError(
                f"{folder} holds the fit of another classifier, other images or other options; give the same again "
                "to go on with it, or another --out"
            )
        return cls(folder, identity, sizes, epochs, rivals, compared)

    def save(self) -> None:
        """Writes it into its folder, whole or not at all."""
        path = self.folder / PLAN
        sizes = {str(grid): asdict(size) for grid, size in self.sizes.items()}
        rivals = {str(grid): [asdict(each) for each in found] for grid, found in self.rivals.items()}
        held = {
            "identity": self.identity,
            "sizes": sizes,
            "epochs": self.epochs,
            "rivals": rivals,
            "compared": self.compared,
        }
        text = json.dumps(held, indent=2)
        try:
            write_whole(path, f"{text}\n".encode())
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {why_unwritten(error)}") from error


def _size(raw: dict[str, Any]) -> Size:
    widths = tuple(int(width) for width in raw["widths"])
    coarse, own = bool(raw.get("coarse", False)), bool(raw.get("own", False))
    return Size(widths, int(raw["side"]), coarse, own, int(raw.get("left_out", 0)))


def identity_of(classifier: BlackBox, images: ImageSet, more: ImageSet | None, options: FitOptions) -> dict[str, Any]:
    """Digests what decides a fit's outcome: the classifier, the images, the options."""
    identity: dict[str, Any] = {
        "classifier": classifier.sha256,
        "images": _digest(images),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(options).items()
            if name not in ("resume", "device", "until")  # a fit that stopped may go on until it is better
            and (options.lossy or name not in ("lossy", "jpeg_quality"))
            and (name, value) != ("weights", "auto")
        },
    }
    if classifier.height != classifier.width:
        identity["tiles"] = "squeezed"  # once they were cut out of the middle: such a fit must not go on with these
    if more is not None:
        identity["more"] = _digest(more)
    if classifier.datatype == "FP32":  # its scores depend on what is done to the pixels before
        identity["normalisation"] = asdict(classifier.normalisation)
    return identity


def _digest(images: ImageSet) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest()
