"""The command line: help, exit codes, and one line for every mistake."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from evenkeel import __version__
from evenkeel.cli.main import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", [(), *commands(main)], ids=lambda path: " ".join(path) or "evenkeel")
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output or "usage" in result.output


@pytest.mark.parametrize(
    "path",
    [path for path in commands(main) if path not in {("bench",), ("lab",), ("plan",), ("switch",)}],
    ids=" ".join,
)
def test_help_shows_an_example(path: tuple[str, ...]) -> None:
    assert "Examples:\n    evenkeel " in run(*path, "--help").output


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_every_option_has_help(path: tuple[str, ...]) -> None:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    assert [each.name for each in options if not (each.help or "").endswith(".")] == []


def test_version() -> None:
    assert __version__ in run("--version").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--policy", "colage"), "unknown policy 'colage'"),
        (("serve", "--fill-after", "soon"), "policy.fill_after"),
        (("serve", "none.yaml"), "none.yaml cannot be read"),
        (("serve", "--model", "nothing.json"), "nothing.json cannot be read"),
        (("bench", "serving", "--policy", "magic", "--simulated"), "unknown policy 'magic'"),
        (("bench", "serving", "--policy", "collage@3", "--simulated"), "policy 'collage@3'"),
        (("bench", "serving", "--delay", "slow", "--simulated"), "'slow' is unknown"),
        (("bench", "serving", "--fault", "melt:replica=1,at=1s"), "'melt' is unknown"),
        (
            ("bench", "serving", "--url", "http://127.0.0.1:9", "--simulated"),
            "a running server has a policy of its own",
        ),
        (("bench", "serving", "--delay", "none", "--simulated"), "say --rate"),
        (("bench", "serving", "--load", "0", "--simulated"), "load: must be a finite number above zero, found 0"),
        (
            ("bench", "serving", "--max-approximate", "2", "--simulated"),
            "policy.max_approximate: expected a number from 0",
        ),
        (
            ("bench", "serving", "--max-approximate", "nan", "--simulated"),
            "policy.max_approximate: expected a number from",
        ),
        (("bench", "serving", "--max-approximate", "0", "--url", "http://127.0.0.1:9"), "leave one of the two out"),
        (("bench", "serving", "--load", "nan", "--simulated"), "load: must be a finite number above zero"),
        (("bench", "serving", "--rate", "inf", "--simulated"), "rate: must be a finite number above zero"),
        (("bench", "serving", "--rate", "5", "--load", ".3", "--simulated"), "--rate and --load exclude each other"),
        (("bench", "serving", "--fault", "kill:replica=0,at=1s", "--simulated"), "fault: only workers"),
        (("bench", "serving", "--fault", "kill:replica=9,at=1s"), "none has 9 replicas, numbered from 0"),
        (("bench", "serving", "--url", "127.0.0.1:8000"), "url: must start with http:// or https://"),
        *(
            (
                (*command, f"--{name}", f"no/such/x.{ending}"),
                f"{name}: no/such/x.{ending} cannot be written: there is no",
            )
            for command in (("bench", "serving", "--simulated"), ("demo",))
            for name, ending in (("json", "json"), ("report", "html"), ("figure", "svg"))
        ),
        (("bench", "serving", "--simulated", "--figure", "x.pdf"), "figure: x.pdf must end in .png or .svg"),
        (("demo", "--figure", "x"), "figure: x must end in .png or .svg"),
        (("bench", "serving", "--simulated", "--records", f"{__file__}/x"), "records: the folder"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("evenkeel: ")
    assert result.stderr.count("\n") == 1


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 1\npolicy: {name: hedge, deadline: 2s}\nreplicas: 3\n")
    seen = []
    monkeypatch.setattr("evenkeel.cli.serve.run_server", lambda settings, *how: seen.append(settings))
    assert run("serve", str(path), "--port", "9", "--hedge-after", "20ms", "--backups", "4").exit_code == 0
    config = seen[0]
    assert (config.port, config.replicas.count, config.backups.count) == (9, 3, 4)
    assert (config.policy.name, config.policy.deadline_s, str(config.policy.hedge_after)) == ("hedge", 2.0, "20ms")


def test_a_bench_gives_the_frontier_of_p99_against_approximate_answers(tmp_path: Path) -> None:
    rows, figure = tmp_path / "rows.json", tmp_path / "frontier.svg"
    result = run(
        *("bench", "serving", "--simulated", "--policy", "hedge", "--policy", "collage+hedge", "--requests", "3000"),
        *("--max-approximate", "1", "--max-approximate", "0", "--max-approximate", "0.03"),
        *("--delay", "two-mode:slow-share=0.06", "--json", str(rows), "--figure", str(figure)),
    )
    assert result.exit_code == 0, result.output
    hedge, free, exact, some = json.loads(rows.read_text())["rows"]
    assert (hedge["policy"], hedge.get("max_approximate")) == ("hedge", None), "once: the share is not for it"
    assert [row["max_approximate"] for row in (free, exact, some)] == [1, 0, 0.03]
    assert exact["approximate"] == 0 < some["approximate"] <= 0.03 + 1 / 3000 < free["approximate"]
    assert free["p99_ms"] < exact["p99_ms"] < hedge["p99_ms"]
    for row in (free, exact, some):
        assert row["ideal_p99_ms"] < row["p99_ms"]
    assert free["ideal_p99_ms"] < exact["ideal_p99_ms"]
    assert "clairvoyant" in figure.read_text()


def test_a_simulated_bench_writes_rows_records_and_a_report(tmp_path: Path) -> None:
    rows, records, report = tmp_path / "rows.json", tmp_path / "records", tmp_path / "report.html"
    result = run(
        *("bench", "serving", "--simulated", "--policy", "none@10", "--policy", "collage+hedge", "--requests", "600"),
        *("--load", "0.5", "--json", str(rows), "--records", str(records), "--report", str(report)),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(rows.read_text())
    assert document["evenkeel"] == __version__
    none, collage = document["rows"]
    assert (none["policy"], collage["policy"]) == ("none@10", "collage+hedge")
    assert none["requests"] == collage["requests"] == 600
    assert none["p99_ms"] > 2 * collage["p99_ms"]
    assert none["filled"] == 0 < collage["filled"] < 0.25
    assert none["extra_load"] == 0 < collage["extra_load"]
    assert none["p95_ms_low"] <= none["p95_ms"] <= none["p95_ms_high"]
    assert len((records / "none@10.jsonl").read_text().splitlines()) == 600
    assert "<svg" in report.read_text()
    again = tmp_path / "again.json"
    run(
        *("bench", "serving", "--simulated", "--policy", "none@10", "--requests", "600"),
        "--load",
        "0.5",
        "--json",
        str(again),
    )
    assert json.loads(again.read_text())["rows"][0] == none


def test_wrong_outputs_are_found_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenkeel.bench.serving.command.run_all", lambda *_, **__: pytest.fail("it was measured"))
    assert run("bench", "serving", "--simulated", "--json", str(tmp_path / "no" / "rows.json")).exit_code == 2
    assert run("demo", "--figure", str(tmp_path / "x.pdf")).exit_code == 2


def test_a_file_that_cannot_be_written_in_the_end_is_a_failure_of_the_work() -> None:
    result = run("bench", "serving", "--simulated", "--requests", "50", "--json", "/dev/full")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
