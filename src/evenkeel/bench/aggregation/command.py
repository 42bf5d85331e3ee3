"""Runs `evenkeel bench aggregation`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from evenkeel.bench.aggregation.figure import aggregation
from evenkeel.bench.aggregation.measure import cells_of, check_policies, measure
from evenkeel.bench.aggregation.rows import notes_of, pages_of
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish

__all__ = ["AggregationArguments", "run_aggregation"]


@dataclass(frozen=True)
class AggregationArguments:
    """Holds the options of `evenkeel bench aggregation`; `--help` says what each one means."""

    policies: tuple[str, ...]
    vary: tuple[str, ...]
    jobs: int
    workers: int
    load: float
    skew: str
    full: bool
    stragglers: Path | None
    arrivals: Path | None
    seed: int
    outputs: Outputs


def run_aggregation(arguments: AggregationArguments) -> None:
    """Runs `evenkeel bench aggregation`: every policy in every cell."""
    arguments.outputs.check()
    policies = check_policies(arguments.policies)
    middle = {name: getattr(arguments, name) for name in ("jobs", "workers", "load", "skew")}
    cells = cells_of(arguments.vary, full=arguments.full, middle=middle)
    with bars(Console(stderr=True), 24) as progress:
        task = progress.add_task("simulating", total=len(cells) * len(policies))
        rows = measure(
            cells,
            policies,
            steps=6 if arguments.full else 3,
            megabytes=16.0 if arguments.full else 8.0,
            seed=arguments.seed,
            stragglers=arguments.stragglers,
            arrivals=arguments.arrivals,
            advance=lambda policy: progress.update(task, advance=1, description=policy),
        )
        progress.update(task, description="simulated")
    publish(
        pages_of(rows),
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=notes_of(rows),
        draw=lambda: aggregation(rows),
    )
