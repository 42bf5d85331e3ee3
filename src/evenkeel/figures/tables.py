"""Rows of figures as tables for terminals; the columns and number formats are shared with the HTML report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = [
    "COLUMNS",
    "Column",
    "Row",
    "interval_text",
    "markdown",
    "measured",
    "name",
    "settings",
    "table",
    "value_text",
]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A measured figure of a row: its key, its heading, and what it is multiplied by to be shown."""

    key: str
    heading: str
    unit: str
    factor: float = 1.0


COLUMNS = (
    Column("mean_ms", "mean", "ms"),
    Column("sd_ms", "sd", "ms"),
    Column("p50_ms", "p50", "ms"),
    Column("p95_ms", "p95", "ms"),
    Column("p99_ms", "p99", "ms"),
    Column("p999_ms", "p99.9", "ms"),
    Column("extra_load", "extra load", "%", 100.0),
    Column("filled", "filled", "%", 100.0),
    Column("fill_accuracy", "fills right", "%", 100.0),
    Column("accuracy", "all right", "%", 100.0),
)
_FAILED = Column("failed", "failed", "%", 100.0)
_WIDEST_POLICY = 20
_SIDE_WIDTH = 13  # of a policy's column in a narrow table


def table(rows: Sequence[Row], columns: Sequence[Column] | None = None, key: str = "policy") -> RenderableType:
    """The rows with a column for each figure, 95 % intervals dim below; on its side where the terminal is too narrow.

    Args:
        rows: with the keys of the columns.
        columns: which figures; without, those of `records.summarise`.
        key: what names a row, and heads the column of names.
    """
    return _Fitting(rows, columns, key)


class _Fitting:
    """Chooses the layout when it is printed, since only then the width is known."""

    def __init__(self, rows: Sequence[Row], columns: Sequence[Column] | None, key: str) -> None:
        self._rows = rows
        self._key = key
        self._names = [name(row, rows, key) for row in rows]
        self._columns = measured(rows) if columns is None else columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        policies = min(max(map(len, self._names), default=0), _WIDEST_POLICY)
        figures = [max(map(cell_len, self._texts(column)), default=0) for column in self._columns]
        if policies + sum(figures) + 2 * len(figures) <= options.max_width:
            yield _wide(self._rows, self._names, self._columns, self._key)
            return
        labels = max(len(f"{column.heading} {column.unit}") for column in self._columns)
        at_once = max(1, (options.max_width - labels) // (_SIDE_WIDTH + 2))
        for first in range(0, len(self._rows), at_once):
            some = slice(first, first + at_once)
            yield _narrow(self._rows[some], self._names[some], self._columns)

    def _texts(self, column: Column) -> Iterator[str]:
        yield column.heading
        for row in self._rows:
            yield value_text(row, column)
            yield interval_text(row, column)


def measured(rows: Sequence[Row]) -> list[Column]:
    """The columns that the rows need: `failed` only when something failed."""
    return [*COLUMNS, *([_FAILED] if any(row.get("failed") for row in rows) else [])]


def name(row: Row, rows: Sequence[Row], key: str = "policy") -> str:
    """What a row is called among `rows`: its policy, and whatever else of its settings differs between them."""
    parts = [str(row[key])]
    parts += [text for key, text in settings(row).items() if len({str(other.get(key)) for other in rows}) > 1]
    return ", ".join(parts)


def settings(row: Row) -> dict[str, str]:
    """The delay, load and rate of a row as text, where they are known."""
    texts = {}
    if row.get("delay"):
        texts["delay"] = str(row["delay"])
    if row.get("load") is not None:
        texts["load"] = f"load {row['load']:g}"
    if row.get("rate_per_s") is not None:
        texts["rate_per_s"] = f"{row['rate_per_s']:.4g}/s"
    return texts


def markdown(rows: Sequence[Row], columns: Sequence[Column], key: str = "policy") -> str:
    """The rows as a Markdown table, each interval in brackets behind its figure."""
    heads = [key, *(f"{column.heading}, {column.unit}" for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * len(columns) + "|"]
    for row in rows:
        cells = [name(row, rows, key)]
        for column in columns:
            interval = interval_text(row, column)
            cells.append(value_text(row, column) + (f" ({interval})" if interval else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def value_text(row: Row, column: Column) -> str:
    """The figure, or a dash when there is none."""
    value = row.get(column.key)
    return "–" if value is None else _number(value, column)


def interval_text(row: Row, column: Column) -> str:
    """Its 95 % interval: `233–236`, `≥ 690` when the sample is too small for an upper bound, empty without any."""
    low, high = row.get(f"{column.key}_low"), row.get(f"{column.key}_high")
    if low is not None and high is not None:
        return f"{_number(low, column)}–{_number(high, column)}"
    if low is not None:
        return f"≥ {_number(low, column)}"
    return "" if high is None else f"≤ {_number(high, column)}"


def _number(value: float, column: Column) -> str:
    """Tenths of a percent or a point; milliseconds with three digits or so, but no finer than hundredths."""
    value *= column.factor
    if column.unit in ("%", "points"):
        return f"{value:.1f}"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _wide(rows: Sequence[Row], names: Sequence[str], columns: Sequence[Column], key: str) -> Table:
    result = _empty()
    result.add_column(key, max_width=_WIDEST_POLICY, overflow="fold")
    for column in columns:
        result.add_column(Text.assemble(column.heading, "\n", (column.unit, "dim")), justify="right", no_wrap=True)
    for row, policy in zip(rows, names, strict=True):
        result.add_row(policy, *(_cell(row, column) for column in columns))
    return result


def _narrow(rows: Sequence[Row], names: Sequence[str], columns: Sequence[Column]) -> Table:
    result = _empty()
    result.add_column("", no_wrap=True)
    for policy in names:
        result.add_column(policy, justify="right", width=_SIDE_WIDTH, overflow="fold")
    for column in columns:
        label = Text.assemble(column.heading, (f" {column.unit}", "dim"))
        result.add_row(label, *(_cell(row, column) for row in rows))
    return result


def _empty() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")


def _cell(row: Row, column: Column) -> Text:
    interval = interval_text(row, column)
    text = Text(value_text(row, column), justify="right")
    if interval:
        text.append(f"\n{interval}", style="dim")
    return text
