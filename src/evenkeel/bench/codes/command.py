"""Runs `evenkeel bench codes`: shows and writes its rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.codes.figure import codes as codes_figure
from evenkeel.bench.codes.recorded import read_gradients
from evenkeel.bench.codes.table import markdown, tables
from evenkeel.bench.codes.traffic import TOPOLOGIES
from evenkeel.errors import ConfigurationError, MissingExtraError
from evenkeel.figures.drawing import save
from evenkeel.figures.outputs import asked_for, check_outputs, write, write_json
from evenkeel.figures.progress import bars
from evenkeel.figures.records import json_document
from evenkeel.text_values import read_count, read_number

__all__ = ["run_codes"]

_LAWS = ("gaussian", "lognormal-2", "sparse", "low-rank")


def run_codes(arguments: dict[str, Any]) -> None:
    """`evenkeel bench codes`: every code on the same vectors, tables, and files where asked for."""
    check_outputs(json=arguments["json_path"], markdown=arguments["markdown"], figure=arguments["figure"])
    workers = [_at_least_one(text) for text in _parts(arguments["workers"])]
    correlations = [read_number(text, "correlation") for text in _parts(arguments["correlation"])]
    try:
        from evenkeel.bench.codes.measure import DEFAULT_CODES, made_setting, measure, parse_code, recorded_settings
    except ImportError as error:
        raise MissingExtraError("torch", "train") from error
    contenders = [parse_code(text) for text in dict.fromkeys(arguments["codes"] or DEFAULT_CODES)]
    recordings = [read_gradients(path) for path in arguments["gradients"]]
    laws = _parts(arguments["distribution"]) if arguments["distribution"] else () if recordings else _LAWS
    settings = [
        made_setting(law, count, correlation, arguments["length"])
        for law in laws
        for count in workers
        # A single worker has nothing to be correlated with.
        for correlation in (correlations if count > 1 else [0.0])
    ]
    settings += [setting for each in recordings for count in workers for setting in recorded_settings(each, count)]
    if not settings:
        most = max(len(moment.workers) for each in recordings for moment in each.moments.values())
        raise ConfigurationError(f"workers: the recorded gradients are of {most} workers; ask for at most so many")
    with bars(Console(stderr=True), 24) as progress:
        task = progress.add_task("codes", total=len(settings) * len(contenders) * arguments["seeds"])
        rows = measure(
            contenders,
            settings,
            arguments["seeds"],
            lambda code: progress.update(task, advance=1, description=code),
        )
        progress.update(task, description="codes")
    console = Console()
    for page in tables(rows):
        console.print(page)
        console.print()
    for note in _notes(rows, [contender.code for contender in contenders], recorded=bool(recordings)):
        console.print(note, soft_wrap=True, highlight=False)
    _write(arguments, rows, console)


def _write(arguments: dict[str, Any], rows: Sequence[dict[str, Any]], console: Console) -> None:
    def put(what: str, key: str, make: Callable[[Path], object]) -> None:
        if arguments[key] is not None:
            make(arguments[key])
            console.print(f"{what}: {arguments[key]}", soft_wrap=True)

    put("rows", "json_path", lambda path: write_json(path, json_document(asked_for(arguments), rows)))
    put("table", "markdown", lambda path: write(path, markdown(rows).encode()))
    put("figure", "figure", lambda path: save(codes_figure(rows), path))


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _at_least_one(text: str) -> int:
    count = read_count(text, "workers")
    if count < 1:
        raise ConfigurationError(f"workers: must be 1 or more, found {count}")
    return count


def _notes(rows: Sequence[dict[str, Any]], codes: Sequence[str], *, recorded: bool) -> list[str]:
    notes = [
        "NMSE: squared error of the mean, as a share of its squared norm; one round, without error feedback",
        "bits: that a rank sends for each coordinate, both directions, scales and padding counted",
    ]
    used = {row["topology"] for row in rows}
    notes += [f"{name}: {meaning}" for name, meaning in TOPOLOGIES.items() if name in used]
    names = {code.partition("+")[0].partition(":")[0] for code in codes}
    if recorded:
        notes.append("recorded gradients are the same for every seed: intervals are over the codes' randomness alone")
    if "thc-public" in names:
        notes.append(
            "thc-public: the defects of the authors' public code, as read: all ranks round with the same noise, and "
            "one norm for the whole vector"
        )
    if "gradiveq" in names:
        notes.append(
            "gradiveq: bits are the average of the first 500 rounds, 10 to learn from; NMSE is of coded rounds"
        )
    if "lowrank" in names:
        notes.append(
            "lowrank: bits are the average of a round and the next, of the other side; error feedback, without which "
            "it is not meant to be used, is what brings the rest of the gradient in later rounds"
        )
    if names & {"gradiveq", "lowrank", "powersgd"}:
        notes.append(
            "gradiveq, lowrank, powersgd: where there are convolutions or matrices, after the means of earlier rounds"
        )
    if "lloyd-max" in names:
        notes.append(
            "lloyd-max: no code, but the limit of unbiased rounding of each rank's vector by itself, no scales"
        )
    return notes
