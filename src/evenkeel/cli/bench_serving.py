"""Defines `evenkeel bench serving`: policies under the same arrivals and delays."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import access_options, example, output_options

__all__ = ["serving"]


@click.command(
    "serving",
    epilog=example(
        "evenkeel bench serving --policy none --policy collage+hedge --requests 2000 --json out.json",
        "evenkeel bench serving --policy none@10 --policy hedge@10 --policy collage+hedge --simulated",
        "evenkeel bench serving --policy collage+hedge --max-approximate 0 --max-approximate 0.05 --simulated",
        "evenkeel bench serving --url http://127.0.0.1:8000 --rate 50 --requests 500",
    ),
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Policy to compare; may be repeated. none@10 means ten replicas and no backup.",
)
@click.option(
    "--delay", default="two-mode:scale=0.3", show_default=True, metavar="LAW", help="Law by which tasks are late."
)
@click.option(
    "--load", "loads", type=float, multiple=True, help="Load as a share of the replicas' time; may be repeated."
)
@click.option("--rate", "rate_per_s", type=float, help="Requests per second, instead of a load.")
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Number of requests for each policy and load.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the arrivals and the delays."
)
@click.option(
    "--replicas", type=click.IntRange(1), default=9, show_default=True, help="Number of workers with the classifier."
)
@click.option(
    "--backups", type=click.IntRange(0), default=1, show_default=True, help="Number of workers with the Collage-CNNs."
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Number of requests that arrive together."
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="FAULT",
    help="Fault to cause in a worker: freeze:replica=3,at=5s,for=2s.",
)
@click.option(
    "--max-approximate",
    "max_approximate",
    type=float,
    multiple=True,
    metavar="SHARE",
    help="Largest share of approximate answers, 0 to 1; repeated, it gives the frontier of p99 against that share.",
)
@click.option("--url", help="Address of a running server to measure, instead of starting one.")
@access_options
@click.option("--simulated", is_flag=True, help="Run on a virtual clock with fake workers.")
@click.option(
    "--records", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep a record of every request in."
)
@output_options("json", "report", "figure")
def serving(**arguments: Any) -> None:
    """Compare policies under the same arrivals and the same delays."""
    from evenkeel.bench.serving.command import ServingArguments, run_bench

    run_bench(ServingArguments(**arguments))
