"""`evenkeel bench aggregation`: cells, rows with the documented keys, notes, a figure."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evenkeel.bench.aggregation.measure import QUESTIONS, cells_of, check_policies, measure
from evenkeel.bench.aggregation.rows import notes_of
from evenkeel.cli.bench_aggregation import aggregation
from evenkeel.errors import ConfigurationError

MIDDLE = {"jobs": 2, "workers": 2, "load": 4.0, "skew": "0.1"}


def test_the_full_run_asks_every_question() -> None:
    assert {cell.question for cell in cells_of((), full=True, middle=MIDDLE)} == set(QUESTIONS)
    assert len(cells_of((), full=False, middle=MIDDLE)) < len(cells_of((), full=True, middle=MIDDLE))


def test_refuses_questions_and_policies_that_there_are_not() -> None:
    with pytest.raises(ConfigurationError, match="vary"):
        cells_of(("weather",), full=False, middle=MIDDLE)
    with pytest.raises(ConfigurationError, match="policy"):
        check_policies(("nobody",))


def test_infinite_memory_is_the_measure() -> None:
    cells = cells_of(("load",), full=False, middle=MIDDLE)[:1]
    row = measure(cells, ("unlimited",), steps=1, megabytes=0.5, seed=1)[0]
    assert row["jct_over_infinite"] == 1
    assert row["in_switch_share"] == 1
    assert row["fairness"] == pytest.approx(1)


def test_notes_say_where_preemption_does_not_pay() -> None:
    rows = [
        {"question": "regime", "value": "x", "policy": policy, "jct_over_infinite": time}
        for policy, time in (("atp-free", 1.0), ("esa", 1.1), ("assoc", 1.05))
    ]
    assert any("does not pay" in note and "10.0 %" in note for note in notes_of(rows))
    assert any("assoc takes 5.0 % more than atp-free" in note for note in notes_of(rows))


def test_the_command_writes_rows_and_a_figure(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        aggregation,
        [
            *("--vary", "regime", "--policy", "esa", "--policy", "assoc", "--jobs", "2", "--workers", "2"),
            *("--json", str(tmp_path / "rows.json"), "--figure", str(tmp_path / "figure.png")),
        ],
    )
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    keys = "policy jobs workers slots load skew loss rate_gbps mean_jct_s p95_jct_s jct_over_infinite in_switch_share"
    assert {*keys.split(), "server_bytes", "evictions_per_fragment", "fairness"} <= row.keys()
    assert (tmp_path / "figure.png").stat().st_size > 1000
