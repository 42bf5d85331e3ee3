"""Defines `evenkeel serve`: a classifier behind the gateway."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, in_file, log_option, node_options
from evenkeel.errors import ConfigurationError
from evenkeel.logs import LogFormat, log_to_stderr
from evenkeel.processes import end_by_signal, end_with_parent

__all__ = ["run_server", "serve"]


_POLICY_FLAGS = (
    "fill_after",
    "hedge_after",
    "min_confidence",
    "max_extra_load",
    "max_approximate",
    "group_wait",
    "deadline",
)


@click.command(
    epilog=example(
        "evenkeel serve                                  # the embedded CIFAR-10 pair on 127.0.0.1:8000",
        "evenkeel serve --replicas 9 --backups 1 --policy collage+hedge",
        "evenkeel serve gateway.yaml --port 9000         # flags win over the file",
        "curl -s localhost:8000/v2/models/cifar10-base",
    )
)
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", help="Model card (.json) of the classifier, or the name of a shipped one.")
@click.option("--host", help="Address to listen on; the default is loopback.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Port to listen on for gRPC; 0 takes a free one.")
@node_options
@log_option
@click.option("--parent-pid", type=int, hidden=True, help="Process with which this one ends.")
def serve(config: Path | None, parent_pid: int | None, log_format: LogFormat, **flags: Any) -> None:
    """Serve a classifier behind the gateway, over the Open Inference Protocol.

    CONFIG is a YAML file; docs/how-to/serve.md lists its fields. Without one, flags and defaults alone.
    """
    end_by_signal()
    from evenkeel.serving.config import load_raw, read_config

    if parent_pid is not None:
        end_with_parent(parent_pid)

    def read() -> Any:
        raw, folder = ({}, Path()) if config is None else (load_raw(config), config.parent)
        try:
            return read_config(_with_flags(raw, flags), folder)
        except ConfigurationError as error:
            raise in_file(config, error) from None

    run_server(read(), log_format, read, () if config is None else (config,))


def _with_flags(raw: Any, flags: dict[str, Any]) -> Any:
    """Gives the mapping of a configuration file with command-line flags laid over it."""
    if not isinstance(raw, dict):
        return raw  # refused by name when it is read
    given = {name: value for name, value in flags.items() if value is not None}
    policy = raw.get("policy", {})
    policy = {"name": policy} if isinstance(policy, str) else policy
    for name in _POLICY_FLAGS:
        if name in given and isinstance(policy, dict):
            policy = {**policy, name: given.pop(name)}
    if "policy" in given:
        policy = {**(policy if isinstance(policy, dict) else {}), "name": given.pop("policy")}
    merged = {**raw, **given}
    if policy:
        merged["policy"] = policy
    return merged


def run_server(
    settings: Any,
    log_format: LogFormat = "text",
    reread: Callable[[], Any] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Serves until a signal comes, and says on which URL; `reread` and `files` are as for `serving.service.serve`."""
    import uvloop

    from evenkeel.serving.service import serve as run
    from evenkeel.serving.trusted import exposures

    log_to_stderr(log_format)

    def started(url: str, why_not: str) -> None:
        for one in settings.each:
            nodes = f"{one.replicas.total} replicas, {one.backups.total} backups"
            name, state = one.name or one.card().name, f", NOT READY: {why_not}" if why_not else ""
            click.echo(f"evenkeel: {name} on {url} ({nodes}, {one.policy.name}){state}")
        for warning in exposures(settings):
            click.echo(f"evenkeel: WARNING: {warning}")

    uvloop.run(run(settings, started, reread=reread, files=files))
