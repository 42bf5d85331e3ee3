"""Tables of every bench at 80 columns, from rows that were measured: all is there, and nothing is cut off."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from evenkeel.bench.coded import rows as coded
from evenkeel.bench.codes import rows as codes
from evenkeel.bench.fills import rows as fills
from evenkeel.bench.gradients import rows as gradients
from evenkeel.bench.serving import rows as serving
from evenkeel.figures.tables import interval_text, table, value_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def stored(name):
    return json.loads((RESULTS / name).read_text())["rows"]


def made(bench):
    if bench == "serving":
        rows = stored("2026-11-21_stragglers/demo.json")
        return [serving.page_of([row | {"load": load} for load in (0.3, 0.5, 0.75) for row in rows])]
    if bench == "codes":
        return codes.pages_of(stored("2026-11-21_codes/codes.json"))
    if bench == "coded":
        return coded.pages_of(stored("2026-11-27_coded/slow.json"))
    if bench == "fills":
        return [fills.page_of(stored("2026-11-22_tiny/fills.json"))]
    return gradients.pages_of(stored("2026-11-22_gradients/mlp_1gbit.json"), {"mlp": "images"}, 0.3)


@pytest.mark.parametrize("bench", ["serving", "codes", "coded", "fills", "gradients"])
def test_80_columns_hold_every_row_and_figure_whole(bench):
    pages = made(bench)
    assert pages
    for page in pages:
        console = Console(width=80, file=io.StringIO(), color_system=None)
        console.print(table(page))
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for column in page.columns:
            assert column.heading in text
            for row in page.rows:
                assert value_text(row, column) in text
                assert interval_text(row, column) in text
