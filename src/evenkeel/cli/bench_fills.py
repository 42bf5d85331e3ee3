"""Defines `evenkeel bench fills`: what backups answer when replicas are late."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["fills"]


@click.command(
    "fills",
    epilog=example(
        "evenkeel bench fills                            # the shipped models on the shipped images",
        "evenkeel bench fills --images cifar10.parquet --split test --partial --json fills.json --figure fills.png",
        "evenkeel bench fills --classifier base.json --images test/ --collage 3x3.json \\",
        "  --parity-sum k=2:sum2.json --parity-concat k=4:concat4.json --cheap small.json:9 --berrut 4,8,9",
    ),
)
@click.option(
    "--classifier",
    default="cifar10-base",
    show_default=True,
    help="Classifier to measure beside: a card, an ONNX file or a shipped name.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Images to ask about: folder, Parquet, npz or IDX; the default is the shipped 400.",
)
@click.option("--split", help="Part of the images to read, e.g. test; all for every part.")
@click.option(
    "--labels", default="auto", show_default=True, help="Column, array or file that holds the labels, or none."
)
@click.option("--limit", type=click.IntRange(1), help="Largest number of images to read.")
@click.option("--collage", "collages", multiple=True, metavar="CARD", help="Card of a Collage-CNN; may be repeated.")
@click.option(
    "--detector", "detectors", multiple=True, metavar="CARD", help="Card of the paper's detector; may be repeated."
)
@click.option(
    "--parity-sum",
    "parity_sums",
    multiple=True,
    metavar="[k=K:]CARD",
    help="Card of a parity model (ParM) with the sum encoder; may be repeated.",
)
@click.option(
    "--parity-concat",
    "parity_concats",
    multiple=True,
    metavar="[k=K:]CARD",
    help="Card of a parity model (ParM) with concatenation; may be repeated.",
)
@click.option(
    "--cheap",
    "cheaps",
    multiple=True,
    metavar="CARD:N",
    help="Card of a small classifier that runs on N items as a backup.",
)
@click.option("--berrut", metavar="K,K", help="Sizes of groups for ApproxIFER with one spare: 4,8,9.")
@click.option(
    "--shuffles",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of times that every image is sent.",
)
@click.option("--partial", is_flag=True, help="Measure groups of 1 to N items too.")
@click.option("--same-class", is_flag=True, help="Measure groups of one class too, as an ablation.")
@click.option(
    "--rounds", type=click.IntRange(0), default=100, show_default=True, help="Number of rounds of timing; 0 skips it."
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the shuffles.")
@output_options("json", "figure", "markdown")
def fills(**arguments: Any) -> None:
    """Compare what backups answer when replicas are late: accuracy of fills, cost, calibration."""
    from evenkeel.bench.fills.command import FillsArguments, run_fills

    run_fills(FillsArguments(**arguments))
