"""Defines `evenkeel bench codes`: the error of codes of gradients against their bits."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["codes"]


@click.command(
    "codes",
    epilog=example(
        "evenkeel bench codes                            # about half a minute",
        "evenkeel bench codes --code thc --code eden:bits=4 --workers 2,4,8 --correlation 0,.5,.95 --figure codes.png",
        "evenkeel bench codes --gradients mlp.npz --gradients convnet.npz --json codes.json",
    ),
)
@click.option(
    "--code",
    "codes",
    multiple=True,
    metavar="CODE",
    help="Code to measure; may be repeated: thc:bits=4,rounding=nearest, lowrank:rank=16+thc:block=512.",
)
@click.option(
    "--workers",
    default="8",
    show_default=True,
    metavar="N[,N...]",
    help="Number of workers whose vectors are averaged.",
)
@click.option(
    "--correlation",
    default="0,0.5",
    show_default=True,
    metavar="C[,C...]",
    help="Correlation between the workers' vectors, 0 to 1.",
)
@click.option(
    "--distribution",
    metavar="LAW[,LAW...]",
    help="Law that vectors are made by: gaussian, lognormal-1, lognormal-2, sparse, one-hot, low-rank.",
)
@click.option(
    "--length", type=click.IntRange(1024), default=32768, show_default=True, help="Length of the vectors that are made."
)
@click.option(
    "--gradients",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of gradients recorded by benchmarks/record_gradients.py; may be repeated.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of rounds over which errors are averaged.",
)
@output_options("json", "figure", "markdown")
def codes(**arguments: Any) -> None:
    """Compare codes of gradients: error of the mean against the bits that it takes."""
    from evenkeel.bench.codes.command import CodesArguments, run_codes

    run_codes(CodesArguments(**arguments))
