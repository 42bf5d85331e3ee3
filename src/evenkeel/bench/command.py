"""What `evenkeel bench serving` and `evenkeel demo` show and write."""

import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evenkeel.bench.serving import Experiment, Run, check_faults, parse_contender, run_all
from evenkeel.delays import parse_delay
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.faults import parse_fault
from evenkeel.plots import latency_histograms, save
from evenkeel.records import count_sources, json_document, machine
from evenkeel.report import write_report
from evenkeel.tables import table

__all__ = ["check_outputs", "run_bench", "run_demo", "write"]

_DEMO_POLICIES = ("none", "replicate", "hedge", "collage", "collage+hedge")
_DEMO_DELAY = "two-mode:scale=0.3"


def run_bench(arguments: dict[str, Any]) -> None:
    """`evenkeel bench serving`: every policy at every load."""
    experiment = Experiment(
        delay=arguments["delay"],
        replicas=arguments["replicas"],
        backups=arguments["backups"],
        rate_per_s=arguments["rate_per_s"],
        requests=arguments["requests"],
        seed=arguments["seed"],
        batch=arguments["batch"],
        faults=tuple(parse_fault(text) for text in arguments["faults"]),
    )
    parse_delay(experiment.delay)
    policies = arguments["policies"] or (("none", "collage+hedge") if arguments["url"] is None else ("none",))
    if arguments["url"] is not None and (len(policies) > 1 or arguments["simulated"]):
        raise ConfigurationError("url: a running server has a policy of its own; name one policy at most, to label it")
    if arguments["rate_per_s"] is not None and arguments["loads"]:
        raise ConfigurationError("load: --rate and --load exclude each other")
    if experiment.faults and (arguments["simulated"] or arguments["url"] is not None):
        raise ConfigurationError("fault: only workers started here can be hurt; leave --simulated or --url out")
    if arguments["url"] is not None and not arguments["url"].startswith(("http://", "https://")):
        raise ConfigurationError(f"url: must start with http:// or https://, found {arguments['url']!r}")
    check_outputs(
        json=arguments["json_path"],
        report=arguments["report"],
        figure=arguments["figure"],
        records=arguments["records"],
    )
    console = Console(stderr=True)
    runs: list[Run] = []
    loads = arguments["loads"] or (0.5,)
    for load in loads:
        folder = arguments["records"]
        if folder is not None and len(loads) > 1:
            folder = folder / f"load-{load:g}"
        runs += _run(
            console,
            replace(experiment, load=load),
            policies,
            url=arguments["url"],
            simulated=arguments["simulated"],
            records_folder=folder,
        )
    shown = {name: value for name, value in arguments.items() if value not in (None, (), False)}
    _show(runs, shown, arguments["json_path"], arguments["report"], arguments["figure"])


def run_demo(
    *, report: Path | None, json_path: Path | None, figure: Path | None, seconds: float, load: float, seed: int
) -> None:
    """`evenkeel demo`: five policies on real workers, a table and a report."""
    check_outputs(json=json_path, report=report, figure=figure)
    experiment = Experiment(delay=_DEMO_DELAY, load=load, seed=seed)
    experiment = replace(experiment, requests=max(20, round(experiment.rate() * seconds)))
    console = Console(stderr=True)
    console.print(
        f"[bold]9 replicas, 1 backup[/bold] on this machine; {experiment.requests} CIFAR-10 test images "
        f"for each policy at {experiment.rate():.0f} a second;\n"
        f"one task in fifty takes five times as long ({_DEMO_DELAY}); the same arrivals and delays for all.\n"
    )
    runs = _run(console, experiment, _DEMO_POLICIES)
    if report is None:
        report = Path(tempfile.mkdtemp(prefix="evenkeel-")) / "report.html"
    arguments = {"command": "evenkeel demo", "seconds": seconds, "load": load, "seed": seed, "delay": _DEMO_DELAY}
    _show(runs, arguments, json_path, report, figure)


def check_outputs(*, figure: Path | None, records: Path | None = None, **files: Path | None) -> None:
    """Refuse what could not be written afterwards, before minutes of measuring.

    Args:
        figure: a picture.
        records: a folder.
        files: others, by the option that names them.

    Raises:
        ConfigurationError: one cannot be written, or the figure is of no known form.
    """
    if figure is not None and figure.suffix not in (".png", ".svg"):
        raise ConfigurationError(f"figure: {figure} must end in .png or .svg")
    for name, path in (*files.items(), ("figure", figure)):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ConfigurationError(f"{name}: {path} cannot be written: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigurationError(f"{name}: {path} cannot be written: no permission")
    if records is not None:
        # Made with all the folders above it, so the nearest one that is there must be a folder.
        there = next(folder for folder in (records.absolute(), *records.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigurationError(f"records: the folder {records} cannot be made in {there}")


def _run(console: Console, experiment: Experiment, policies: Sequence[str], **options: Any) -> list[Run]:
    contenders = [parse_contender(policy, experiment) for policy in policies]
    experiment.rate()  # refused here, before a bar is drawn
    for contender in contenders:
        check_faults(experiment.faults, contender)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        tasks = {
            contender.label: bars.add_task(contender.label, total=experiment.requests, start=False)
            for contender in contenders
        }

        def progress(policy: str, answered: int, requests: int) -> None:
            if answered == 1:
                bars.start_task(tasks[policy])
            bars.update(tasks[policy], completed=answered)

        return asyncio.run(run_all(experiment, contenders, progress=progress, **options))


def _show(
    runs: Sequence[Run],
    arguments: dict[str, Any],
    json_path: Path | None,
    report: Path | None,
    figure: Path | None,
) -> None:
    rows = [run.row for run in runs]
    latencies_ms = {_title(run, runs): run.latencies_ms() for run in runs}
    console = Console()
    console.print(table(rows))
    if json_path is not None:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        write(json_path, orjson.dumps(json_document(plain, rows), option=orjson.OPT_INDENT_2) + b"\n")
        console.print(f"rows: {json_path}", soft_wrap=True)
    if report is not None:
        write_report(
            report,
            rows,
            latencies_ms,
            arguments,
            machine(),
            command=shlex.join(["evenkeel", *sys.argv[1:]]),
            sources_by_policy={_title(run, runs): count_sources(run.records) for run in runs},
        )
        console.print(f"report: {report}", soft_wrap=True)
    if figure is not None:
        save(latency_histograms(latencies_ms), figure)
        console.print(f"figure: {figure}", soft_wrap=True)


def _title(run: Run, runs: Sequence[Run]) -> str:
    """The policy, and the load where there are several."""
    if len({other.row["load"] for other in runs}) == 1:
        return run.contender.label
    return f"{run.contender.label} at load {run.row['load']}"


def write(path: Path, content: bytes) -> None:
    """Write a file; what goes wrong is said with its name."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise EvenkeelError(f"{path} cannot be written: {error.strerror or error}") from error
