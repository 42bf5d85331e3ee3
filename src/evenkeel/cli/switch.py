"""Defines `evenkeel switch`: servers that add packets in user space, and the switch in the kernel."""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from evenkeel.cli.switch_kernel import down, stats, up

if TYPE_CHECKING:
    from evenkeel.switch.aggregator import Rule

__all__ = ["switch"]

_SERVER_OPTIONS = (
    click.option(
        "--bind",
        default="127.0.0.1:9700",
        show_default=True,
        metavar="HOST:PORT",
        help="Address to serve. Whoever reaches it can add: leave it on loopback or a network of your own.",
    ),
    click.option("--loss-in", default="0", metavar="SHARE", help="Share of incoming packets to lose on purpose: 1%."),
    click.option("--loss-out", default="0", metavar="SHARE", help="Share of outgoing sums to lose on purpose: 1%."),
    click.option("--seed", default=0, show_default=True, help="Seed of the losses."),
    click.option("--stats", is_flag=True, help="Print what was counted, every second."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)


@click.group()
def switch() -> None:
    """Add gradients in the network."""


for _command in (up, down, stats):
    switch.add_command(_command)


def _server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SERVER_OPTIONS):
        function = option(function)
    return function


@switch.command(
    epilog="\b\nExamples:\n"
    "  evenkeel switch run\n"
    "  evenkeel switch run --bind 10.0.0.1:9700 --stats\n"
    "  evenkeel switch run --loss-in 5% --loss-out 5% --seed 1"
)
@click.option(
    "--policy",
    default="unlimited",
    show_default=True,
    help="Who may take which slot: unlimited, atp, atp-free, switchml, esa or assoc.",
)
@click.option("--slots", default=1 << 15, show_default=True, help="Number of slots, a power of two.")
@_server_options
def run(policy: str, slots: int, **options: Any) -> None:
    """Add packets in user space: the switch that needs no root. Ends on Ctrl-C.

    Ranks use it by evenkeel.SwitchReducer("HOST:PORT"). Memory is not scarce here; --policy and
    --slots show what a switch does that has little.
    """
    from evenkeel.switch.aggregator import Rule, SlotPolicy

    chosen = SlotPolicy.of(policy)
    regions = min(slots, 16) if chosen in (SlotPolicy.UNLIMITED, SlotPolicy.SWITCHML) else 1
    if chosen == SlotPolicy.ASSOC:
        rule = Rule(chosen, sets=max(1, slots // 4), ways=4, tombs=max(1, 4 * slots))
    else:
        rule = Rule(chosen, sets=slots, regions=regions)
    _serve(rule=rule, **options)


@switch.command(
    epilog="\b\nExamples:\n"
    "  evenkeel switch ps --bind 10.0.0.1:9700 --stats\n"
    "  ip netns exec evenkeel-switch-main-host4 evenkeel switch ps --bind 10.78.0.5:9700"
)
@click.option(
    "--alone",
    is_flag=True,
    help="Add alone, also behind a port of a switch in this machine's kernel.",
)
@_server_options
def ps(*, alone: bool, **options: Any) -> None:
    """Complete what a switch passes on: a parameter server. Ends on Ctrl-C.

    Behind a port of a switch in this machine's kernel (evenkeel switch up) it lets its jobs into that switch. Anywhere
    else it adds alone, and several may share the fragments: evenkeel.SwitchReducer(["HOST:PORT", "HOST:PORT"]). It may
    be killed and started again.
    """
    _serve(rule=None, in_kernel=not alone, **options)


def _serve(
    *,
    rule: "Rule | None",
    bind: str,
    loss_in: str,
    loss_out: str,
    seed: int,
    stats: bool,
    quiet: bool,
    in_kernel: bool = False,
) -> None:
    from evenkeel.switch.host import resolve
    from evenkeel.switch.registrar import Registrar, switch_of
    from evenkeel.switch.server import SwitchServer
    from evenkeel.text_values import read_share

    host, port = resolve(bind)
    deployment = switch_of(host) if in_kernel else None
    registrar = None if deployment is None else Registrar(deployment, (host, port), click.echo)
    server = SwitchServer(
        host,
        port,
        rule=rule,
        loss_in=read_share(loss_in, "loss-in"),
        loss_out=read_share(loss_out, "loss-out"),
        seed=seed,
        registrar=registrar,
    )
    if not quiet:
        behind = "" if deployment is None else f" behind switch {deployment.name}"
        click.echo("serving at {}:{}".format(*server.address) + behind)
    before: dict[str, int] = {}
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: jobs leave the switch
    try:
        while True:
            server.serve(1.0)
            counted = server.counters()
            if stats and counted != before:
                click.echo("  ".join(f"{name} {value}" for name, value in counted.items() if value))
            before = counted
    except KeyboardInterrupt:
        if quiet:
            return
        click.echo("  ".join(f"{name} {value}" for name, value in server.counters().items() if value) or "no packets")
    finally:
        signal.signal(signal.SIGTERM, ended)
        server.close()
