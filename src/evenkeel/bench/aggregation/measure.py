"""Simulates every policy in every cell: one thing is varied at a time, and all else stays at a middle cell."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.errors import ConfigurationError
from evenkeel.switch.jobs import Workload, make_jobs, recorded_spread
from evenkeel.switch.simulator import POLICIES, SimulatedNetwork, SimulatedRun, simulate, window_of
from evenkeel.text_values import unknown

__all__ = ["QUESTIONS", "AggregationCell", "cells_of", "check_policies", "measure"]

_SHORT_SERVER_S = 5e-6


@dataclass(frozen=True, slots=True)
class AggregationCell:
    """Holds one setting: `load` is all workers' windows over the slots, one window a job."""

    question: str
    value: str
    jobs: int = 8
    workers: int = 8
    load: float = 4.0
    skew: str = "0.1"
    loss: float = 0.0
    rate_gbps: float = 100.0
    mix: str = "mixed"
    server_delay_s: float = _SHORT_SERVER_S
    servers: int = 0
    racks: int = 1


# Question -> the cells beside the middle one, by what they are called: few first, which are run by default.
QUESTIONS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "load": tuple((f"{load:g}", {"load": load}) for load in (1.0, 4.0, 8.0, 0.5, 2.0)),
    "regime": (
        ("equal jobs", {"mix": "equal"}),
        ("far server", {"server_delay_s": 5 * _SHORT_SERVER_S}),
        ("no skew", {"skew": "0"}),
        ("models", {"mix": "models", "rate_gbps": 10.0}),
        ("equal, load 8", {"mix": "equal", "load": 8.0}),
        ("2 servers", {"servers": 2}),
        ("tree of 4 racks", {"racks": 4}),
    ),
    "skew": tuple((text, {"skew": text}) for text in ("0.5", "pai", "0.05", "0")),
    "rate": tuple((f"{rate:g}", {"rate_gbps": rate, "mix": "models"}) for rate in (10.0, 25.0, 100.0)),
    "jobs": tuple((str(jobs), {"jobs": jobs}) for jobs in (2, 4, 8, 16, 32)),
    "workers": tuple((str(workers), {"workers": workers}) for workers in (4, 8, 16, 32)),
    "loss": tuple((f"{loss:g}", {"loss": loss}) for loss in (0.0, 1e-4, 1e-3, 1e-2)),
}
_QUICK = {"load": 3, "regime": 3, "skew": 2, "rate": 1}


def cells_of(questions: Iterable[str], *, full: bool, middle: Mapping[str, Any]) -> list[AggregationCell]:
    """Gives the cells of the questions; of all that there are where none is named: by default the few quick ones.

    Raises:
        ConfigurationError: no such question.
    """
    named = list(dict.fromkeys(questions))
    for question in named:
        if question not in QUESTIONS:
            raise unknown("vary", question, list(QUESTIONS))
    cells = []
    for question in named or (QUESTIONS if full else _QUICK):
        values = QUESTIONS[question]
        for value, changes in values if full or named else values[: _QUICK[question]]:
            cells.append(AggregationCell(question, value, **{**middle, **changes}))
    return cells


def check_policies(policies: Iterable[str]) -> tuple[str, ...]:
    """Gives the policies, each once, and all but the infinite memory where none is named.

    Raises:
        ConfigurationError: no such policy.
    """
    named = tuple(dict.fromkeys(policies)) or tuple(POLICIES)[1:]
    for policy in named:
        if policy not in POLICIES:
            raise unknown("policy", policy, list(POLICIES))
    return named


def measure(
    cells: Iterable[AggregationCell],
    policies: Iterable[str],
    *,
    steps: int,
    megabytes: float,
    seed: int,
    stragglers: Path | None = None,
    arrivals: Path | None = None,
    advance: Callable[[str], object] = lambda policy: None,
) -> list[dict[str, Any]]:
    """Simulates each policy in each cell, on the same jobs.

    Raises:
        ConfigurationError: a cell that cannot be, or a file that cannot be read.
        EvenkeelError: a job did not end.
    """
    spread = None if stragglers is None else recorded_spread(stragglers)
    rows = []
    for cell in cells:
        rate_bps = cell.rate_gbps * 1e9
        # A window of whole packets at any rate: at 10 Gbit/s a round trip holds few of 4 KB.
        network = SimulatedNetwork(
            rate_bps=rate_bps,
            fragment_bytes=4096 if cell.rate_gbps >= 50 else 1024,
            server_delay_s=cell.server_delay_s,
            racks=cell.racks,
            servers=cell.servers,
            loss=cell.loss,
        )
        workload = Workload(
            jobs=cell.jobs, workers=cell.workers, mix=cell.mix, skew=cell.skew, steps=steps, rate_bps=rate_bps,
            megabytes=megabytes * (1.0 if cell.rate_gbps >= 50 else 0.25), shrink=64 * 16 / megabytes, seed=seed,
        )  # fmt: skip
        jobs = make_jobs(workload, spread, arrivals)
        slots = 1 << max(0, round(log2(cell.jobs * window_of(network) / cell.load)))
        infinite = simulate("unlimited", jobs, network, 1, seed=seed)
        for policy in policies:
            advance(policy)
            if policy == "ring" and (cell.loss or cell.racks > 1):
                continue  # the ring is a formula, which knows neither loss nor trees
            run = infinite if policy == "unlimited" else simulate(policy, jobs, network, slots, seed=seed)
            if run.wrong:
                raise ConfigurationError(f"{policy}: {run.wrong} simulated sums were wrong; please report this")
            rows.append(_row(cell, policy, slots, run, infinite))
    return rows


def _row(cell: AggregationCell, policy: str, slots: int, run: SimulatedRun, infinite: SimulatedRun) -> dict[str, Any]:
    speeds = infinite.times_s / run.times_s
    p95_s, infinite_p95_s = (float(np.quantile(each.times_s, 0.95)) for each in (run, infinite))
    return {
        "question": cell.question,
        "value": cell.value,
        "policy": policy,
        "jobs": cell.jobs,
        "workers": cell.workers,
        "slots": slots,
        "load": cell.load,
        "skew": cell.skew,
        "loss": cell.loss,
        "rate_gbps": cell.rate_gbps,
        "mix": cell.mix,
        "server_delay_s": cell.server_delay_s,
        "servers": cell.servers or cell.jobs,
        "racks": cell.racks,
        "mean_jct_s": float(run.times_s.mean()),
        "p95_jct_s": p95_s,
        "jct_over_infinite": float(run.times_s.mean() / infinite.times_s.mean()),
        "p95_over_infinite": p95_s / infinite_p95_s,
        "in_switch_share": run.in_switch / run.fragments,
        "server_bytes": run.server_bytes,
        "evictions_per_fragment": run.evictions / run.fragments,
        "slots_useful_share": run.slots_useful,
        "slots_waiting_share": run.slots_waiting,
        "fairness": float(speeds.sum() ** 2 / (len(speeds) * (speeds**2).sum())),
        "wrong_sums": run.wrong,
        "events": run.events,
    }
