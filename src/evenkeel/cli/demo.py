"""Defines `evenkeel demo`: five policies on real workers and real images."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["demo"]


@click.group(
    invoke_without_command=True,
    epilog=example(
        "evenkeel demo",
        "evenkeel demo --report report.html --json rows.json",
        "evenkeel demo --classifier fitted/model.json --images photos/   # with your own model",
        "evenkeel demo edge --figure edge.png            # a light model beside the camera",
    ),
)
@click.option(
    "--seconds", type=click.FloatRange(2), default=11, show_default=True, help="Seconds of traffic for each policy."
)
@click.option("--load", type=float, default=0.4, show_default=True, help="Load as a share of the replicas' time.")
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the arrivals and the delays."
)
@click.option(
    "--classifier",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Card of your own classifier, in the folder that `evenkeel fit` wrote; the default is the shipped model.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Images to send to it, as those of `evenkeel fit`.")
@click.option("--split", help="Part of the images to send, e.g. test.")
@output_options("report", "json", "figure")
@click.pass_context
def demo(context: click.Context, /, **arguments: Any) -> None:
    """Nine replicas, one backup, real images: five policies compared in a minute and a half."""
    if context.invoked_subcommand is not None:
        return
    from evenkeel.bench.serving.command import DemoArguments, run_demo

    run_demo(DemoArguments(**arguments))


@demo.command(epilog=example("evenkeel demo edge", "evenkeel demo edge --loss 0.3 --delay 60 --figure edge.png"))
@click.option(
    "--images", type=click.IntRange(40, 100_000), default=400, show_default=True, help="Images for each contender."
)
@click.option("--rate", type=click.FloatRange(1, 1000), default=25, show_default=True, help="Images a second.")
@click.option("--loss", type=float, default=0.1, show_default=True, help="Share of the packets that the link loses.")
@click.option("--delay", type=float, default=20, show_default=True, help="Milliseconds of the link, one way.")
@click.option("--deadline", type=float, default=300, show_default=True, help="Milliseconds that an answer may take.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the images and the loss.")
@output_options("json", "markdown", "figure")
def edge(**arguments: Any) -> None:
    """A light model here, a full one behind a lossy link: a promise of accuracy kept at a tenth of the cost."""
    from evenkeel.edge.demo import EdgeDemoArguments, run_edge_demo

    run_edge_demo(EdgeDemoArguments(**arguments))
