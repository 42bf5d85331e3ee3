"""Defines `evenkeel bench aggregation`: what scarce memory in a switch costs training jobs."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["aggregation"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    "aggregation",
    epilog=example(
        "evenkeel bench aggregation                         # about a minute",
        "evenkeel bench aggregation --vary load --policy esa --policy assoc --figure load.png",
        "evenkeel bench aggregation --full --json aggregation.json --figure aggregation.png",
    ),
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Policy of the switch: ps, ring, switchml, atp, atp-free, esa-preempt, esa or assoc; may be repeated.",
)
@click.option(
    "--vary",
    multiple=True,
    help="What to vary: load, regime, skew, rate, jobs, workers or loss; may be repeated.",
)
@click.option("--jobs", type=click.IntRange(1, 256), default=8, show_default=True, help="Number of training jobs.")
@click.option("--workers", type=click.IntRange(1, 32), default=8, show_default=True, help="Number of workers of a job.")
@click.option(
    "--load",
    type=click.FloatRange(0.01, 1000),
    default=4.0,
    show_default=True,
    help="Fragments that may be on their way for each slot of the switch.",
)
@click.option(
    "--skew",
    default="0.1",
    show_default=True,
    metavar="COV",
    help="Coefficient of variation of computing times over workers and steps; pai: as in Alibaba's trace.",
)
@click.option("--full", is_flag=True, help="Simulate all cells, with longer jobs.")
@click.option("--stragglers", type=_FILE, help="File (npz, array cov) of coefficients of variation to draw from.")
@click.option("--arrivals", type=_FILE, help="File (Parquet, timestamp and duration) of jobs to take arrivals from.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of all that is drawn.")
@output_options("json", "figure", "markdown")
def aggregation(**arguments: Any) -> None:
    """Simulate jobs that share a switch's memory: how late each policy makes them."""
    from evenkeel.bench.aggregation.command import AggregationArguments, run_aggregation

    run_aggregation(AggregationArguments(**arguments))
