"""What benchmarks show and write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from evenkeel.figures.records import json_document

__all__ = ["show", "write_json"]

Rows = Sequence[Mapping[str, Any]]


def show(title: str, rows: Rows, columns: Mapping[str, tuple[str, str]]) -> None:
    """Print rows as a table; `columns` gives each key its heading and its number format. What is missing is blank."""
    lines = [[heading for heading, _ in columns.values()]]
    for row in rows:
        values = [(row.get(key), form) for key, (_, form) in columns.items()]
        lines.append(["" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [bool(form) for _, form in columns.values()]
    click.echo(f"\n{title}")
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        click.echo("  ".join(f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell, width, right in cells))
    click.echo()


def write_json(path: Path | None, arguments: Mapping[str, Any], rows: Rows) -> None:
    """Write the rows and the machine they were measured on to `path`, if there is one."""
    if path is not None:
        path.write_text(json.dumps(json_document(arguments, rows), indent=2) + "\n", encoding="utf-8")
        click.echo(f"rows: {path}")
