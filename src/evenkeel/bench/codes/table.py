"""Rows of `evenkeel bench codes` as tables: one for each distribution and number of workers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["markdown", "tables"]

Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A line for each code, a column of errors for each correlation; 95 % intervals as a share of the figure."""
    for title, heads, lines in _pages(rows):
        page = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for place, head in enumerate(heads):
            page.add_column(head, justify="left" if place < 2 else "right", overflow="fold", no_wrap=place > 0)
        for line in lines:
            texts = [Text(cell) for cell in line[:3]]
            for cell in line[3:]:
                figure, _, interval = cell.partition(" ")
                texts.append(Text.assemble(figure, (f" {interval}", "dim")) if interval else Text(figure))
            page.add_row(*texts)
        yield page


def markdown(rows: Sequence[Row]) -> str:
    """The same tables for a page."""
    parts = []
    for title, heads, lines in _pages(rows):
        parts += [f"**{title}**", "", "| " + " | ".join(heads) + " |"]
        parts += ["| --- | --- " + "| ---: " * (len(heads) - 2) + "|"]
        parts += ["| " + " | ".join(line) + " |" for line in lines]
        parts += [""]
    return "\n".join(parts)


def _pages(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    for (distribution, workers), group in groupby(rows, lambda row: (row["distribution"], row["workers"])):
        some = list(group)
        correlations = list(dict.fromkeys(row["correlation"] for row in some))
        by_code: dict[str, dict[float | None, Row]] = {}
        for row in some:
            by_code.setdefault(row["code"], {})[row["correlation"]] = row
        lines = []
        for code, found in by_code.items():
            any_row = next(iter(found.values()))
            errors = [_error(found.get(correlation)) for correlation in correlations]
            lines.append([code, any_row["topology"], f"{any_row['bits_per_coordinate']:.2f}", *errors])
        heads = ["code", "way", "bits", *("NMSE" if c is None else f"NMSE, ρ={c:.2g}" for c in correlations)]
        yield f"{distribution}, {workers} worker{'s' if workers > 1 else ''}", heads, lines


def _error(row: Row | None) -> str:
    """`0.0108 ±2%`."""
    if row is None or row["nmse"] is None:
        return "–"
    value, high = row["nmse"], row["nmse_high"]
    if high is None or not value > 0:
        return f"{value:.3g}"
    return f"{value:.3g} ±{100 * (high - value) / value:.0f}%"
