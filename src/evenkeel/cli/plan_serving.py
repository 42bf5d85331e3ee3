"""Defines `evenkeel plan serving`: what fills and hedges would gain."""

from typing import Any

import click

from evenkeel.cli.options import access_options, example, output_options

__all__ = ["serving"]


@click.command(
    "serving",
    epilog=example(
        "evenkeel plan serving latencies.csv --column duration_ms --replicas 9 --load .5",
        "evenkeel plan serving http://localhost:9090/metrics --column request_duration_seconds",
        "evenkeel plan serving --delay two-mode:slow-share=.1 --max-approximate .05",
    ),
)
@click.argument("latencies", required=False)
@click.option("--delay", metavar="LAW", help="Law of service times instead of recorded ones: two-mode, pareto.")
@click.option("--column", default="", metavar="NAME", help="Column of the table, or name of the histogram.")
@click.option("--unit", default="", help="Unit of the values (s, ms, us), where their name does not end in it.")
@access_options
@click.option("--replicas", type=int, default=9, show_default=True, help="Number of replicas.")
@click.option("--load", type=float, default=0.5, show_default=True, help="Share of the replicas' time that is used.")
@click.option("--backups", type=int, multiple=True, help="Number of backups to try, by default 1 and 2.")
@click.option(
    "--costs",
    type=(float, float, float),
    default=(1.0, 0.6, 0.6),
    show_default=True,
    metavar="A B C",
    help="Cost of a backup's pass with 1, up to 4 and up to 9 items, in passes of a replica.",
)
@click.option("--agreement", type=float, default=0.9, show_default=True, help="Share of fills with the right label.")
@click.option(
    "--max-approximate", type=float, default=1.0, show_default=True, help="Largest share of approximate answers."
)
@click.option("--requests", type=int, default=20_000, show_default=True, help="Number of simulated requests.")
@output_options("json", "markdown")
def serving(**arguments: Any) -> None:
    """Predict what hedges and coded backups would gain for your service, from its own service times.

    LATENCIES are service times of single requests, without queueing: a CSV, Parquet, NumPy or text file, or a histogram
    in Prometheus's format, in a file or at a server's address.
    """
    from evenkeel.bench.serving.plan_command import ServingPlanArguments, run_plan_serving

    run_plan_serving(ServingPlanArguments(**arguments))
