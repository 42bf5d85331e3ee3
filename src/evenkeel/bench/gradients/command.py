"""Runs `evenkeel bench gradients`: shows and writes its rows."""

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.gradients.cells import BASELINE, PIPE_WARM_SHARE, TASKS, Cell, Records, Training, read_method
from evenkeel.bench.gradients.data import TaskData, read_data
from evenkeel.bench.gradients.figure import gradients as gradients_figure
from evenkeel.bench.gradients.measure import UNLIMITED, Work, lab_missing, train_cells
from evenkeel.bench.gradients.rows import ALL_SEEDS, rows_of
from evenkeel.errors import ConfigurationError
from evenkeel.figures.drawing import save
from evenkeel.figures.outputs import asked_for, check_outputs, write, write_json
from evenkeel.figures.progress import bars
from evenkeel.figures.records import json_document
from evenkeel.figures.tables import Column, markdown, table
from evenkeel.text_values import read_rate_bps

__all__ = ["run_gradients"]

_COLUMNS = (
    Column("seconds_to_target", "to target", "s"),
    Column("speed_up", "faster", "times"),
    Column("final_accuracy", "accuracy", "%", 100.0),
    Column("step_s", "step", "ms", 1e3),
    Column("aggregate_s", "aggregating", "ms", 1e3),
    Column("aggregate_cut", "cut", "times"),
    Column("bytes_per_step", "sent", "MB", 1e-6),
    Column("encode_s", "encode", "ms", 1e3),
    Column("add_s", "add", "ms", 1e3),
    Column("decode_s", "decode", "ms", 1e3),
    Column("peak_bytes", "memory", "MB", 1e-6),
)
_LOOPBACK = "over loopback, without a rate"
_BETWEEN_METHODS = r",(?!\s*\w+\s*=)"  # not a comma before another setting, as in thc:bits=2,block=64

TaskAtRate = tuple[str, str]  # task and rate


def run_gradients(arguments: dict[str, Any]) -> None:
    """`evenkeel bench gradients`: every method on every task at every rate, tables, and files where asked for."""
    check_outputs(
        json=arguments["json_path"],
        markdown=arguments["markdown"],
        figure=arguments["figure"],
        records=arguments["records"],
    )
    console, progress_console = Console(), Console(stderr=True)
    rates = _rates(arguments["rates"], progress_console)
    asked = [(task, _methods(arguments["methods"], task)) for task in _tasks(arguments["tasks"])]
    data = {
        task: read_data(
            task, {"mlp": arguments["mnist"], "convnet": arguments["cifar"], "transformer": arguments["text"]}
        )
        for task, _ in asked
    }
    trainings = {task: _training(arguments, task, data[task]) for task, _ in asked}
    work = [
        (Cell(task, method, rate, seed), trainings[task])
        for rate in rates
        for task, methods in asked
        for seed in range(arguments["seeds"])
        for method in methods
    ]
    if arguments["records"] is not None:
        found = _measure(work, data, Records(arguments["records"]), arguments["timeout"], progress_console)
    else:
        with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
            found = _measure(work, data, Records(Path(folder)), arguments["timeout"], progress_console)
    rows = []
    for task, rate in dict.fromkeys((cell.task, cell.rate) for cell, _ in work):
        own = [record for record in found if (record["cell"]["task"], record["cell"]["rate"]) == (task, rate)]
        rows += rows_of(own, arguments["tolerance"] / 100)
    _show(console, rows, arguments, data)


def _measure(
    work: Work, data: dict[str, TaskData], records: Records, timeout_s: int, console: Console
) -> list[dict[str, Any]]:
    """The records of all cells: those that are kept already, and the others measured now."""
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


def _show(console: Console, rows: list[dict[str, Any]], arguments: dict[str, Any], data: dict[str, TaskData]) -> None:
    pages = []
    for (task, rate), means in _groups(rows):
        title = f"{task} at {rate}: {_about(means, data[task])}"
        columns = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in means)]
        console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
        console.print(table(means, columns, "method"))
        notes = list(_notes(means, arguments["tolerance"]))
        for note in notes:
            console.print(note, soft_wrap=True)
        pages.append("\n".join([f"{title}\n", markdown(means, columns, "method"), *notes, ""]))
    if arguments["json_path"] is not None:
        sources = {task: found.identity for task, found in data.items()}
        write_json(arguments["json_path"], json_document(asked_for(arguments) | {"data": sources}, rows))
        console.print(f"rows: {arguments['json_path']}", soft_wrap=True)
    if arguments["markdown"] is not None:
        write(arguments["markdown"], "\n".join(pages).encode())
        console.print(f"tables: {arguments['markdown']}", soft_wrap=True)
    if arguments["figure"] is not None:
        save(gradients_figure(rows), arguments["figure"])
        console.print(f"figure: {arguments['figure']}", soft_wrap=True)


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[TaskAtRate, list[dict[str, Any]]]]:
    """The mean rows of each task and rate."""
    for group in dict.fromkeys((row["task"], row["rate"]) for row in rows):
        yield group, [row for row in rows if (row["task"], row["rate"]) == group and row["seed"] == ALL_SEEDS]


def _about(means: Sequence[dict[str, Any]], data: TaskData) -> str:
    """What is trained, and how much of the baseline's step is communication."""
    base = next(row for row in means if row["method"] == BASELINE)
    step_s, compute_s = base["step_s"], base["compute_s"]
    ratio = max(0.0, step_s - compute_s) / compute_s
    return (
        f"{base['parameters'] / 1e6:.2f} M parameters, {base['workers']} workers with {base['batch']} examples each, "
        f"{base['steps']} steps, data: {data.source}. A step of fp32 takes {1e3 * step_s:.0f} ms, "
        f"{1e3 * compute_s:.0f} ms of it computation: communication is {base['comm_share']:.0%} of it, "
        f"{ratio:.2g} times the computation"
    )


def _notes(means: Sequence[dict[str, Any]], tolerance: float) -> Iterator[str]:
    seeds = means[0]["seeds"]
    yield (
        f"target: the final accuracy of fp32 with the same seed, less {tolerance:g} points; "
        + (f"means over {seeds} seeds, intervals: 95 %" if seeds > 1 else "one seed: no intervals")
    )
    yield "aggregating: what a step takes beyond computation, coding included; cut: fp32's over this one's"
    yield "sent: by a rank in a step, as the kernel counts it"
    methods = " ".join(row["method"] for row in means)
    if "pipe" in methods:
        yield f"pipe: after the first {PIPE_WARM_SHARE:.0%} of the steps each applies the average of the one before"
    if "pipe-ahead" in methods:
        yield "pipe-ahead: as pipe, but a rank's gradients are of the weights where its own one before would lead"
    if "powersgd" in methods:
        yield "powersgd: torch's hook, compressing from the third step on; its coding is not told apart"
    for row in means:
        if row["reached"] < row["seeds"]:
            yield f"{row['method']}: {row['reached']} of {row['seeds']} seeds reached the target"
        elif row["method"] != BASELINE and row["speed_up"] is not None and row["speed_up"] < 1:
            yield f"{row['method']} loses here: {1 / row['speed_up']:.2f} times the time of fp32"


def _tasks(text: str) -> list[str]:
    tasks = _listed(text)
    for task in tasks:
        if task not in TASKS:
            raise ConfigurationError(f"tasks: there is no {task!r}; there are {', '.join(TASKS)}")
    if not tasks:
        raise ConfigurationError(f"tasks: name one at least of {', '.join(TASKS)}")
    return tasks


def _methods(text: str | None, task: str) -> list[str]:
    """The methods, the baseline first: it sets the target."""
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


def _training(arguments: dict[str, Any], task: str, data: TaskData) -> Training:
    settings, workers = TASKS[task], arguments["workers"]
    batch = arguments["batch"] or settings.batch
    examples = len(data.inputs)
    steps = arguments["steps"] or (settings.quick_steps if data.stand_in else settings.steps)
    if arguments["epochs"] is not None:
        if arguments["steps"] is not None:
            raise ConfigurationError("epochs: --steps and --epochs exclude each other")
        if task == "transformer":
            raise ConfigurationError("epochs: a text has none, its rows begin anywhere; give --steps")
        steps = max(1, round(arguments["epochs"] * examples / (batch * workers)))
    if batch * workers > examples:
        raise ConfigurationError(
            f"batch: {workers} workers with {batch} each need more than {task}'s {examples} examples"
        )
    return Training(steps, batch, workers, arguments["evaluations"], data.identity)


def _listed(text: str, between: str = ",") -> list[str]:
    return list(dict.fromkeys(part.strip() for part in re.split(between, text) if part.strip()))
