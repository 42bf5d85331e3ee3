"""Defines `evenkeel plan training`: what a code or a schedule would gain."""

from typing import Any

import click

from evenkeel.cli.options import output_options

__all__ = ["training"]


@click.command(
    epilog="\b\nExamples:\n"
    "  evenkeel plan training --workers 4 --rate 100mbit --parameters 11.7M --forward 30ms --backward 60ms\n"
    "  evenkeel lab run --hosts 4 --rate 100mbit -- \\\n"
    "    evenkeel plan training --parameters 11.7M --forward 30ms --backward 60ms\n"
    "  torchrun --nnodes 4 ... --no-python evenkeel plan training --parameters 11.7M --forward 30ms --backward 60ms"
)
@click.option(
    "--parameters", required=True, metavar="NUMBER", help="Number of parameters that the workers share: 11.7M."
)
@click.option("--forward", required=True, metavar="TIME", help="Time of one worker's forward pass: 30ms.")
@click.option("--backward", required=True, metavar="TIME", help="Time of its backward pass, without communication.")
@click.option("--update", default="0ms", metavar="TIME", help="Time of its optimiser's step.")
@click.option(
    "--segments", type=click.IntRange(1), help="Number of DDP's buckets; the default is what DDP's defaults make."
)
@click.option(
    "--rate", metavar="RATE", help="Assumed rate of each link, each way: 100mbit. Without it the link is measured."
)
@click.option("--workers", type=click.IntRange(2), help="Assumed number of workers; goes with --rate.")
@click.option("--latency", default="0.1ms", show_default=True, metavar="TIME", help="Assumed latency of one message.")
@click.option(
    "--sync", default="0ms", show_default=True, metavar="TIME", help="Assumed time until all workers have met."
)
@click.option("--adding", type=float, default=0.2, show_default=True, help="Assumed nanoseconds to add a byte.")
@click.option(
    "--matrix", "matrices", multiple=True, metavar="[N*]MxK", help="Shape of a weight, for PowerSGD: 4*512x4608."
)
@click.option("--convolutions", metavar="NUMBER", help="Number of parameters in convolutions, for GradiVeQ: 11.1M.")
@click.option(
    "--code-times",
    "code_times",
    multiple=True,
    metavar="CODE=E,D",
    help="Nanoseconds per parameter to encode and to decode: thc=6,5.",
)
@click.option(
    "--backend",
    type=click.Choice(["gloo", "nccl"]),
    default="gloo",
    show_default=True,
    help="Backend of torch.distributed that measures the link.",
)
@click.option("--budget", default="8s", show_default=True, metavar="TIME", help="Longest time to measure the link.")
@output_options("json")
def training(**arguments: Any) -> None:
    """Predict the step time of every code under every schedule, and say what to use, if anything.

    Under torchrun or `evenkeel lab run` the link is measured on the group itself; with --rate it is assumed.
    """
    from evenkeel.training.plan.command import PlanArguments, run_plan

    run_plan(PlanArguments(**arguments))
