import io

import pytest
from rich.console import Console

from evenkeel.figures.tables import Column, Page, interval_text, markdown, table, value_text

METHOD = Column("method", "method")


def printed(page, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table(page))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("measured", "value", "interval"),
    [
        ({"x": 702.4, "x_low": 690.1, "x_high": 711.9}, "702", "690–712"),
        ({"x": 42.04, "x_low": 9.99, "x_high": 99.96}, "42.0", "9.99–100"),
        ({"x": 0.284, "x_low": 0.28, "x_high": None}, "0.28", "≥ 0.28"),
        ({"x": 1.0, "x_low": None, "x_high": 2.0}, "1.00", "≤ 2.00"),
        ({"x": None}, "–", ""),
        ({"x": 5.0, "x_low": None, "x_high": None}, "5.00", ""),
    ],
)
def test_numbers_are_short(measured, value, interval):
    column = Column("x", "x", "ms")
    assert (value_text(measured, column), interval_text(measured, column)) == (value, interval)


def test_shares_are_percent():
    column = Column("x", "x", "%", 100.0)
    measured = {"x": 0.8786, "x_low": 0.0004, "x_high": 1.0}
    assert (value_text(measured, column), interval_text(measured, column)) == ("87.9", "0.0–100.0")


def test_other_rows_bring_their_own_columns_and_name():
    rows = [{"method": "collage", "drop": -0.0286, "cost": 0.523}, {"method": "parity", "drop": 0.1, "cost": None}]
    columns = [Column("drop", "drop", "points", 100.0), Column("cost", "cost", "passes")]
    lines = printed(Page(rows, [METHOD], columns)).splitlines()
    assert lines[1].split() == ["method", "points", "passes"]
    assert [line.split() for line in lines[3:]] == [["collage", "-2.9", "0.52"], ["parity", "10.0", "–"]]


def test_a_page_has_intervals_in_brackets():
    rows = [{"method": "collage", "right": 0.864, "right_low": 0.857, "right_high": 0.871}]
    page = Page(rows, [METHOD], [Column("right", "right", "%", 100.0)], "At rest", ["a note"])
    assert markdown(page).splitlines() == [
        "**At rest**",
        "",
        "| method | right, % |",
        "| --- | ---: |",
        "| collage | 86.4 (85.7–87.1) |",
        "",
        "a note",
    ]


def test_a_relative_interval_stands_behind_its_figure():
    column = Column("error", "NMSE", relative=True)
    rows = [{"method": "thc", "error": 0.010812, "error_high": 0.01103}, {"method": "fp32", "error": 0.0}]
    lines = printed(Page(rows, [METHOD], [column])).splitlines()
    assert [line.split() for line in lines[2:]] == [["thc", "0.0108", "±2%"], ["fp32", "0"]]
    assert "| thc | 0.0108 ±2% |" in markdown(Page(rows, [METHOD], [column]))


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_columns_that_do_not_fit_become_further_tables_with_the_names_of_the_rows(width):
    places = range(1, 8)
    rows = [{"method": f"method{row}", **{f"x{place}": 1000 * place + row for place in places}} for row in range(3)]
    columns = [Column(f"x{place}", f"head{place}", "ms", apart=place == 5) for place in places]
    lines = printed(Page(rows, [METHOD], columns), width).splitlines()
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines if "head" in line]
    assert [head for line in heads for head in line] == [f"head{place}" for place in places], "in their order"
    for row in rows:
        shown = [line.split() for line in lines if line.startswith(row["method"])]
        assert len(shown) == len(heads), "one line of each row in each table"
        assert [text for line in shown for text in line[1:]] == [str(value) for value in list(row.values())[1:]]
    if len(heads) > 1:
        assert ["head5"] in [line[:1] for line in heads], "cut where a column says so"


def test_a_long_name_is_folded_and_nothing_of_it_is_lost():
    rows = [{"method": "thc:bits=4,granularity=30,p=1/32,rounding=correlated", "x": 1.0}]
    text = printed(Page(rows, [METHOD], [Column("x", "x" * 40, "ms")]), 70)
    assert "…" not in text
    assert "".join(line.split()[0] for line in text.splitlines()[3:]) == rows[0]["method"]
