"""Holds the options that several commands share."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from evenkeel.errors import ConfigurationError
from evenkeel.logs import FORMATS

__all__ = ["access_options", "example", "in_file", "log_option", "node_options", "output_options"]

CommandFunction = Callable[..., Any]

_NODE_OPTIONS = (
    click.option("--replicas", type=click.IntRange(1), help="Number of workers to start with the classifier."),
    click.option("--backups", type=click.IntRange(0), help="Number of workers to start with the Collage-CNNs."),
    click.option(
        "--policy",
        help="What to do about late replicas: none, replicate, replicate-all, hedge, collage or collage+hedge.",
    ),
    click.option(
        "--fill-after",
        metavar="WHEN",
        help="Time after which a fill may answer: auto (learned), p95 (a live quantile) or 25ms.",
    ),
    click.option(
        "--hedge-after",
        metavar="WHEN",
        help="Time after which the item goes to another replica as well: auto (learned), p95 or 25ms.",
    ),
    click.option("--min-confidence", type=float, help="Lowest confidence (0..1) at which a fill is used."),
    click.option("--max-extra-load", type=float, help="Largest number of hedges, as a share of all items."),
    click.option(
        "--max-approximate", type=float, help="Largest number of approximate answers, as a share of all items."
    ),
    click.option(
        "--group-wait", metavar="TIME", help="Time that an idle backup waits for more items before it starts."
    ),
    click.option(
        "--deadline", metavar="TIME", help="Longest time an item may take; after that it is answered with 504."
    ),
    click.option(
        "--delay", metavar="LAW", help="Delay injected into the workers, for experiments: two-mode:scale=0.3."
    ),
)

_FILE = click.Path(dir_okay=False, path_type=Path)
_OUTPUT_OPTIONS = {
    "json": click.option("--json", "json_path", type=_FILE, help="File to write the rows to, as JSON."),
    "markdown": click.option("--markdown", type=_FILE, help="File to write the tables to, as Markdown."),
    "report": click.option("--report", type=_FILE, help="File to write an HTML report to."),
    "figure": click.option("--figure", type=_FILE, help="File to draw a figure to (PNG or SVG)."),
}


log_option = click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Form of the log on stderr, in which one line is one record.",
)


def access_options(function: CommandFunction) -> CommandFunction:
    """Adds the options that say how a server is asked that lets only some clients in."""
    for option in (
        click.option("--ca", type=_FILE, help="Authorities (PEM) of the server's certificate, if not the system's."),
        click.option("--key-file", type=_FILE, help="File with the key that the server wants of its clients."),
    ):
        function = option(function)
    return function


def example(*lines: str) -> str:
    """Gives an epilog with examples that click does not wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def in_file(path: Path | None, error: ConfigurationError) -> ConfigurationError:
    """Gives an error with the name of the file before each of its lines."""
    return ConfigurationError("\n".join(f"{path}: {line}" if path else line for line in str(error).splitlines()))


def node_options(function: CommandFunction) -> CommandFunction:
    """Adds the options that say what serves, and by which policy."""
    for option in reversed(_NODE_OPTIONS):
        function = option(function)
    return function


def output_options(*names: str) -> Callable[[CommandFunction], CommandFunction]:
    """Adds the options for the files that a command can write, and gives them to it as one `Outputs`, `outputs`.

    Args:
        names: of the options: `json`, `markdown`, `report`, `figure`.
    """

    def decorate(function: CommandFunction) -> CommandFunction:
        @wraps(function)
        def with_outputs(**given: Any) -> Any:
            from evenkeel.figures.outputs import Outputs

            paths = {each.name: given.pop(each.name) for each in fields(Outputs) if each.name in given}
            return function(outputs=Outputs(**paths), **given)

        decorated: CommandFunction = with_outputs
        for name in reversed(names):
            decorated = _OUTPUT_OPTIONS[name](decorated)
        return decorated

    return decorate
