"""Runs `evenkeel bench modeless`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from evenkeel.bench.modeless.figure import modeless
from evenkeel.bench.modeless.links import cellular_law, read_rate
from evenkeel.bench.modeless.measure import ModelessSetting, cells, measure
from evenkeel.bench.modeless.rows import notes_of, pages_of
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.images.image_set import read_images
from evenkeel.models.cards import load_card
from evenkeel.models.shipped import IMAGES, card_path

__all__ = ["ModelessArguments", "run_modeless"]


@dataclass(frozen=True)
class ModelessArguments:
    """Holds the options of `evenkeel bench modeless`; `--help` says what each one means."""

    images: Path | None
    split: str | None
    traces: tuple[str, ...]
    requests: int
    calibrations: int
    round_trip_ms: float
    payload: int
    slowdown: float
    seed: int
    outputs: Outputs


def run_modeless(arguments: ModelessArguments) -> None:
    """Runs `evenkeel bench modeless`: policies and transports, on virtual time."""
    arguments.outputs.check()
    if arguments.images is None:
        with np.load(IMAGES, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    else:
        card = load_card(card_path("cifar10-base"))
        read = read_images(arguments.images, height=card.height, width=card.width, split=arguments.split)
        if read.labels is None:
            raise ConfigurationError("images: labels are needed, and these have none")
        order = np.random.default_rng(arguments.seed).permutation(len(read))
        images, labels = read.pixels[order], read.labels[order]
    rates = tuple(read_rate(text) for text in arguments.traces) or (cellular_law(),)
    setting = ModelessSetting(
        images, labels, rates, arguments.requests, arguments.calibrations, round_trip_s=arguments.round_trip_ms / 1e3,
        payload=arguments.payload, slowdown=arguments.slowdown, seed=arguments.seed,
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
