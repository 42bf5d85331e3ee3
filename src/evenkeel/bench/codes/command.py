"""Runs `evenkeel bench codes`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from evenkeel.bench.codes.figure import codes as codes_figure
from evenkeel.bench.codes.recorded import read_gradients
from evenkeel.bench.codes.rows import notes_of, pages_of
from evenkeel.errors import ConfigurationError, MissingExtraError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.text_values import read_count, read_number

__all__ = ["CodesArguments", "run_codes"]

_LAWS = ("gaussian", "lognormal-2", "sparse", "low-rank")


@dataclass(frozen=True)
class CodesArguments:
    """Holds the options of `evenkeel bench codes`; `--help` says what each one means."""

    codes: tuple[str, ...]
    workers: str
    correlation: str
    distribution: str | None
    length: int
    gradients: tuple[Path, ...]
    seeds: int
    outputs: Outputs


def run_codes(arguments: CodesArguments) -> None:
    """Runs `evenkeel bench codes`: every code on the same vectors."""
    arguments.outputs.check()
    workers = [_at_least_one(text) for text in _parts(arguments.workers)]
    correlations = [read_number(text, "correlation") for text in _parts(arguments.correlation)]
    try:
        from evenkeel.bench.codes.measure import DEFAULT_CODES, made_setting, measure, parse_code, recorded_settings
    except ImportError as error:
        raise MissingExtraError("torch", "train") from error
    contenders = [parse_code(text) for text in dict.fromkeys(arguments.codes or DEFAULT_CODES)]
    recordings = [read_gradients(path) for path in arguments.gradients]
    laws = _parts(arguments.distribution) if arguments.distribution else () if recordings else _LAWS
    settings = [
        made_setting(law, count, correlation, arguments.length)
        for law in laws
        for count in workers
        # A single worker has nothing to be correlated with.
        for correlation in (correlations if count > 1 else [0.0])
    ]
    settings += [setting for each in recordings for count in workers for setting in recorded_settings(each, count)]
    if not settings:
        largest = max(len(moment.workers) for each in recordings for moment in each.moments.values())
        raise ConfigurationError(f"workers: the recorded gradients are of {largest} workers; give at most so many")
    with bars(Console(stderr=True), 24) as progress:
        task = progress.add_task("codes", total=len(settings) * len(contenders) * arguments.seeds)
        rows = measure(
            contenders,
            settings,
            arguments.seeds,
            lambda code: progress.update(task, advance=1, description=code),
        )
        progress.update(task, description="codes")
    publish(
        pages_of(rows),
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=notes_of(rows, [contender.code for contender in contenders], recorded=bool(recordings)),
        draw=lambda: codes_figure(rows),
    )


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _at_least_one(text: str) -> int:
    count = read_count(text, "workers")
    if count < 1:
        raise ConfigurationError(f"workers: must be 1 or more, found {count}")
    return count
