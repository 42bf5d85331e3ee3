"""Assembles the command line from one file a command.

Exit codes: 0 done, 1 the work failed, 2 the command line or a configuration is wrong.
"""

import sys
from typing import Any, NoReturn

import click

from evenkeel.cli.bench_aggregation import aggregation
from evenkeel.cli.bench_coded import coded
from evenkeel.cli.bench_codes import codes
from evenkeel.cli.bench_fills import fills
from evenkeel.cli.bench_gradients import gradients
from evenkeel.cli.bench_modeless import modeless
from evenkeel.cli.bench_serving import serving
from evenkeel.cli.certify import certify
from evenkeel.cli.check import check
from evenkeel.cli.demo import demo
from evenkeel.cli.device import device
from evenkeel.cli.edge import edge
from evenkeel.cli.fit import fit
from evenkeel.cli.lab import lab
from evenkeel.cli.manage import fleet, reload, resize, restart
from evenkeel.cli.plan_coding import coding
from evenkeel.cli.plan_serving import serving as serving_plan
from evenkeel.cli.plan_training import training
from evenkeel.cli.schema import schema
from evenkeel.cli.serve import serve
from evenkeel.cli.switch import switch
from evenkeel.cli.worker import worker
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.version import __version__

__all__ = ["main"]


class _Commands(click.Group):
    """Turns our own errors into one line and an exit code, for every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            _stop(error, 2)
        except EvenkeelError as error:
            _stop(error, 1)


def _stop(error: Exception, code: int) -> NoReturn:
    click.echo(f"evenkeel: {error}", err=True)
    sys.exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="evenkeel")
def main() -> None:
    """Answers on time although a machine is slow."""


@main.group()
def plan() -> None:
    """Predict what a change would gain."""


@main.group()
def bench() -> None:
    """Measure policies, fills, codes, gradients, aggregation, coded training and modeless serving."""


for command in (
    demo,
    serve,
    check,
    schema,
    reload,
    restart,
    resize,
    fleet,
    edge,
    worker,
    device,
    fit,
    certify,
    lab,
    switch,
):
    main.add_command(command)
for command in (serving, fills, codes, gradients, aggregation, coded, modeless):
    bench.add_command(command)
plan.add_command(serving_plan)
plan.add_command(training)
plan.add_command(coding)
