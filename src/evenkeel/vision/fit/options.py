"""Holds the options of a fit, and who looks on."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch

from evenkeel.errors import ConfigurationError

__all__ = ["Advance", "FitOptions", "Silent", "Watcher", "Weights"]

Weights = Literal["auto", "fresh", "classifier"]


class Advance(Protocol):
    """Moves a stage on by the number of parts that are done, perhaps with a note on how it goes."""

    def __call__(self, done: int, /, note: str = "") -> None:
        """Moves it on."""


class Watcher(Protocol):
    """Shows how a fit goes."""

    def say(self, line: str) -> None:
        """Shows one line of news."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Shows a stage with `total` parts; call what it gives with the number of parts that are done."""


class Silent:
    """Shows nothing."""

    def say(self, line: str) -> None:
        """Shows nothing."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Shows nothing."""
        return nullcontext(_nothing)


def _nothing(done: int, /, note: str = "") -> None:
    pass


@dataclass(frozen=True)
class FitOptions:
    """Holds the options of a fit.

    Attributes:
        grids: of the Collage-CNNs, each with 2 to 8 tiles along one side; 1 is a light classifier of whole images.
        cost: of one pass over a collage, or over an image for grid 1, in passes of the classifier, at most.
        weights: that a network begins with: "fresh" ones, those of the "classifier" at the resolution of a tile, or
            "auto": whichever agrees more after a short training, where the cost allows both.
        precision: of the convolutions in the file, "int8" or "fp32"; training is in floating point.
        shared: one network reads every grid: the largest that the first grid can afford.
        epochs: passes over the images; None: as many as `minutes` allow.
        minutes: of training for each network, on this machine as it is now.
        until: share of held-out images, above 0 and at most 1, on which a network has to agree with the classifier for
            its training to stop before its time; None: it never does.
        views: of each image, scored by the classifier.
        reach: pixels by which a view is moved at most; None: a tenth of the image's side.
        mirror: whether views are also mirrored left to right.
        rate: of learning, at the start; see `FitRecipe`. None: its default.
        tiles: in a step of training. None: `FitRecipe`'s, fewer where the images are few.
        lossy: largest share of its blocks that a view loses, as on a link that loses packets; 0: views are whole.
        jpeg_quality: of views that a link is to carry.
        start: an earlier fit of a network of the same size, whose weights to start from: its output folder.
        held_out: images that are not trained on, but calibrate the confidence; None: a twentieth, 200 to 2,000.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        resume: go on with what the output folder holds.
    """

    grids: tuple[int, ...] = (3,)
    cost: float = 0.6
    weights: Weights = "auto"
    precision: str = "int8"
    shared: bool = False
    epochs: float | None = None
    minutes: float = 60.0
    until: float | None = None
    views: int = 4
    reach: int | None = None
    mirror: bool = True
    rate: float | None = None
    tiles: int | None = None
    lossy: float = 0.0
    jpeg_quality: int = 90
    start: Path | None = None
    held_out: int | None = None
    device: str = "auto"
    threads: int = 1
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be done."""
        if not self.grids or len(set(self.grids)) < len(self.grids) or not all(1 <= grid <= 8 for grid in self.grids):
            raise ConfigurationError(f"grid: expected different numbers from 1 to 8, found {list(self.grids)}")
        for name in ("cost", "minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name}: must be a number above zero, found {getattr(self, name)}")
        if self.weights not in get_args(Weights):
            raise ConfigurationError(f"weights: must be auto, fresh or classifier, found {self.weights!r}")
        if self.weights == "classifier" and self.start is not None:
            raise ConfigurationError("start: its weights would replace the classifier's; leave one of the two away")
        if self.precision not in ("int8", "fp32"):
            raise ConfigurationError(f"precision: must be int8 or fp32, found {self.precision!r}")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ConfigurationError(f"epochs: must be a number above zero, found {self.epochs}")
        if self.until is not None and not 0 < self.until <= 1:
            raise ConfigurationError(f"until: must be a share above 0 and at most 1, such as 0.9, found {self.until}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ConfigurationError(f"rate: must be above 0 and at most 1, found {self.rate}")
        if self.tiles is not None and not 16 <= self.tiles <= 10_000:
            raise ConfigurationError(f"tiles: must be from 16 to 10000, found {self.tiles}")
        if not 0 <= self.lossy <= 0.95:
            raise ConfigurationError(f"lossy: must be from 0 to 0.95, found {self.lossy}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigurationError(f"jpeg-quality: must be from 1 to 100, found {self.jpeg_quality}")
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
        """Gives the device that trains the networks."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device
