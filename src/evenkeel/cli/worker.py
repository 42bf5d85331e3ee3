"""Defines `evenkeel worker`: one worker that a gateway reaches by address."""

import sys

import click

__all__ = ["worker"]


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def worker(arguments: tuple[str, ...]) -> None:
    """Run one worker that a gateway reaches by address."""
    from evenkeel.backends.worker.main import main as run

    sys.exit(run(list(arguments)))
