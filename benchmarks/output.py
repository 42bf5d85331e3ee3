"""What benchmarks show and write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from evenkeel.records import json_document

__all__ = ["show", "write_json"]

Rows = Sequence[Mapping[str, Any]]


def show(title: str, rows: Rows, columns: Mapping[str, tuple[str, str]]) -> None:
    """Print rows as a table; `columns` gives each key its heading and its number format. What is missing is blank."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading, form in columns.values():
        table.add_column(heading, justify="right" if form else "left")
    for row in rows:
        values = [(row.get(key), form) for key, (_, form) in columns.items()]
        table.add_row(*("" if value is None else format(value, form) for value, form in values))
    Console().print(table)


def write_json(path: Path | None, arguments: Mapping[str, Any], rows: Rows) -> None:
    """Write the rows and the machine they were measured on to `path`, if there is one."""
    if path is not None:
        path.write_text(json.dumps(json_document(arguments, rows), indent=2) + "\n", encoding="utf-8")
        click.echo(f"rows: {path}")
