"""Prints and writes what a command has measured or predicted."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from evenkeel.figures.drawing import save
from evenkeel.figures.outputs import Outputs, write, write_json
from evenkeel.figures.records import json_document
from evenkeel.figures.tables import Page, Row, markdown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["publish"]


def publish(
    pages: Sequence[Page],
    rows: Sequence[Row],
    arguments: Mapping[str, Any],
    outputs: Outputs,
    *,
    notes: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
    draw: Callable[[], "Figure"] | None = None,
    report: Callable[[Path], object] | None = None,
) -> None:
    """Prints the pages, then writes the files that are wanted and names each.

    Args:
        pages: the tables for people, for the terminal and for Markdown.
        rows: the figures for machines.
        arguments: what `outputs.arguments_of` gives.
        outputs: the files.
        notes: lines below the last page on the terminal.
        further: what else the document for machines holds.
        draw: draws the figure.
        report: writes the report.

    Raises:
        EvenkeelError: a file cannot be written, or there is nothing to draw.
    """
    console = Console()
    for number, page in enumerate(pages):
        if number:
            console.print()
        if page.title:
            console.print(Text(page.title, "bold"), soft_wrap=True)
        console.print(table(page))
        _say(console, *page.notes)
    _say(console, *notes)
    if outputs.json_path is not None:
        write_json(outputs.json_path, {**json_document(arguments, rows), **(further or {})})
        _say(console, f"rows: {outputs.json_path}")
    if outputs.markdown is not None:
        write(outputs.markdown, "\n".join(map(markdown, pages)).encode())
        _say(console, f"{'table' if len(pages) == 1 else 'tables'}: {outputs.markdown}")
    if outputs.report is not None and report is not None:
        report(outputs.report)
        _say(console, f"report: {outputs.report}")
    if outputs.figure is not None and draw is not None:
        save(draw(), outputs.figure)
        _say(console, f"figure: {outputs.figure}")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
