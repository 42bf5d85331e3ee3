"""Defines `evenkeel switch up`, `down` and `stats`: the switch in the kernel."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from evenkeel.switch.deployment import Deployment

__all__ = ["down", "stats", "up"]

_name = click.option("--name", default="main", show_default=True, help="Name of the switch, where there are several.")


@click.command(
    epilog="\b\nExamples:\n"
    "  evenkeel switch up --hosts 5 --policy esa --slots 1024\n"
    "  evenkeel switch up --hosts port0=10.0.0.1,port1=10.0.0.2,port2=10.0.0.3 --policy assoc --mode generic\n"
)
@click.option(
    "--hosts",
    required=True,
    metavar="N|PORT=ADDRESS,...",
    help="Number of hosts to make, as network namespaces; or ports of a bridge with the addresses behind them.",
)
@click.option(
    "--policy",
    default="unlimited",
    show_default=True,
    metavar="NAME",
    help="Who may take which slot: unlimited, atp, atp-free, esa or assoc.",
)
@click.option("--slots", default=1024, show_default=True, help="Number of fragments that are summed at a time.")
@click.option(
    "--jobs",
    default=8,
    show_default=True,
    help="Number of jobs among which policy unlimited cuts the slots, a power of two.",
)
@click.option("--mtu", default=1500, show_default=True, help="Largest IP packet, up to 3498; the same for all jobs.")
@click.option("--port", default=9700, show_default=True, type=click.IntRange(1, 65535), help="UDP port of the servers.")
@click.option(
    "--mode",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "native", "generic"]),
    help="How XDP runs. Lanes of 4 bits (THC) need generic; auto is native where the ports can.",
)
@_name
def up(hosts: str, policy: str, slots: int, jobs: int, mtu: int, port: int, mode: str, name: str) -> None:
    """Put a switch into this machine's kernel (Linux, root, clang, libbpf).

    It adds for the jobs of each `evenkeel switch ps` behind one of its ports, and lets all else pass
    (docs/how-to/switch.md). `evenkeel switch run` is the same switch in user space and needs none of this.
    """
    from evenkeel.switch.aggregator import Rule, SlotPolicy
    from evenkeel.switch.deployment import read_ports, up as make
    from evenkeel.switch.packet import words_for_mtu

    chosen = SlotPolicy.of(policy)
    regions = {"regions": jobs} if chosen == SlotPolicy.UNLIMITED else {}
    rule = Rule.of(chosen, slots, words=words_for_mtu(mtu), **regions)
    made = make(read_ports(hosts), rule, port, mtu=mtu, mode=mode, name=name)
    click.echo(
        f"switch {made.name}: {made.rule.policy.text}, {slots} slots, {made.mode} XDP on {len(made.ports)} ports"
    )
    for each in made.ports:
        click.echo(f"  {each.interface}  {each.address}" + (f"  ip netns exec {each.host} ..." if each.host else ""))


@click.command(epilog="\b\nExamples:\n  evenkeel switch down\n  evenkeel switch down --all")
@_name
@click.option("--all", "everything", is_flag=True, help="Take all switches away.")
def down(name: str, everything: bool) -> None:
    """Take a switch out of the kernel, with the hosts that were made for it."""
    from evenkeel.switch.deployment import down as remove, names

    for each in names() if everything else [name]:
        gone = remove(each)
        click.echo(f"switch {each} was not up" if gone is None else f"switch {each} is gone")


@click.command(epilog="\b\nExamples:\n  evenkeel switch stats\n  evenkeel switch stats --watch --json s.json")
@_name
@click.option("--watch", is_flag=True, help="Print what has changed, every second, until Ctrl-C.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the counts to."
)
def stats(name: str, watch: bool, json_path: Path | None) -> None:
    """Print what a switch in the kernel has counted: packets by what came of them, slots in use, jobs."""
    from evenkeel.errors import ConfigurationError
    from evenkeel.figures.outputs import check_outputs, write_json
    from evenkeel.figures.records import json_document
    from evenkeel.switch.deployment import find_deployment, names

    check_outputs(json=json_path)
    found = find_deployment(name)
    if found is None:
        there = ", ".join(names())
        raise ConfigurationError(f"switch {name} is not up" + (f"; there are: {there}" if there else ""))
    row = _row(found)
    _print(row)
    if json_path is not None:
        write_json(json_path, json_document({"name": name}, [row]))
    try:
        while watch:
            time.sleep(1.0)
            before, row = row, _row(found)
            if row != before:
                _print(row)
    except KeyboardInterrupt:
        return


def _row(found: "Deployment") -> dict[str, Any]:
    maps = found.open()
    try:
        counts = {what.name.lower(): count for what, count in maps.counts.items()}
        return {
            "switch": found.name,
            "policy": found.rule.policy.text,
            "mode": found.mode,
            "slots": found.rule.sets * found.rule.ways,
            "slots_in_use": len(maps.slots),
            "jobs": len(maps.jobs),
            **counts,
        }
    finally:
        maps.close()


def _print(row: dict[str, Any]) -> None:
    click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
