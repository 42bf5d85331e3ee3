"""Runs `evenkeel bench gradients`."""

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.gradients.cells import BASELINE, TASKS, Cell, Records, Training, read_method, read_slow
from evenkeel.bench.gradients.data import TaskData, read_data
from evenkeel.bench.gradients.figure import gradients as gradients_figure
from evenkeel.bench.gradients.measure import UNLIMITED, Work, lab_missing, train_cells
from evenkeel.bench.gradients.rows import pages_of, rows_of
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.text_values import read_rate_bps, read_share

__all__ = ["GradientsArguments", "run_gradients"]

_LOOPBACK = "over loopback, without a rate"
_BETWEEN_METHODS = r",(?!\s*\w+\s*=)"  # not a comma before another setting, as in thc:bits=2,block=64


@dataclass(frozen=True)
class GradientsArguments:
    """Holds the options of `evenkeel bench gradients`; `--help` says what each one means."""

    tasks: str
    methods: str | None
    rates: str | None
    workers: int
    seeds: int
    steps: int | None
    epochs: float | None
    batch: int | None
    evaluations: int
    tolerance: float
    mnist: Path | None
    cifar: Path | None
    text: Path | None
    timeout: int
    loss: str
    slow: str
    records: Path | None
    outputs: Outputs


def run_gradients(arguments: GradientsArguments) -> None:
    """Runs `evenkeel bench gradients`: every method on every task at every rate."""
    arguments.outputs.check(arguments.records)
    console = Console(stderr=True)
    rates = _rates(arguments.rates, console)
    wanted = [(task, _methods(arguments.methods, task)) for task in _tasks(arguments.tasks)]
    given = {"mlp": arguments.mnist, "convnet": arguments.cifar, "transformer": arguments.text}
    data = {task: read_data(task, given) for task, _ in wanted}
    trainings = {task: _training(arguments, task, data[task]) for task, _ in wanted}
    work = [
        (Cell(task, method, rate, seed), trainings[task])
        for rate in rates
        for task, methods in wanted
        for seed in range(arguments.seeds)
        for method in methods
    ]
    with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
        records = Records(Path(folder) if arguments.records is None else arguments.records)
        found = _measure(work, data, records, arguments.timeout, console)
    rows = []
    for task, rate in dict.fromkeys((cell.task, cell.rate) for cell, _ in work):
        own = [record for record in found if (record["cell"]["task"], record["cell"]["rate"]) == (task, rate)]
        rows += rows_of(own, arguments.tolerance / 100)
    publish(
        pages_of(rows, {task: each.source for task, each in data.items()}, arguments.tolerance),
        rows,
        arguments_of(arguments) | {"data": {task: each.identity for task, each in data.items()}},
        arguments.outputs,
        draw=lambda: gradients_figure(rows),
    )


def _measure(
    work: Work, data: dict[str, TaskData], records: Records, timeout_s: int, console: Console
) -> list[dict[str, Any]]:
    """Gives the records of all cells: those that are kept already, and the others measured now."""
    missing = [(cell, training) for cell, training in work if records.find(cell, training) is None]
    if len(missing) < len(work):
        console.print(f"{len(work) - len(missing)} of {len(work)} trainings are in the records already")
    if missing:
        done = dict.fromkeys((cell for cell, _ in missing), 0)
        with bars(console, 36) as shown:
            bar = shown.add_task("steps", total=sum(training.steps for _, training in missing))

            def progress(cell: Cell, steps: int) -> None:
                done[cell] = max(done[cell], steps)
                name = f"{cell.task} {cell.method} {cell.rate} seed {cell.seed}"
                shown.update(bar, completed=sum(done.values()), description=name)

            train_cells(missing, data, records, timeout_s=timeout_s, progress=progress, tell=shown.console.print)
    found = [records.find(cell, training) for cell, training in work]
    return [record for record in found if record is not None]


def _tasks(text: str) -> list[str]:
    tasks = _listed(text)
    for task in tasks:
        if task not in TASKS:
            raise ConfigurationError(f"tasks: there is no {task!r}; there are {', '.join(TASKS)}")
    if not tasks:
        raise ConfigurationError(f"tasks: name one at least of {', '.join(TASKS)}")
    return tasks


def _methods(text: str | None, task: str) -> list[str]:
    """Reads the methods, and puts the baseline first: it sets the target."""
    methods = list(TASKS[task].methods) if text is None else _listed(text, _BETWEEN_METHODS)
    for method in methods:
        read_method(method)
    return [BASELINE, *(method for method in methods if method != BASELINE)]


def _rates(text: str | None, console: Console) -> list[str]:
    missing = lab_missing()
    default = UNLIMITED if missing else "100mbit"
    rates = [rate.lower().removesuffix("/s") for rate in _listed(default if text is None else text)]
    if not rates:
        raise ConfigurationError("rates: name one at least, such as 100mbit, 1gbit or unlimited")
    rates = [UNLIMITED if math.isinf(read_rate_bps(rate, "rates")) else rate for rate in rates]
    if missing and rates != [UNLIMITED]:
        raise ConfigurationError(f"rates: {missing}; without it only --rates unlimited can be measured, over loopback")
    if missing:
        console.print(f"workers talk {_LOOPBACK}: {missing}", soft_wrap=True)
    return list(dict.fromkeys(rates))


def _training(arguments: GradientsArguments, task: str, data: TaskData) -> Training:
    settings, workers = TASKS[task], arguments.workers
    batch = arguments.batch or settings.batch
    examples = len(data.inputs)
    steps = arguments.steps or (settings.quick_steps if data.stand_in else settings.steps)
    if arguments.epochs is not None:
        if arguments.steps is not None:
            raise ConfigurationError("epochs: --steps and --epochs exclude each other")
        if task == "transformer":
            raise ConfigurationError("epochs: a text has none, its rows begin anywhere; give --steps")
        steps = max(1, round(arguments.epochs * examples / (batch * workers)))
    if batch * workers > examples:
        raise ConfigurationError(
            f"batch: {workers} workers with {batch} each need more than {task}'s {examples} examples"
        )
    loss = read_share(arguments.loss, "loss")
    if loss and lab_missing():
        raise ConfigurationError(f"loss: links that lose packets need the lab; {lab_missing()}")
    read_slow(arguments.slow)
    return Training(steps, batch, workers, arguments.evaluations, data.identity, loss, arguments.slow)


def _listed(text: str, between: str = ",") -> list[str]:
    return list(dict.fromkeys(part.strip() for part in re.split(between, text) if part.strip()))
