"""Rows of `bench serving`: their keys, what they tell, and how they read at any width."""

import io
import json

import pytest
from rich.console import Console

from evenkeel.bench.serving.rows import count_sources, measured, name, page_of, summarise
from evenkeel.figures.estimates import share
from evenkeel.figures.records import RequestRecord
from evenkeel.figures.tables import interval_text, table, value_text

POLICIES = ("none", "replicate", "hedge", "collage", "collage+hedge")
KEYS = [
    *("policy", "delay", "load", "rate_per_s", "requests", "mean_ms", "sd_ms", "p50_ms", "p95_ms", "p99_ms", "p999_ms"),
    *("extra_load", "filled", "fill_accuracy", "accuracy", "failed"),
]
SETTINGS = {"policy", "delay", "load", "rate_per_s", "requests"}


def request(number=0, latency_s=0.1, late_by_s=0.0, status=200, **others):
    intended_s = 0.01 * number
    return RequestRecord(number, intended_s, intended_s + late_by_s, intended_s + latency_s, status, **others)


def summary(requests, extra_tasks=0, primary_tasks=None):
    return summarise(
        requests,
        policy="collage",
        delay="two-mode",
        load=0.5,
        rate_per_s=30.0,
        extra_tasks=extra_tasks,
        primary_tasks=len(requests) if primary_tasks is None else primary_tasks,
    )


def test_a_row_has_exactly_the_fixed_keys():
    row = summary([request(number) for number in range(10)])
    measured = [key for key in KEYS if key not in SETTINGS]
    assert set(row) == set(KEYS) | {f"{key}{side}" for key in measured for side in ("_low", "_high")}
    assert [key for key in row if not key.endswith(("_low", "_high"))] == KEYS


def test_a_row_tells_what_happened():
    requests = [
        request(number, latency_s=0.001 * (number + 1), source="exact", label=1, truth=1) for number in range(400)
    ]
    for number in range(400, 500):  # fills: 80 right, 20 wrong
        requests.append(request(number, latency_s=0.5, source="collage", label=int(number < 480), truth=1))
    requests += [request(500, latency_s=9.0, status=503, error="full"), request(501, latency_s=9.0, status=0)]
    row = summary(requests, extra_tasks=50, primary_tasks=500)
    assert (row["policy"], row["delay"], row["load"], row["rate_per_s"]) == ("collage", "two-mode", 0.5, 30.0)
    assert row["requests"] == 502
    assert row["p50_ms"] == pytest.approx(250.0)
    assert row["p99_ms"] == pytest.approx(500.0), "what failed has no latency"
    assert row["mean_ms"] == pytest.approx((400 * 200.5 + 100 * 500) / 500)
    assert row["filled"] == 0.2
    assert row["fill_accuracy"] == 0.8
    assert row["accuracy"] == 480 / 500
    assert row["failed"] == pytest.approx(2 / 502)
    assert row["extra_load"] == 0.1
    assert (row["filled_low"], row["filled_high"]) == (share(100, 500).low, share(100, 500).high)
    assert row["mean_ms_low"] < row["mean_ms"] < row["mean_ms_high"]
    assert row["p999_ms_high"] is None, "500 requests cannot bound a p99.9"


@pytest.mark.parametrize(
    ("source", "is_fill"),
    [("exact", 0), ("hedge", 0), ("default", 0), ("collage", 1), ("decoded", 1), ("edge", 1)],
)
def test_a_fill_is_an_answer_from_a_spare(source, is_fill):
    assert summary([request(source=source)])["filled"] == is_fill


def test_unknown_figures_are_null():
    row = summary([request(status=500)])
    for key in ("mean_ms", "sd_ms", "p50_ms", "p999_ms", "filled", "fill_accuracy", "accuracy"):
        assert row[key] is None, key
    assert row["failed"] == 1.0
    assert summary([request()])["accuracy"] is None, "no truth, no accuracy"
    assert summary([])["failed"] is None
    json.dumps(row, allow_nan=False)


def test_sources_are_counted():
    requests = [request(source="exact"), request(source="exact"), request(source="collage"), request(status=504)]
    assert count_sources(requests) == {"exact": 2, "collage": 1, "failed": 1}


def run(policy, load=0.5, failed=False, count=1200):
    requests = [
        request(
            number,
            0.1 + number * 1e-4,
            status=503 if failed and number == 0 else 200,
            source="collage" if number % 20 == 0 else "exact",
            label=1,
            truth=1,
        )
        for number in range(count)
    ]
    return summarise(
        requests, policy=policy, delay="two-mode", load=load, rate_per_s=60 * load, extra_tasks=60, primary_tasks=count
    )


def printed(rows, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table(page_of(rows)))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 119, 120, 200])
@pytest.mark.parametrize("loads", [(0.5,), (0.3, 0.5, 0.75)])
def test_every_figure_and_interval_is_shown_whole_at_any_width(width, loads):
    rows = [run(policy, load) for load in loads for policy in POLICIES]
    text = printed(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for column in measured(rows):
        assert text.count(value_text(rows[0], column)) >= len(rows)
        assert text.count(interval_text(rows[0], column)) >= len(rows)


def test_at_80_columns_a_policy_and_load_is_one_line_of_latency_and_one_of_the_rest():
    rows = [run(policy, load) for load in (0.3, 0.5, 0.75) for policy in POLICIES]
    lines = printed(rows, 80).splitlines()
    heads = [line.split() for line in lines if "mean" in line or "filled" in line or line.startswith("policy")]
    assert heads == [
        ["mean", "sd", "p50", "p95", "p99", "p99.9"],
        ["policy", "load", *6 * ["ms"]],
        ["extra", "load", "filled", "fills", "right", "all", "right"],
        ["policy", "load", *4 * ["%"]],
    ]
    named = [line.split()[:2] for line in lines if line.startswith(POLICIES)]
    assert named == 2 * [[policy, load] for load in ("0.30", "0.50", "0.75") for policy in POLICIES]


def test_120_columns_hold_one_line_a_policy():
    lines = printed([run(policy) for policy in POLICIES], 120).splitlines()
    assert lines[0].split()[:6] == ["mean", "sd", "p50", "p95", "p99", "p99.9"]
    assert len([line for line in lines if line.startswith(POLICIES)]) == 5
    assert len(lines) == 2 + 1 + 2 * 5


def test_failures_get_a_column_only_when_there_are_any():
    assert "failed" not in printed([run("none")], 120)
    assert "failed" in printed([run("none", failed=True)], 140)


def test_rows_are_named_by_what_differs():
    rows = [run("none", 0.3), run("none", 0.5)]
    assert [name(each, rows) for each in rows] == ["none, load 0.3, 18/s", "none, load 0.5, 30/s"]
    assert name(rows[0], rows[:1]) == "none"
    assert [label.key for label in page_of(rows).labels] == ["policy", "load"], "a load says the rate"
    at_rates = [row | {"load": None} for row in rows]
    assert [label.key for label in page_of(at_rates).labels] == ["policy", "rate_per_s"]


def test_no_rows_are_no_error():
    assert "policy" in printed([], 120)
