"""Defines `evenkeel plan coding`: which code for training on devices that leave."""

from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["coding"]


@click.command(
    "coding",
    epilog=example(
        "evenkeel plan coding --devices 20 --absence .1 --success .99 --rounds 300",
        "evenkeel plan coding --samples 32561 --features 123 --density .11 --room 2 --figure coding.png",
    ),
)
@click.option("--devices", type=int, default=20, show_default=True, help="Number of devices that hold data.")
@click.option(
    "--absence", type=float, default=0.1, show_default=True, help="Probability of each device to be away in a round."
)
@click.option(
    "--success", type=float, default=0.99, show_default=True, help="Least probability of a round to be exact."
)
@click.option("--rounds", type=int, default=300, show_default=True, help="Number of rounds of training.")
@click.option("--samples", default="6000", show_default=True, metavar="NUMBER", help="Rows of data, on all devices.")
@click.option("--features", default="5000", show_default=True, metavar="NUMBER", help="Columns of data.")
@click.option("--density", type=float, default=1.0, show_default=True, help="Share of the data's numbers not zero.")
@click.option("--room", type=float, help="Largest number of partitions' worth that a device can keep.")
@output_options("json", "markdown", "figure")
def coding(**arguments: Any) -> None:
    """Compare codes for training on devices that leave, and say which one to use.

    Codes of every kind are made as small as they can be while a round is still exact with the wanted probability. Each
    one's bytes to set up and for all rounds, storage, computing and conditioning stand beside those of hedged
    replication.
    """
    from evenkeel.training.plan.coding_command import CodingArguments, run_plan_coding

    run_plan_coding(CodingArguments(**arguments))
