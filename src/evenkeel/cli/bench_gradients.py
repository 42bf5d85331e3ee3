"""Defines `evenkeel bench gradients`: trainings with compressed gradients."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["gradients"]


@click.command(
    "gradients",
    epilog=example(
        "evenkeel bench gradients                        # three minutes: an MLP on made-up images, at 100 Mbit/s",
        "evenkeel bench gradients --mnist train-images-idx3-ubyte.gz --rates 100mbit,1gbit --seeds 3 --records out/",
        "evenkeel bench gradients --tasks convnet --cifar cifar10.parquet --methods thc:bits=2,gradiveq:ratio=2+thc",
        "evenkeel bench gradients --rates unlimited --methods fp32,bf16,thc,pipe+thc --json rows.json",
    ),
)
@click.option(
    "--tasks", default="mlp", show_default=True, metavar="TASK,TASK", help="Tasks to train: mlp, convnet, transformer."
)
@click.option(
    "--methods",
    metavar="METHOD,METHOD",
    help="Methods to compare: fp32, bf16, powersgd:rank=4, thc, lowrank:rank=16+thc:block=512, thc@switch, ...",
)
@click.option(
    "--rates",
    metavar="RATE,RATE",
    help="Rates of the links: 100mbit, 1gbit (both need root), unlimited. The default is 100mbit for root.",
)
@click.option(
    "--workers", type=click.IntRange(2, 64), default=4, show_default=True, help="Number of workers that train together."
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of seeds: 0, 1, 2, ...")
@click.option(
    "--steps", type=click.IntRange(2), help="Number of training steps; the default is smaller on made-up data."
)
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), help="Number of passes over the images, instead of steps."
)
@click.option("--batch", type=click.IntRange(1), help="Number of examples per step and worker.")
@click.option(
    "--evaluations",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Number of times that test accuracy is measured.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.3,
    show_default=True,
    help="Points below fp32's accuracy at which the target lies.",
)
@click.option(
    "--mnist", type=click.Path(path_type=Path), help="Images for mlp (IDX, npz, ...); by default they are made up."
)
@click.option(
    "--cifar",
    type=click.Path(path_type=Path),
    help="Images for convnet (Parquet, npz, ...); by default they are made up.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text for transformer; the default is the source of Python's own library.",
)
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=900,
    show_default=True,
    help="Longest time for one training, in seconds.",
)
@click.option("--loss", default="0", metavar="SHARE", help="Share of packets that each link loses, such as 1%.")
@click.option(
    "--slow",
    default="",
    metavar="FACTOR:SHARE[:all]",
    help="The last worker, or each one, computes so many times as slowly in a share of the steps: 5:0.1.",
)
@click.option(
    "--records",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to keep finished trainings in; a later call continues there.",
)
@output_options("json", "figure", "markdown")
def gradients(**arguments: Any) -> None:
    """Compare ways to average gradients: time to accuracy, bytes, and what encoding costs, on real trainings."""
    from evenkeel.bench.gradients.command import GradientsArguments, run_gradients

    run_gradients(GradientsArguments(**arguments))
