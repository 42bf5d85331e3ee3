"""Runs `evenkeel bench serving` and `evenkeel demo`."""

import asyncio
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from evenkeel.bench.serving.figure import frontier, latency_histograms
from evenkeel.bench.serving.measure import Experiment, Run, check_faults, parse_contender, run_all
from evenkeel.bench.serving.report import write_report
from evenkeel.bench.serving.rows import count_sources, page_of
from evenkeel.bench.serving.user_models import UserModels
from evenkeel.delays.faults import parse_fault
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.figures.records import machine
from evenkeel.http_client.client import ClientAccess
from evenkeel.serving.gateway.policy import preset

__all__ = ["DemoArguments", "ServingArguments", "run_bench", "run_demo"]

_DEMO_POLICIES = ("none", "replicate", "hedge", "collage", "collage+hedge")
_DEMO_DELAY = "two-mode:scale=0.3"
_BUSY = 0.25  # of this machine's processors, by the replicas' passes


@dataclass(frozen=True)
class ServingArguments:
    """Holds the options of `evenkeel bench serving`; `--help` says what each one means."""

    policies: tuple[str, ...]
    delay: str
    loads: tuple[float, ...]
    rate_per_s: float | None
    requests: int
    seed: int
    replicas: int
    backups: int
    batch: int
    faults: tuple[str, ...]
    max_approximate: tuple[float, ...]
    url: str | None
    key_file: Path | None
    ca: Path | None
    simulated: bool
    records: Path | None
    outputs: Outputs


@dataclass(frozen=True)
class DemoArguments:
    """Holds the options of `evenkeel demo`; `--help` says what each one means."""

    seconds: float
    load: float
    seed: int
    classifier: Path | None
    images: Path | None
    split: str | None
    outputs: Outputs


def run_bench(arguments: ServingArguments) -> None:
    """Runs `evenkeel bench serving`: every policy at every load."""
    experiment = Experiment(
        delay=arguments.delay,
        replicas=arguments.replicas,
        backups=arguments.backups,
        rate_per_s=arguments.rate_per_s,
        requests=arguments.requests,
        seed=arguments.seed,
        batch=arguments.batch,
        faults=tuple(parse_fault(text) for text in arguments.faults),
    )
    parse_delay(experiment.delay)
    policies = arguments.policies or (("none", "collage+hedge") if arguments.url is None else ("none",))
    if arguments.url is not None and (len(policies) > 1 or arguments.simulated):
        raise ConfigurationError(
            "url: a running server has a policy of its own; name one policy at most, to label it, and no --simulated"
        )
    if arguments.rate_per_s is not None and arguments.loads:
        raise ConfigurationError("load: --rate and --load exclude each other; give one of them")
    if arguments.max_approximate and arguments.url is not None:
        raise ConfigurationError("max_approximate: a running server has a policy of its own; leave one of the two out")
    if experiment.faults and (arguments.simulated or arguments.url is not None):
        raise ConfigurationError("fault: only workers started here can be hurt; leave --simulated or --url out")
    if arguments.url is not None and not arguments.url.startswith(("http://", "https://")):
        raise ConfigurationError(f"url: must start with http:// or https://, found {arguments.url!r}")
    if arguments.url is None and (arguments.key_file or arguments.ca):
        raise ConfigurationError("key-file, ca: they are for a server that runs already; give its --url")
    for bound in arguments.max_approximate:
        preset("none", max_approximate=bound)  # refused here, before a bar is drawn
    arguments.outputs.check(arguments.records)
    runs: list[Run] = []
    loads = arguments.loads or (0.5,)
    # A share bounds what backups answer, so it makes no difference to a policy without them.
    bounded = [policy for policy in policies if preset(policy.partition("@")[0]).uses_backups]
    others = [policy for policy in policies if policy not in bounded]
    shares: list[tuple[float | None, Sequence[str]]] = [(None, policies)]
    if arguments.max_approximate:
        shares = [(None, others), *((share, bounded) for share in arguments.max_approximate)]
    for load, (share, chosen) in product(loads, shares):
        folder = arguments.records
        if folder is not None and len(loads) > 1:
            folder = folder / f"load-{load:g}"
        if folder is not None and share is not None:
            folder = folder / f"max-approximate-{share:g}"
        runs += _run(
            Console(stderr=True),
            replace(experiment, load=load, max_approximate=share),
            chosen,
            url=arguments.url,
            access=ClientAccess.of_files(arguments.key_file, arguments.ca),
            simulated=arguments.simulated,
            records_folder=folder,
        )
    _publish(runs, arguments_of(arguments), arguments.outputs)


def run_demo(arguments: DemoArguments) -> None:
    """Runs `evenkeel demo`: five policies on real workers, a table and a report."""
    outputs = arguments.outputs
    outputs.check()
    if (arguments.classifier is None) != (arguments.images is None):
        raise ConfigurationError("classifier: give --classifier and --images together, or neither for the shipped ones")
    own, pictures = None, "CIFAR-10 test images"
    if arguments.classifier is not None and arguments.images is not None:
        own = UserModels.read(arguments.classifier, arguments.images, arguments.split)
        pictures = f"of {len(own.images)} of your images"
    delay = _demo_delay(arguments.load, own)
    experiment = Experiment(delay=delay, load=arguments.load, seed=arguments.seed, own=own)
    experiment = replace(experiment, requests=max(20, round(experiment.rate() * arguments.seconds)))
    console = Console(stderr=True)
    console.print(
        f"[bold]9 replicas, 1 backup[/bold] on this machine; {experiment.requests} {pictures} "
        f"for each policy at {experiment.rate():.0f} a second;\n"
        f"one task in fifty takes five times as long ({delay}); the same arrivals and delays for all."
    )
    if own is not None:
        console.print(f"A pass of {own.name} takes {own.pass_ms:.1f} ms. Right is what it answers itself at full size.")
        for line in own.held_back:
            console.print(line, highlight=False, markup=False)
    console.print()
    runs = _run(console, experiment, _DEMO_POLICIES)
    if outputs.report is None:
        outputs = replace(outputs, report=Path(tempfile.mkdtemp(prefix="evenkeel-")) / "report.html")
    shown = {
        "command": "evenkeel demo",
        "seconds": arguments.seconds,
        "load": arguments.load,
        "seed": arguments.seed,
        "delay": delay,
    }
    if own is not None:
        shown |= {"classifier": str(arguments.classifier), "images": str(arguments.images)}
    _publish(runs, shown, outputs)


def _demo_delay(load: float, own: UserModels | None) -> str:
    """Gives the law of task times; slower for a model whose own passes would fill this machine."""
    if own is None:
        return _DEMO_DELAY
    busy_s = load * Experiment.replicas * own.pass_ms / 1e3  # of processors, were a task to take a second
    least = busy_s / (_BUSY * (os.cpu_count() or 1)) / parse_delay("two-mode").mean_s
    return f"two-mode:scale={max(0.3, math.ceil(20 * least) / 20):g}"


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


def _publish(runs: Sequence[Run], arguments: Mapping[str, Any], outputs: Outputs) -> None:
    rows = [run.row for run in runs]
    latencies_ms = {_title(run, runs): run.latencies_ms() for run in runs}
    report = partial(
        write_report,
        rows=rows,
        latencies_by_policy=latencies_ms,
        arguments=arguments,
        machine=machine(),
        command=shlex.join(["evenkeel", *sys.argv[1:]]),
        sources_by_policy={_title(run, runs): count_sources(run.records) for run in runs},
    )
    shares = {row.get("max_approximate") for row in rows} - {None}
    draw = partial(frontier, rows) if len(shares) > 1 else partial(latency_histograms, latencies_ms)
    publish([page_of(rows)], rows, arguments, outputs, draw=draw, report=report)


def _title(run: Run, runs: Sequence[Run]) -> str:
    """Names the policy, the load where there are several, and the share of approximate answers where one is set."""
    load = "" if len({other.row["load"] for other in runs}) == 1 else f" at load {run.row['load']}"
    share = run.row.get("max_approximate")
    return f"{run.contender.label}{load}" + ("" if share is None else f", at most {share:.0%} approximate")
