"""Defines `evenkeel schema`: the JSON Schema of configurations, with which editors complete and check them."""

import json
from pathlib import Path

import click

from evenkeel.cli.options import example
from evenkeel.errors import ConfigurationError

__all__ = ["schema"]


@click.command(
    epilog=example(
        "evenkeel schema --output evenkeel.schema.json",
        'echo "# yaml-language-server: \\$schema=evenkeel.schema.json" | cat - gateway.yaml',
        "evenkeel schema edge",
    )
)
@click.argument("command", type=click.Choice(["serve", "edge"]), default="serve")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write to.")
def schema(command: str, output: Path | None) -> None:
    """Print the JSON Schema of a configuration of `evenkeel serve` or `evenkeel edge`, for editors.

    Each field has its type, bounds, default and what it is for.
    """
    from evenkeel.edge.node import edge_json_schema
    from evenkeel.files import why_unwritten, write_whole
    from evenkeel.serving.config import SCHEMA

    made = edge_json_schema() if command == "edge" else SCHEMA.json_schema()
    text = json.dumps(made, indent=2, ensure_ascii=False)
    if output is None:
        click.echo(text)
        return
    try:
        write_whole(output, f"{text}\n".encode())
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {why_unwritten(error)}") from error
