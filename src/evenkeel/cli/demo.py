"""Defines `evenkeel demo`: five policies on real workers and real images."""

from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["demo"]


@click.command(epilog=example("evenkeel demo", "evenkeel demo --report report.html --json rows.json"))
@click.option(
    "--seconds", type=click.FloatRange(2), default=11, show_default=True, help="Seconds of traffic for each policy."
)
@click.option("--load", type=float, default=0.4, show_default=True, help="Load as a share of the replicas' time.")
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the arrivals and the delays."
)
@output_options("report", "json", "figure")
def demo(**arguments: Any) -> None:
    """Nine replicas, one backup, real images: five policies compared in a minute and a half."""
    from evenkeel.bench.serving.command import DemoArguments, run_demo

    run_demo(DemoArguments(**arguments))
