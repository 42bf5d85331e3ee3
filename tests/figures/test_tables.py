import io

import pytest
from rich.console import Console

from evenkeel.figures.records import RequestRecord, summarise
from evenkeel.figures.tables import COLUMNS, Column, interval_text, markdown, name, table, value_text

POLICIES = ("none", "replicate", "hedge", "collage", "collage+hedge")


def row(policy, load=0.5, failed=False, count=1200):
    requests = [
        RequestRecord(
            n,
            0.0,
            0.0,
            0.1 + n * 1e-4,
            503 if failed and n == 0 else 200,
            "collage" if n % 20 == 0 else "exact",
            0.9,
            1,
            1,
        )
        for n in range(count)
    ]
    return summarise(
        requests, policy=policy, delay="two-mode", load=load, rate_per_s=30.0, extra_tasks=60, primary_tasks=count
    )


def printed(rows, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table(rows))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 119, 120, 200])
def test_every_figure_and_interval_is_shown_whole_at_any_width(width):
    rows = [row(policy) for policy in POLICIES]
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for policy in POLICIES:
        assert policy in text
    for column in COLUMNS:
        assert text.count(value_text(rows[0], column)) >= len(POLICIES)
        assert text.count(interval_text(rows[0], column)) >= len(POLICIES)


def test_120_columns_hold_one_line_a_policy():
    lines = printed([row(policy) for policy in POLICIES], 120).splitlines()
    assert lines[0].split() == [
        "mean",
        "sd",
        "p50",
        "p95",
        "p99",
        "p99.9",
        "extra",
        "load",
        "filled",
        "fills",
        "right",
        "all",
        "right",
    ]
    assert len([line for line in lines if line.startswith(POLICIES)]) == 5
    assert len(lines) == 2 + 1 + 2 * 5


def test_failures_get_a_column_only_when_there_are_any():
    assert "failed" not in printed([row("none")], 120)
    assert "failed" in printed([row("none", failed=True)], 140)


def test_rows_are_named_by_what_differs():
    rows = [row("none", 0.3), row("none", 0.5)]
    assert [name(each, rows) for each in rows] == ["none, load 0.3", "none, load 0.5"]
    assert name(rows[0], rows[:1]) == "none"


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


def test_no_rows_are_no_error():
    assert "policy" in printed([], 120)


def test_other_rows_bring_their_own_columns_and_name():
    rows = [{"method": "collage", "drop": -0.0286, "cost": 0.523}, {"method": "parity", "drop": 0.1, "cost": None}]
    columns = [Column("drop", "drop", "points", 100.0), Column("cost", "cost", "passes")]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table(rows, columns, "method"))
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ["method", "points", "passes"]
    assert [line.split() for line in lines[3:]] == [["collage", "-2.9", "0.52"], ["parity", "10.0", "–"]]


def test_a_page_has_intervals_in_brackets():
    rows = [{"method": "collage", "right": 0.864, "right_low": 0.857, "right_high": 0.871}]
    assert markdown(rows, [Column("right", "right", "%", 100.0)], "method").splitlines() == [
        "| method | right, % |",
        "| --- | ---: |",
        "| collage | 86.4 (85.7–87.1) |",
    ]
