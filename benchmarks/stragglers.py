"""How much shorter is the tail? Ratios of latency between policies, under one law of delays, at several loads.

    python benchmarks/stragglers.py                           # real processes, half an hour
    python benchmarks/stragglers.py --simulated               # a virtual clock, two minutes
    python benchmarks/stragglers.py --simulated --replicas 36 --backups 4

Every policy meets the same arrivals and the same delays, so ratios are of pairs and their intervals come from a paired
bootstrap. `none@10` and `hedge@10` have the backup's node as a tenth replica: equal resources.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from output import show, write_json

from evenkeel.bench.serving.measure import Experiment, Run, parse_contender, run_all
from evenkeel.figures.estimates import Estimate, quantile_ratio, sd_ratio

BEST = "collage+hedge"
COLUMNS = {
    "load": ("load", ".1f"),
    "policy": ("policy", ""),
    "mean_ms": ("mean ms", ".1f"),
    "sd_ms": ("sd", ".1f"),
    "p95_ms": ("p95", ".1f"),
    "p99_ms": ("p99", ".1f"),
    "p999_ms": ("p99.9", ".1f"),
    "hedged": ("hedged", ".1%"),
    "filled": ("filled", ".1%"),
    "filled_1x1_or_2x2": ("by 1x1, 2x2", ".1%"),
    "extra_load": ("extra", ".1%"),
    "accuracy": ("right", ".1%"),
    "failed": ("failed", ".2%"),
    f"p99_over_{BEST}": ("p99 ratio", ".2f"),
    f"p99_over_{BEST}_low": ("from", ".2f"),
    f"p99_over_{BEST}_high": ("to", ".2f"),
    f"p999_over_{BEST}": ("p99.9 ratio", ".2f"),
    f"sd_over_{BEST}": ("sd ratio", ".2f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true", help="on a virtual clock")
    parser.add_argument("--delay", default="two-mode:scale=0.3")
    parser.add_argument("--loads", default="0.3,0.5,0.7")
    parser.add_argument("--requests", type=int, default=0, help="default: 10,000, or 60,000 simulated")
    parser.add_argument("--replicas", type=int, default=9)
    parser.add_argument("--backups", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="requests that arrive at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policies", default="", help="default: none and hedge, with and without the extra nodes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=Path, help="keep every request there")
    arguments = parser.parse_args()
    asyncio.run(compare(arguments))


async def compare(arguments: argparse.Namespace) -> None:
    everyone = arguments.replicas + arguments.backups
    names = (
        arguments.policies.split(",")
        if arguments.policies
        else [
            "none",
            f"none@{everyone}",
            "hedge",
            f"hedge@{everyone}",
        ]
    )
    rows: list[dict[str, Any]] = []
    for load in map(float, arguments.loads.split(",")):
        experiment = Experiment(
            delay=arguments.delay,
            load=load,
            replicas=arguments.replicas,
            backups=arguments.backups,
            requests=arguments.requests or (60_000 if arguments.simulated else 10_000),
            seed=arguments.seed,
            batch=arguments.batch,
        )
        contenders = [parse_contender(name, experiment) for name in [*names, BEST]]
        folder = arguments.records / f"load-{load}" if arguments.records else None
        runs = await run_all(experiment, contenders, simulated=arguments.simulated, records_folder=folder)
        rows += [row(run, runs[-1], load) for run in runs]
    title = f"{arguments.replicas} replicas + {arguments.backups} backups, {arguments.delay}"
    show(title, rows, COLUMNS)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    write_json(arguments.json, plain, rows)


def row(run: Run, best: Run, load: float) -> dict[str, Any]:
    theirs, ours = run.latencies_ms(), best.latencies_ms()
    paired = len(theirs) == len(ours)
    measured = run.row
    items = run.counters.get("items", 1.0)
    fills = {name[6:-1]: count for name, count in run.counters.items() if name.startswith("fills[")}
    figures: dict[str, Any] = {
        "policy": run.contender.label,
        "load": load,
        "requests": measured["requests"],
        **{name: measured[name] for name in ("mean_ms", "sd_ms", "p50_ms", "p95_ms", "p99_ms", "p999_ms")},
        "failed": measured["failed"],
        "hedged": run.counters.get("hedges", 0.0) / items,
        "extra_load": measured["extra_load"],
        "filled": measured["filled"],
        "filled_1x1_or_2x2": sum(fills.get(code, 0.0) for code in ("replicate", "collage2x2")) / items,
        "accuracy": measured["accuracy"],
    }
    if run is not best:
        for name, ratio in (
            ("p99", quantile_ratio(theirs, ours, 0.99, paired=paired)),
            ("p999", quantile_ratio(theirs, ours, 0.999, paired=paired)),
            ("sd", sd_ratio(theirs, ours, paired=paired)),
        ):
            figures |= told(f"{name}_over_{BEST}", ratio)
    return figures


def told(name: str, ratio: Estimate) -> dict[str, Any]:
    low, high = (None if np.isnan(bound) else bound for bound in (ratio.low, ratio.high))
    return {name: ratio.value, f"{name}_low": low, f"{name}_high": high}


if __name__ == "__main__":
    main()
