"""When is a reply late? The live p95 and the learned trigger, under laws with few and many stragglers.

    python benchmarks/triggers.py                    # a virtual clock, some three minutes
    python benchmarks/triggers.py --figure triggers.png

Every row meets the same arrivals and delays under both triggers; latencies are means over the seeds.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from output import show, write_json

from evenkeel.delays.laws import Delay, MarkovBursts, Pareto, ShiftedExponential, TwoMode
from evenkeel.serving.gateway.policy import AUTO_FILL, AUTO_HEDGE, Policy, Trigger, preset
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.ideal import ideal_quantile
from evenkeel.serving.simulate import Fleet, arrivals, simulate

P95 = Trigger(quantile=0.95)
POLICIES = {
    "none": preset("none"),
    "p90, no backup": preset("hedge", hedge_after=Trigger(quantile=0.9), max_extra_load=0.1),
    "p95": preset("collage+hedge", fill_after=P95, hedge_after=P95, max_extra_load=0.05, max_attempts=2),
    "auto": preset("collage+hedge"),
}
COLUMNS = {
    "law": ("law", ""),
    "policy": ("trigger", ""),
    "p50_ms": ("p50 ms", ".1f"),
    "p99_ms": ("p99", ".1f"),
    "ideal_p99_ms": ("p99, clairvoyant", ".1f"),
    "p999_ms": ("p99.9", ".1f"),
    "p999_low_ms": ("from", ".0f"),
    "p999_high_ms": ("to", ".0f"),
    "approximate": ("approximate", ".1%"),
    "hedged": ("hedged", ".1%"),
}


@dataclass(frozen=True)
class TwoNormals(Delay):
    """A body of 5 +- 2 ms, and stragglers of 50 +- 20 ms."""

    slow_share: float

    def draw(self, key: int, worker: int, now_s: float) -> float:
        slow, place = ((Pareto(seed=seed).draw(key, 0, 0.0) / 0.1) ** -1.5 for seed in (8, 9))
        mean, sd = (0.05, 0.02) if slow < self.slow_share else (0.005, 0.002)
        return max(mean + sd * NormalDist().inv_cdf(place), mean / 20)

    @property
    def mean_s(self) -> float:
        return 0.005 + self.slow_share * 0.045


LAWS: dict[str, Delay] = {
    "two-mode, none slow": TwoMode(slow_share=0.0),
    "two-mode, 2.1 % slow": TwoMode(),
    "two-mode, 6 %": TwoMode(slow_share=0.06),
    "two-mode, 10 %": TwoMode(slow_share=0.1),
    "two-mode, 20 %": TwoMode(slow_share=0.2),
    "5 +- 2 ms, 5 % of 50 +- 20": TwoNormals(0.05),
    "5 +- 2 ms, 10 %": TwoNormals(0.1),
    "Markov bursts, duty 10 %": MarkovBursts(duty=0.1),
    "Pareto 1.5": Pareto(),
    "exponential": ShiftedExponential(0.0, 5.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--replicas", type=int, default=9)
    parser.add_argument("--backups", type=int, default=1)
    parser.add_argument("--laws", default="", help="numbers of some of them, as in 0,3")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="only draw when fills and hedges may come")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # which nodes are slow, hundreds of times
    if arguments.figure:
        draw(arguments.figure)
        return
    chosen = [list(LAWS)[int(number)] for number in arguments.laws.split(",")] if arguments.laws else list(LAWS)
    rows = [measure(name, policy, arguments) for name in chosen for policy in POLICIES]
    show(f"{arguments.replicas} replicas, {arguments.backups} backups, load {arguments.load:g}", rows, COLUMNS)
    write_json(arguments.json, {name: str(value) for name, value in vars(arguments).items()}, rows)


def measure(name: str, policy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    law = LAWS[name]
    fleet = Fleet(replicas=arguments.replicas, backups=arguments.backups, costs=(1.0, 0.42, 0.55))
    runs = [one(law, POLICIES[policy], fleet, arguments, seed) for seed in range(arguments.seeds)]
    row = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    tails = [run["p999_ms"] for run in runs]
    return {"law": name, "policy": policy, **row, "p999_low_ms": min(tails), "p999_high_ms": max(tails)}


def one(law: Delay, policy: Policy, fleet: Fleet, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    times_s = arrivals(arguments.load * fleet.replicas / law.mean_s, arguments.requests, seed)
    records, stats = simulate(policy, law, times_s, fleet, seed=seed)
    p50, p99, p999 = np.percentile([record.latency_ms for record in records], [50, 99, 99.9])
    approximate = np.mean([record.source not in ("exact", "hedge") for record in records])
    # Who knows every draw, never waits, and spends no more approximate answers, hedges and 1x1 passes.
    further = (stats.hedges + stats.passes.get("replicate", 0)) / len(records)
    ideal_s = ideal_quantile(law, 0.99, hedges=further, approximate=float(approximate), fill_cost=min(fleet.costs))
    return {
        "p50_ms": p50,
        "p99_ms": p99,
        "ideal_p99_ms": 1e3 * ideal_s,
        "p999_ms": p999,
        "approximate": float(approximate),
        "hedged": stats.hedges / len(records),
    }


def draw(path: Path) -> None:
    """Draws the service times of four laws, and the moments that the triggers mean there."""
    from evenkeel.figures.drawing import GREY, PALETTE, drawing, save

    names = ("two-mode, 2.1 % slow", "two-mode, 10 %", "5 +- 2 ms, 10 %", "Pareto 1.5")
    with drawing(7.0, left=0.7, top=0.4) as figure:
        axes = figure.subplots(len(names), 1)
        for axis, name in zip(axes, names, strict=True):
            times_ms = 1e3 * np.array([LAWS[name].draw(key, 0, 0.0) for key in range(20_000)])
            longest = np.quantile(times_ms, 0.985) * 1.15
            axis.hist(times_ms, bins=np.linspace(0, longest, 160), color=GREY, alpha=0.5, log=True)
            live = LiveQuantiles()
            for time_ms in times_ms[:1000]:
                live.add(time_ms / 1e3)
            for trigger, colour, label in (
                (AUTO_HEDGE, PALETTE[2], "a hedge pays"),
                (AUTO_FILL, PALETTE[0], "a fill may answer"),
                (P95, PALETTE[1], "p95"),
            ):
                axis.axvline(1e3 * live.after(trigger), color=colour, label=label, linewidth=2)
            axis.set_title(name, loc="left", fontsize=9)
            axis.set(ylabel="tasks", xlim=(0, longest))
            axis.yaxis.set_major_formatter("{x:,.0f}")
        axes[0].legend(loc="upper center", ncols=3)
        axes[-1].set(xlabel="service time, ms")
        save(figure, path)


if __name__ == "__main__":
    main()
