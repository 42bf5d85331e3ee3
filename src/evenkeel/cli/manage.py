"""Defines `evenkeel reload`, `restart`, `resize` and `fleet`: changes of a server that runs on this machine."""

from typing import Any

import click

from evenkeel.cli.options import example

__all__ = ["fleet", "reload", "resize", "restart"]

_pid = click.option("--pid", type=int, help="Process id of the server; needed where several of yours run.")


def _ask(pid: int | None, method: str, target: str, fields: dict[str, Any] | None = None) -> Any:
    from evenkeel.serving.control import ask, find_socket

    return ask(find_socket(pid), method, target, fields)


@click.command(epilog=example("evenkeel reload", "evenkeel reload --model cifar10-base      # also if nothing changed"))
@_pid
@click.option("--model", help="Load this model, also if nothing of it changed or it was unloaded.")
def reload(pid: int | None, model: str | None) -> None:
    """Have a server read its configuration again, and load the models that changed, without losing a request."""
    from urllib.parse import quote

    if model is not None:
        _ask(pid, "POST", f"/v2/repository/models/{quote(model, safe='')}/load")
        click.echo(f"loaded: {model}")
    else:
        report = _ask(pid, "POST", "/v2/fleet/reload")
        loaded = ", ".join(report["loaded"])
        click.echo(f"loaded: {loaded}" if loaded else "no model has changed")
        if report["need_restart"]:
            click.echo(f"changed too, but only a restart of the server uses it: {', '.join(report['need_restart'])}")


@click.command(epilog=example("evenkeel restart", "evenkeel restart --at-once 3"))
@_pid
@click.option(
    "--at-once", type=click.IntRange(1, 1024), default=1, show_default=True, help="Workers replaced at a time."
)
def restart(pid: int | None, at_once: int) -> None:
    """Replace all workers of a server by fresh ones, each after its successor has joined."""
    _ask(pid, "POST", "/v2/fleet/restart", {"at_once": at_once})
    click.echo("all workers are new")


@click.command(epilog=example("evenkeel resize --replicas 18", "evenkeel resize --model m --replicas 4 --backups 1"))
@_pid
@click.option("--model", help="The model; needed where the server has several.")
@click.option("--replicas", type=click.IntRange(0, 1024), help="Replicas that the server runs itself.")
@click.option("--backups", type=click.IntRange(0, 1024), help="Backups that the server runs itself.")
def resize(pid: int | None, **wanted: Any) -> None:
    """Start or end workers of a server until there are so many; those that leave finish what they have."""
    _ask(pid, "POST", "/v2/fleet/resize", {name: value for name, value in wanted.items() if value is not None})
    click.echo("done")


@click.command(epilog=example("evenkeel fleet"))
@_pid
def fleet(pid: int | None) -> None:
    """List the nodes of a server on this machine."""
    for model, nodes in _ask(pid, "GET", "/v2/fleet").items():
        for node in nodes:
            state = f"{node['tasks']} tasks" if node["ready"] else "not ready"
            click.echo(f"{model}  {node['name']}  {'own' if node['own'] else 'elsewhere'}  {state}")
