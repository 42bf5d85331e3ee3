"""Runs `evenkeel bench modeless`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from evenkeel.arrays import Array, PixelArray
from evenkeel.bench.modeless.figure import modeless
from evenkeel.bench.modeless.links import cellular_law, read_rate
from evenkeel.bench.modeless.measure import ModelessSetting, cells, measure
from evenkeel.bench.modeless.rows import notes_of, pages_of
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.images.image_set import read_images
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import class_difference
from evenkeel.models.shipped import IMAGES

__all__ = ["ModelessArguments", "run_modeless"]

_LIGHT, _FULL = "cifar10-light", "cifar10-base"


@dataclass(frozen=True)
class _Usual:
    """Says how what is sent is sent, where nothing else is asked for."""

    requests: int
    payload: int
    quality: int
    per_s: float


_OF_IMAGES = _Usual(400, 100, 90, 10.0)
_OF_MOSAICS = _Usual(60, 1200, 60, 0.5)  # 75 kB, a sixth of a second of a cellular link


@dataclass(frozen=True)
class ModelessArguments:
    """Holds the options of `evenkeel bench modeless`; `--help` says what each one means."""

    light: Path | None
    full: Path | None
    images: Path | None
    split: str | None
    traces: tuple[str, ...]
    mosaic: int | None
    requests: int | None
    calibrations: int
    round_trip_ms: float
    payload: int | None
    slowdown: float
    seed: int
    outputs: Outputs


def run_modeless(arguments: ModelessArguments) -> None:
    """Runs `evenkeel bench modeless`: policies and transports, on virtual time."""
    arguments.outputs.check()
    if arguments.mosaic and arguments.outputs.figure is not None:
        raise ConfigurationError("figure: none is drawn of mosaics; leave out --figure or --mosaic")
    light, accurate = _models(arguments)
    images, labels = _images(arguments, accurate)
    rates = tuple(read_rate(text) for text in arguments.traces) or (cellular_law(),)
    usual = _OF_MOSAICS if arguments.mosaic else _OF_IMAGES
    setting = ModelessSetting(
        light, accurate, images, labels, rates, arguments.requests or usual.requests, arguments.calibrations,
        round_trip_s=arguments.round_trip_ms / 1e3, payload=arguments.payload or usual.payload, quality=usual.quality,
        per_s=usual.per_s, slowdown=arguments.slowdown, seed=arguments.seed, collages=arguments.light is None,
        mosaic=arguments.mosaic or 0,
    )  # fmt: skip
    with bars(Console(stderr=True), 24) as progress:
        task = progress.add_task("modeless", total=cells(setting))
        rows = measure(setting, lambda what: progress.update(task, advance=1, description=what[:24]))
        progress.update(task, description="modeless")
    publish(
        pages_of(rows),
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=notes_of(rows),
        draw=lambda: modeless(rows),
    )


def _models(arguments: ModelessArguments) -> tuple[BlackBox, BlackBox]:
    if (arguments.light is None) != (arguments.full is None):
        raise ConfigurationError("light and full: give both models, or neither for the shipped ones")
    if arguments.light is None or arguments.full is None:
        return BlackBox.open(_LIGHT), BlackBox.open(_FULL)
    if arguments.images is None:
        raise ConfigurationError("images: those that --light and --full take are needed; the shipped ones are CIFAR-10")
    light, accurate = BlackBox.open(arguments.light), BlackBox.open(arguments.full)
    if (light.height, light.width) != (accurate.height, accurate.width):
        raise ConfigurationError(
            f"light: takes images of {light.width} x {light.height} pixels, and full takes "
            f"{accurate.width} x {accurate.height}; both must take the same"
        )
    if light.classes != accurate.classes:
        raise ConfigurationError(f"light: tells {light.classes} classes apart, and full {accurate.classes}")
    if light.class_names is not None and accurate.class_names is not None:
        difference = class_difference(light.class_names, accurate.class_names)
        if difference:
            raise ConfigurationError(f"light: its classes are not those of full: {difference}")
    return light, accurate


def _images(arguments: ModelessArguments, accurate: BlackBox) -> tuple[PixelArray, Array]:
    if arguments.images is None:
        with np.load(IMAGES, allow_pickle=False) as file:
            return file["images"], file["labels"]
    read = read_images(
        arguments.images, height=accurate.height, width=accurate.width, split=arguments.split,
        interpolation=accurate.interpolation,
    )  # fmt: skip
    if read.labels is None:
        raise ConfigurationError("images: labels are needed, and these have none")
    order = np.random.default_rng(arguments.seed).permutation(len(read))
    return read.pixels[order], read.labels[order]
