"""Defines `evenkeel lab`: an emulated cluster on this machine."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from evenkeel.lab.processes import HostExit
    from evenkeel.lab.rate_check import RateCheck

__all__ = ["lab"]

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


@click.group()
def lab() -> None:
    """Emulate a cluster with slow links on this machine (Linux, root, iproute2)."""


@lab.command(
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog="\b\nExamples:\n"
    "  evenkeel lab run --hosts 4 --rate 100mbit -- python train.py --epochs 3\n"
    "  evenkeel lab run --hosts 2 --rate 1gbit --cpus 0-3 --json exits.json -- python train.py\n"
    "  evenkeel lab run --hosts 4 --rate 100mbit -- evenkeel plan training --parameters 11.7M",
)
@click.option(
    "--hosts",
    type=click.IntRange(1, 250),
    default=2,
    show_default=True,
    help="Number of hosts; one process runs on each.",
)
@click.option(
    "--rate",
    default="unlimited",
    show_default=True,
    metavar="RATE",
    help="Rate of each link, each way: 100mbit, 1gbit.",
)
@click.option("--delay", default="0ms", metavar="TIME", help="Delay added one way; a round trip takes twice that.")
@click.option("--loss", default="0", metavar="SHARE", help="Share of packets lost between two hosts: 0.1% or 0.001.")
@click.option(
    "--cpus", metavar="LIST", help="Processors to deal out to the hosts: 0-3,6. By default all hosts share all."
)
@click.option(
    "--master-port",
    type=click.IntRange(1, 65535),
    default=29500,
    show_default=True,
    help="Port at which the processes of a run meet.",
)
@click.option("--keep-going", is_flag=True, help="Leave the other hosts alone when one fails.")
@click.option("--no-check", is_flag=True, help="Skip measuring the link's rate first.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write exit codes and the rate to.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    hosts: int,
    rate: str,
    delay: str,
    loss: str,
    cpus: str | None,
    master_port: int,
    keep_going: bool,
    no_check: bool,
    json_path: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND on every host at the same time, with the variables that torchrun sets.

    Exit code 0 if it ended well on all, 1 if not.
    """
    from evenkeel.figures.outputs import check_outputs
    from evenkeel.lab.cluster import Lab, check_program
    from evenkeel.lab.environment import read_cpus
    from evenkeel.lab.topology import Topology
    from evenkeel.text_values import read_duration_s, read_rate_bps, read_share

    topology = Topology(
        hosts,
        rate_bps=read_rate_bps(rate, "rate"),
        delay_s=read_duration_s(delay, "delay"),
        loss=read_share(loss, "loss"),
    )
    chosen = read_cpus(cpus, sorted(os.sched_getaffinity(0))) if cpus is not None else None
    check_program(command)
    check_outputs(json=json_path)
    colours = {name: _COLOURS[rank % len(_COLOURS)] for rank, name in enumerate(topology.names)}
    width = max(map(len, topology.names))

    def write(host: str, line: str, is_error: bool) -> None:
        click.echo(click.style(f"{host:<{width}} | ", fg=colours[host]) + line, err=is_error)

    with _stopping_is_an_interrupt(), Lab(topology) as cluster:
        checked = None if no_check else cluster.check_rate()
        if checked is not None:
            click.echo(f"lab: {hosts} hosts; {checked.text()}", err=True)
            if warning := checked.warning():
                click.echo(f"lab: warning: {warning}", err=True)
        exits = cluster.run(command, write, cpus=chosen, keep_going=keep_going, port=master_port)
    if json_path is not None:
        _write(json_path, {"hosts": hosts, "rate": rate, "delay": delay, "loss": loss, "cpus": cpus}, exits, checked)
    failed = [left for left in exits if left.code]
    for left in failed:
        click.echo(f"lab: {left.text()}", err=True)
    if failed:
        sys.exit(1)


@lab.command(epilog="\b\nExamples:\n  evenkeel lab clean\n  evenkeel lab clean --all")
@click.option("--all", "everything", is_flag=True, help="Remove labs that are in use too.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the removed names to."
)
def clean(everything: bool, json_path: Path | None) -> None:
    """Remove what crashed labs left behind: their network namespaces, and every process in them."""
    from evenkeel.figures.outputs import check_outputs, write_json
    from evenkeel.lab.cluster import clean as remove

    check_outputs(json=json_path)
    removed = remove(everything=everything)
    if json_path is not None:
        write_json(json_path, {"removed": removed})
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"lab: {len(removed)} network namespaces removed", err=True)


@contextmanager
def _stopping_is_an_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind as Ctrl-C does, so that the lab is removed; hosts that run get them instead."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _write(path: Path, arguments: dict[str, Any], exits: list["HostExit"], checked: "RateCheck | None") -> None:
    from dataclasses import asdict

    from evenkeel.figures.outputs import write_json
    from evenkeel.figures.records import json_document

    rate = (
        {}
        if checked is None
        else {
            "there_bps": checked.there_bps,
            "back_bps": checked.back_bps,
            "round_trip_s": checked.round_trip_s,
        }
    )
    rows = [{"host": left.host, "rank": rank, **asdict(left), **rate} for rank, left in enumerate(exits)]
    write_json(path, json_document(arguments, rows))
