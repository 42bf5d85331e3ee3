"""Defines `evenkeel bench modeless`: who answers, and how images cross links that lose packets."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["modeless"]


@click.command(
    "modeless",
    epilog=example(
        "evenkeel bench modeless --figure modeless.png     # about two minutes",
        "evenkeel bench modeless --trace mahimahi_cellular.npz:Verizon-LTE-short.up --json modeless.json",
        "evenkeel bench modeless --images cifar10.parquet --split test --requests 1000",
        "evenkeel bench modeless --mosaic 512              # about two minutes",
        "evenkeel bench modeless --light thin.json --full wide.json --images my.parquet --split test",
    ),
)
@click.option(
    "--light",
    type=click.Path(path_type=Path),
    help="Card or ONNX file of the light model; the shipped CIFAR-10 pair by default.",
)
@click.option(
    "--full", type=click.Path(path_type=Path), help="Card or ONNX file of the full model, which takes the same images."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Labelled images that both models take; the 400 of the shipped pair by default.",
)
@click.option("--split", help="Part of the images to read, e.g. test.")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    metavar="FILE:NAME",
    help="Rate of the cellular link: FILE.npz:ARRAY (1,500-byte deliveries in each ms) or FILE.parquet:ROW; may be "
    "repeated. A law of our own by default.",
)
@click.option(
    "--mosaic", type=click.IntRange(16, 1024), metavar="PIXELS",
    help="Send mosaics of this side, a grid of images of which the one in the middle is asked about: larger images, "
    "of some 65 packets at 512 pixels.",
)  # fmt: skip
@click.option(
    "--requests", type=click.IntRange(20), help="Number of requests of each cell; 400 by default, 60 of mosaics."
)
@click.option(
    "--calibrations",
    type=click.IntRange(2),
    default=100,
    show_default=True,
    help="Number of calibrations of each promise.",
)
@click.option(
    "--round-trip-ms", type=click.FloatRange(1), default=40.0, show_default=True, help="Round trip of the links in ms."
)
@click.option(
    "--payload", type=click.IntRange(100, 1200), help="Largest packet in bytes; 100 by default, 1200 for mosaics."
)
@click.option(
    "--slowdown", type=click.FloatRange(0.1), default=10.0, show_default=True,
    help="How much slower the computer at the edge is than the one that the models' cards were measured on.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of losses and calibrations.")
@output_options("json", "figure", "markdown")
def modeless(**arguments: Any) -> None:
    """Compare ways of modeless serving: who answers, and how images reach the data centre, on virtual time."""
    from evenkeel.bench.modeless.command import ModelessArguments, run_modeless

    run_modeless(ModelessArguments(**arguments))
