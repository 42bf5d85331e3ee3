"""Defines `evenkeel edge`: a light model beside the camera, with a data centre behind it."""

from pathlib import Path

import click

from evenkeel.cli.options import example, in_file, log_option
from evenkeel.cli.serve import run_server
from evenkeel.errors import ConfigurationError
from evenkeel.logs import LogFormat
from evenkeel.processes import end_by_signal, end_with_parent

__all__ = ["edge"]


@click.command(
    epilog=example(
        "evenkeel edge edge.yaml                         # listens on 127.0.0.1:8000",
        "curl -s localhost:8000/metrics | grep -E 'answers|backend_up|unshown'",
    )
)
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--host", help="Address to listen on; the default is loopback.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@log_option
@click.option("--parent-pid", type=int, hidden=True, help="Process with which this one ends.")
def edge(config: Path, host: str | None, port: int | None, parent_pid: int | None, log_format: LogFormat) -> None:
    """Answer beside the camera: by a light model where a certificate allows it, else by a data centre.

    CONFIG is a YAML file; docs/how-to/edge.md lists its fields. Answers come in time although the data centre is slow
    or gone: then the light model's is given, and counted.
    """
    end_by_signal()
    from evenkeel.edge.node import read_edge_config
    from evenkeel.serving.config import load_raw

    if parent_pid is not None:
        end_with_parent(parent_pid)
    raw = load_raw(config)
    flags = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        settings = read_edge_config({**raw, **flags} if isinstance(raw, dict) else raw, config.parent)
    except ConfigurationError as error:
        raise in_file(config, error) from None
    run_server(settings, log_format)
