"""Shows rows of figures as tables: for terminals of any width, and as Markdown.

A row stays one row. Where a terminal is too narrow for all columns, they are cut into several tables, one below the
other, each with the names of the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "Page", "Row", "interval_text", "markdown", "table", "value_text"]

Row = Mapping[str, Any]

_WIDEST_LABEL = 20  # letters of a row's name that stay on one line while there is too little room
_GAPS = (2, 1)  # between columns: usually, and where there is too little room


@dataclass(frozen=True)
class Column:
    """Says how a figure of a row is shown.

    Attributes:
        key: of the row; its interval has the keys `<key>_low` and `<key>_high`.
        heading: of the column.
        unit: below the heading.
        factor: by which the value is multiplied to be shown.
        apart: whether a table of its own may begin here, where all columns are too wide for the terminal.
        relative: whether the value has three digits, and behind it half its interval as a share of it.
    """

    key: str
    heading: str
    unit: str = ""
    factor: float = 1.0
    apart: bool = False
    relative: bool = False


@dataclass(frozen=True)
class Page:
    """Holds one table with what stands around it.

    Attributes:
        rows: its lines.
        labels: the columns that name a row.
        columns: the figures.
        title: stands above; none if empty.
        notes: stand below.
    """

    rows: Sequence[Row]
    labels: Sequence[Column]
    columns: Sequence[Column]
    title: str = ""
    notes: Sequence[str] = ()


def table(page: Page) -> RenderableType:
    """Gives the rows with a column for each figure, 95 % intervals dim below, as tables that fit the terminal."""
    return _Fitting(page)


def markdown(page: Page) -> str:
    """Gives the page as Markdown, each interval in brackets behind its figure."""
    heads = [f"{column.heading}, {column.unit}" if column.unit else column.heading for column in _all(page)]
    lines = [f"**{page.title}**\n"] if page.title else []
    lines += ["| " + " | ".join(heads) + " |"]
    lines += ["| " + " | ".join(["---"] * len(page.labels) + ["---:"] * len(page.columns)) + " |"]
    for row in page.rows:
        cells = []
        for column in _all(page):
            value, interval = value_text(row, column), interval_text(row, column)
            shown = interval if column.relative else f"({interval})"
            cells.append(f"{value} {shown}" if interval else value)
        lines.append("| " + " | ".join(cells) + " |")
    if page.notes:
        lines += ["", *page.notes]
    return "\n".join(lines) + "\n"


def value_text(row: Row, column: Column) -> str:
    """Gives the figure, or a dash when there is none."""
    value = row.get(column.key)
    if value is None:
        return "–"
    return value if isinstance(value, str) else _number(value, column)


def interval_text(row: Row, column: Column) -> str:
    """Gives its 95 % interval: `233–236`, `≥ 690` when the sample is too small for an upper bound, empty without any.

    Relative ones are `±2%`.
    """
    low, high = row.get(f"{column.key}_low"), row.get(f"{column.key}_high")
    if column.relative:
        value = row.get(column.key)
        return f"±{100 * (high - value) / value:.0f}%" if high is not None and value and value > 0 else ""
    if low is not None and high is not None:
        return f"{_number(low, column)}–{_number(high, column)}"
    if low is not None:
        return f"≥ {_number(low, column)}"
    return "" if high is None else f"≤ {_number(high, column)}"


class _Fitting:
    """Cuts the columns when it is printed, since only then the width is known."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(_cut(self._page, options.max_width)):
            if number:
                yield ""
            yield _fitted(self._page, columns, options.max_width)


def _cut(page: Page, width: int) -> list[Sequence[Column]]:
    """Cuts the columns into as few tables as the width allows, where a column says `apart`, else into equal parts."""
    if any(_needed(page, page.columns, gap) <= width for gap in _GAPS):
        return [page.columns]
    starts = [0, *(place for place, column in enumerate(page.columns) if column.apart and place), len(page.columns)]
    parts = []
    for first, last in pairwise(starts):
        group = page.columns[first:last]
        for count in range(1, len(group) + 1):
            size = ceil(len(group) / count)
            some = [group[place : place + size] for place in range(0, len(group), size)]
            if size == 1 or all(_needed(page, columns, min(_GAPS)) <= width for columns in some):
                break
        parts += some
    return parts


def _needed(page: Page, columns: Sequence[Column], gap: int) -> int:
    """Gives the width of a table in which a name of usual length stays on one line."""
    sizes = [min(_width(page, label), _WIDEST_LABEL) for label in page.labels]
    sizes += [_width(page, column) for column in columns]
    return sum(sizes) + gap * (len(sizes) - 1)


def _fitted(page: Page, columns: Sequence[Column], width: int) -> Table:
    gap = next((gap for gap in _GAPS if _needed(page, columns, gap) <= width), min(_GAPS))
    result = Table(
        box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    # What is left of the width goes to the first name.
    widest = [min(_width(page, label), _WIDEST_LABEL) for label in page.labels]
    widest[0] += max(0, width - _needed(page, columns, gap))
    for label, letters in zip(page.labels, widest, strict=True):
        result.add_column(_head(label), max_width=letters, overflow="fold")
    for column in columns:
        result.add_column(_head(column), justify="right", no_wrap=True)
    for row in page.rows:
        result.add_row(
            *(Text(value_text(row, label)) for label in page.labels), *(_cell(row, column) for column in columns)
        )
    return result


def _head(column: Column) -> Text:
    return Text.assemble(column.heading, ("\n" + column.unit, "dim")) if column.unit else Text(column.heading)


def _cell(row: Row, column: Column) -> Text:
    interval = interval_text(row, column)
    text = Text(value_text(row, column), justify="right")
    if interval:
        text.append(f"{' ' if column.relative else chr(10)}{interval}", style="dim")
    return text


def _width(page: Page, column: Column) -> int:
    """Gives how many letters a column needs."""
    texts = [column.heading, column.unit]
    texts += [line for row in page.rows for line in _cell(row, column).plain.split("\n")]
    return max(map(cell_len, texts))


def _all(page: Page) -> list[Column]:
    return [*page.labels, *page.columns]


def _number(value: float, column: Column) -> str:
    """Writes tenths of a percent or a point; milliseconds with three digits or so, but no finer than hundredths."""
    value *= column.factor
    if column.relative:
        return f"{value:.3g}"
    if column.unit in ("%", "points"):
        return f"{value:.1f}"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
