"""Defines `evenkeel device`: one device of coded training."""

import sys

import click

__all__ = ["device"]


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def device(arguments: tuple[str, ...]) -> None:
    """Run one device that keeps data and coded blocks, and trains with others."""
    from evenkeel.training.coded.device_process import main as run

    sys.exit(run(list(arguments)))
