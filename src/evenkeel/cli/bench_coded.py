"""Defines `evenkeel bench coded`: training on devices that are slow, away or gone."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["coded"]


@click.command(
    "coded",
    epilog=example(
        "evenkeel bench coded                            # about a minute",
        "evenkeel bench coded --data a9a.svm.xz --data w8a.svm.xz --bias random,biased --figure coded.png",
        "evenkeel bench coded --data train-images-idx3-ubyte.gz --positive 8 --absence .05,.1,.2 --json coded.json",
    ),
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of examples: LIBSVM text, npz, or IDX images with their labels beside; may be repeated.",
)
@click.option("--positive", type=float, help="Label of one class against all others, where there are more than two.")
@click.option(
    "--samples",
    default="3000",
    show_default=True,
    metavar="NUMBER",
    help="Rows of the set that is made without --data.",
)
@click.option("--features", default="2500", show_default=True, metavar="NUMBER", help="Columns of that set.")
@click.option(
    "--code",
    "codes",
    multiple=True,
    metavar="CODE",
    help="Scheme to measure; may be repeated: wait, drop, balanced:copies=3, mds:extra=7, replication:groups=6.",
)
@click.option("--devices", type=click.IntRange(2, 200), default=20, show_default=True, help="Devices that hold data.")
@click.option("--rounds", type=click.IntRange(1), default=60, show_default=True, help="Rounds of training.")
@click.option(
    "--absence", default="0.05", show_default=True, metavar="Q[,Q...]", help="Probability of a device to be away."
)
@click.option(
    "--bias",
    default="random,biased",
    show_default=True,
    metavar="WORD[,...]",
    help="Who is away: random; biased, those of one class in 80 % of the rounds; permanent, three leave for good.",
)
@click.option(
    "--slowness",
    default="persistent,per-task",
    show_default=True,
    metavar="WORD[,...]",
    help="Whether a device is slow in a whole round, or each task is drawn.",
)
@click.option(
    "--delay",
    default="two-mode:slow-share=0.1,sigma=0.05",
    show_default=True,
    metavar="LAW",
    help="Law of task times; how many times its median a draw is counts.",
)
@click.option("--rate", default="unlimited", show_default=True, help="Rate of each device's link: 20mbit.")
@click.option("--latency", default="0ms", show_default=True, metavar="TIME", help="Latency of a task and its reply.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all draws.")
@output_options("json", "figure", "markdown")
def coded(**arguments: Any) -> None:
    """Compare ways to train on devices that are slow, away or gone.

    Waiting, dropping, hedged replication, gradient coding and codes over data partitions train a logistic regression
    on the same virtual devices: time and bytes of a round, objective and accuracy.
    """
    from evenkeel.bench.coded.command import CodedArguments, run_coded

    run_coded(CodedArguments(**arguments))
