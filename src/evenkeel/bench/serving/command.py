"""Runs `evenkeel bench serving` and `evenkeel demo`: shows and writes their rows."""

import asyncio
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.serving.figure import latency_histograms
from evenkeel.bench.serving.measure import Experiment, Run, check_faults, parse_contender, run_all
from evenkeel.bench.serving.report import write_report
from evenkeel.delays.faults import parse_fault
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.figures.drawing import save
from evenkeel.figures.outputs import asked_for, check_outputs, write_json
from evenkeel.figures.progress import bars
from evenkeel.figures.records import count_sources, json_document, machine
from evenkeel.figures.tables import table

__all__ = ["run_bench", "run_demo"]

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
    _show(runs, asked_for(arguments), arguments["json_path"], arguments["report"], arguments["figure"])


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


def _run(console: Console, experiment: Experiment, policies: Sequence[str], **options: Any) -> list[Run]:
    contenders = [parse_contender(policy, experiment) for policy in policies]
    experiment.rate()  # refused here, before a bar is drawn
    for contender in contenders:
        check_faults(experiment.faults, contender)
    with bars(console, 24) as shown:
        tasks = {
            contender.label: shown.add_task(contender.label, total=experiment.requests, start=False)
            for contender in contenders
        }

        def progress(policy: str, answered: int, requests: int) -> None:
            if answered == 1:
                shown.start_task(tasks[policy])
            shown.update(tasks[policy], completed=answered)

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
        write_json(json_path, json_document(arguments, rows))
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
