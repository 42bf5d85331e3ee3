"""Measures `evenkeel bench serving`: compares policies under the same arrivals and the same delays."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from evenkeel.arrays import Array
from evenkeel.bench.serving.faults_live import make_faults
from evenkeel.bench.serving.load import Target, drive
from evenkeel.bench.serving.rows import FILLS, summarise
from evenkeel.bench.serving.server_process import Counters, ServerProcess, read_counters
from evenkeel.bench.serving.user_models import UserModels
from evenkeel.delays.faults import Fault
from evenkeel.delays.text import parse_delay
from evenkeel.errors import BackendError, ConfigurationError, EvenkeelError
from evenkeel.figures.records import RecordWriter, RequestRecord
from evenkeel.http_client.client import NO_ACCESS, ClientAccess, request_once
from evenkeel.models import shipped
from evenkeel.models.cards import load_card
from evenkeel.serving.config import read_config
from evenkeel.serving.gateway.policy import preset
from evenkeel.serving.ideal import ideal_quantile
from evenkeel.serving.simulate import Fleet, arrivals, simulate
from evenkeel.text_values import without_password

__all__ = ["Contender", "Experiment", "Run", "check_faults", "parse_contender", "run_all"]

RequestsDone = Callable[[str, int, int], object]  # policy, answered, requests


@dataclass(frozen=True)
class Contender:
    """Names one policy and the nodes that it gets. `none@10` has ten replicas and no backup: equal resources."""

    label: str
    policy: str
    replicas: int
    backups: int


@dataclass(frozen=True)
class Experiment:
    """Describes what every contender goes through.

    Attributes:
        delay: law of task times, as text.
        load: share of the time of `replicas` that the requests ask for.
        rate_per_s: overrides the load.
        batch: requests that come at once (9: the paper's experiment).
        replicate_after: timeout of the policy `replicate`.
        max_approximate: largest share of approximate answers; None: as each policy has it.
        policy_fields: changes to every policy, as the configuration file has them.
        grids: grids of the coded models that backups hold; 1 is the replicas' own.
        faults: what happens to whom while it runs.
        own: a user's models and images, on real processes; None: the shipped ones.
    """

    delay: str = "two-mode:scale=0.3"
    replicas: int = 9
    backups: int = 1
    load: float = 0.5
    rate_per_s: float | None = None
    requests: int = 2000
    seed: int = 1
    batch: int = 1
    replicate_after: str = ""
    max_approximate: float | None = None
    policy_fields: dict[str, Any] = field(default_factory=dict)
    grids: tuple[int, ...] = (1, 2, 3)
    model: str = "cifar10-base"
    faults: tuple[Fault, ...] = ()
    own: UserModels | None = None

    def rate(self) -> float:
        """Gives requests a second.

        Raises:
            ConfigurationError: the load or the rate is no finite number above zero, or the law gives no rate.
        """
        if self.rate_per_s is not None:
            return _above_zero("rate", self.rate_per_s)
        mean_s = parse_delay(self.delay).mean_s
        if mean_s <= 0:
            raise ConfigurationError("load: a law without delays gives no rate; say --rate")
        return _above_zero("load", self.load) * self.replicas / mean_s

    def times_s(self) -> Array:
        """Gives the times at which requests come, the same for every contender."""
        return arrivals(self.rate(), self.requests, self.seed, self.batch)


@dataclass
class Run:
    """Holds what one contender did."""

    contender: Contender
    row: dict[str, Any]
    records: list[RequestRecord]
    counters: Counters

    def latencies_ms(self) -> Array:
        """Gives the latencies of the requests that were answered."""
        return np.array([record.latency_ms for record in self.records if record.answered])


def parse_contender(text: str, experiment: Experiment) -> Contender:
    """Reads `policy`, or `policy@replicas` for a fleet of that many replicas and no backup."""
    name, at, count = text.partition("@")
    policy = preset(name)
    if not at:
        return Contender(text, name, experiment.replicas, experiment.backups if policy.uses_backups else 0)
    if not count.isdigit() or int(count) < 1 or policy.uses_backups:
        raise ConfigurationError(f"policy {text!r}: expected a policy without backups and a count, as in none@10")
    return Contender(text, name, int(count), 0)


def check_faults(faults: Sequence[Fault], contender: Contender) -> None:
    """Refuses faults that hit workers which the contender has not.

    Raises:
        ConfigurationError: a replica or backup has no such number.
    """
    for fault in faults:
        count = {"replica": contender.replicas, "backup": contender.backups}.get(fault.target)
        if count is not None and fault.number >= count:
            raise ConfigurationError(
                f"fault {fault.describe()!r}: {contender.label} has {count} {fault.target}s, numbered from 0"
            )


async def run_all(
    experiment: Experiment,
    contenders: Sequence[Contender],
    *,
    url: str | None = None,
    access: ClientAccess = NO_ACCESS,
    simulated: bool = False,
    records_folder: Path | None = None,
    progress: RequestsDone = lambda policy, answered, requests: None,
) -> list[Run]:
    """Puts every contender through the experiment, one after the other.

    Args:
        experiment: the arrivals and the delays.
        contenders: who.
        url: measure the server that runs there (then its policy is its own, and there is one contender).
        access: what that server lets us in with.
        simulated: on a virtual clock, with fake workers.
        records_folder: keep each request as a JSON line there.
        progress: called with the policy, the requests answered, and all requests.

    Raises:
        EvenkeelError: a server could not be started or reached.
    """
    last_s = float(experiment.times_s()[-1])
    for fault in experiment.faults:
        if fault.at_s >= last_s:
            raise ConfigurationError(
                f"fault {fault.describe()!r}: the last request is sent at {last_s:.1f} s, before it happens"
            )
    runs = []
    for contender in contenders:
        if simulated:
            records, counters = _simulate(experiment, contender)
            progress(contender.label, len(records), experiment.requests)
        elif url is not None:
            records, counters = await _measure(url.rstrip("/"), experiment, contender, progress, access, keys=False)
        else:
            async with ServerProcess(server_config(experiment, contender)) as server:
                faults = asyncio.create_task(make_faults(experiment.faults, server.pid, contender.replicas))
                try:
                    records, counters = await _measure(
                        server.url, experiment, contender, progress, NO_ACCESS, keys=True
                    )
                finally:
                    faults.cancel()
                if faults.done() and not faults.cancelled():
                    faults.result()
        if records_folder is not None:
            _keep(records_folder, contender, records)
        row = summarise(
            records,
            policy=contender.label,
            delay=experiment.delay,
            load=None if experiment.rate_per_s is not None else experiment.load,
            rate_per_s=experiment.rate(),
            extra_tasks=counters.get("extra_passes", 0.0),
            primary_tasks=counters.get("items", 0.0),
            exact_fills=int(counters.get("fills[replicate]", 0.0)),
        )
        if experiment.max_approximate is not None:
            row.update(_bounded(experiment, records, counters))
        runs.append(Run(contender, row, records, counters))
    return runs


def server_config(experiment: Experiment, contender: Contender) -> dict[str, Any]:
    """Gives the configuration of the contender's gateway, as a YAML file would have it."""
    fields: dict[str, Any] = {"name": contender.policy}
    if contender.policy == "replicate":
        # Twice the mean: the paper's fixed timeout, for a law of any scale.
        mean_s = parse_delay(experiment.delay).mean_s
        fields["hedge_after"] = experiment.replicate_after or f"{2 * mean_s:.6f}s"
    if experiment.max_approximate is not None:
        fields["max_approximate"] = experiment.max_approximate
    model, codes = (
        experiment.model,
        ["replicate" if grid == 1 else f"cifar10-collage-{grid}x{grid}" for grid in experiment.grids],
    )
    if experiment.own is not None:
        model, codes = str(experiment.own.card), list(experiment.own.codes)
    return {
        "model": model,
        "replicas": {"count": contender.replicas},
        "backups": {"count": contender.backups},
        "codes": codes,
        "policy": {**fields, **experiment.policy_fields},
        "delay": experiment.delay,
        # An open loop that sends too much should be seen as latency, as in the simulations it is compared with.
        "max_outstanding": 4096,
    }


def _bounded(experiment: Experiment, records: Sequence[RequestRecord], counters: Counters) -> dict[str, Any]:
    """Gives the share of approximate answers, and the p99 of who knows every draw and spends no more than was spent.

    What was spent are the approximate answers, and the further exact attempts: hedges and 1x1 passes of backups.
    """
    approximate = sum(record.source in FILLS for record in records) / len(records)
    further = counters.get("hedges", 0.0) + counters.get("backup_passes[replicate]", 0.0)
    costs = [_cost(experiment, grid) for grid in experiment.grids]
    best_s = ideal_quantile(
        parse_delay(experiment.delay),
        0.99,
        hedges=further / len(records),
        approximate=approximate,
        fill_cost=min(costs),
        items=len(records),
    )
    return {
        "max_approximate": experiment.max_approximate,
        "approximate": approximate,
        "ideal_p99_ms": best_s * 1e3,
    }


def _cost(experiment: Experiment, grid: int) -> float:
    """Gives the cost of a pass that holds `grid` times `grid` items, relative to a replica's."""
    return 1.0 if grid == 1 else load_card(shipped.card_path(f"cifar10-collage-{grid}x{grid}")).relative_cost


def _above_zero(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name}: must be a finite number above zero, found {value:g}")
    return value


async def _measure(
    url: str, experiment: Experiment, contender: Contender, progress: RequestsDone, access: ClientAccess, *, keys: bool
) -> tuple[list[RequestRecord], Counters]:
    target = await _target(url, experiment, access)
    before = await read_counters(url, access)
    answered = 0

    def count(record: RequestRecord) -> None:
        nonlocal answered
        answered += 1
        progress(contender.label, answered, experiment.requests)

    records = await drive(target, experiment.times_s(), keys=keys, on_answer=count)
    return records, (await read_counters(url, access)).since(before)


async def _target(url: str, experiment: Experiment, access: ClientAccess) -> Target:
    if experiment.own is None:
        served = load_card(shipped.card_path(experiment.model)).name
        with np.load(shipped.IMAGES, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    else:
        served, images, labels = experiment.own.name, experiment.own.images, experiment.own.answers
    try:
        response = await request_once(url, f"/v2/models/{served}", access)
    except BackendError as error:
        raise EvenkeelError(f"{without_password(url)} cannot be reached: {error}") from error
    if response.status != 200:
        raise EvenkeelError(f"{without_password(url)} serves no model {served!r} (it says {response.status})")
    try:
        name = orjson.loads(response.body)["inputs"][0]["name"]
    except (LookupError, TypeError, ValueError) as error:
        raise EvenkeelError(f"{without_password(url)} does not say what model {served!r} takes: {error}") from error
    return Target(url, served, name, images, labels, access)


def _simulate(experiment: Experiment, contender: Contender) -> tuple[list[RequestRecord], Counters]:
    config = read_config(server_config(experiment, contender))
    costs = tuple(_cost(experiment, grid) for grid in experiment.grids)
    fleet = Fleet(contender.replicas, contender.backups, experiment.grids, costs)
    records, stats = simulate(
        config.policy, parse_delay(experiment.delay), experiment.times_s(), fleet, config.health, experiment.seed
    )
    counters = Counters(items=stats.items, extra_passes=stats.extra_passes, hedges=stats.hedges)
    counters.update({f"fills[{code}]": count for code, count in stats.fills.items()})
    counters.update({f"backup_passes[{code}]": count for code, count in stats.passes.items()})
    return records, counters


def _keep(folder: Path, contender: Contender, records: Sequence[RequestRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with RecordWriter(folder / f"{contender.label}.jsonl") as writer:
        for record in records:
            writer.write(record)
