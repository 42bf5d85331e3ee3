"""What does a switch in user space gain: in an exchange, in a training, with late workers, with packets that get lost?

sudo python benchmarks/switch_transport.py [--part exchange,train,late,loss] [--workers 4,8] [--losses 1%,10%]
    [--mnist train-images.gz] [--steps 60] [--seeds 1] [--json FILE]

`exchange` compares the time of one sum of THC messages with the wire's floor, and with shares: the floor is the busier
way's lanes over the rate that the lab measured for one direction of TCP. The other parts are calls of
`evenkeel bench gradients`, whose whole tables are printed. With `slow 5:0.1` the last worker, with `:all` each of them
independently, computes five times as slowly in a tenth of the steps. A synchronous step takes as long as its slowest
worker, so nothing can gain more than 1 + 4/10 in the first case, and more than 1 + 4 (1 - .9^n) in the second.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from output import show, write_json

from evenkeel.lab.cluster import Lab
from evenkeel.lab.topology import Topology
from evenkeel.text_values import read_rate_bps

COORDINATES = 1_330_000  # of the bench's MLP
ROUNDS, WARM = 20, 3
PORT = 9700
COLUMNS = {
    "rate": ("rate", ""),
    "workers": ("workers", "d"),
    "settings": ("settings", ""),
    "floor_ms": ("floor ms", ".1f"),
    "switch_ms": ("switch ms", ".1f"),
    "over_floor": ("over floor", ".2f"),
    "shares_ms": ("shares ms", ".1f"),
    "shares_over_switch": ("shares / switch", ".2f"),
    "resent": ("resent", "d"),
}


def exchange_as_rank(settings: str) -> None:
    """One rank's part: prints the seconds of each round as rank 0, over the switch and over shares."""
    import torch
    import torch.distributed as dist

    from evenkeel.coding.sums.thc import THC
    from evenkeel.coding.wire import Round
    from evenkeel.reducers.sharded import Sharded
    from evenkeel.reducers.switch import SwitchReducer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world, code = dist.get_rank(), dist.get_world_size(), THC()
    address = f"{Topology(world).switch_address}:{PORT}"
    switch, shares = SwitchReducer(address, **json.loads(settings)), Sharded()
    vector = torch.randn(COORDINATES, generator=torch.Generator().manual_seed(rank))
    took_s: dict[str, list[float]] = {"switch": [], "shares": []}
    for step in range(WARM + ROUNDS):
        this_round = Round(rank, world, step)
        stats = shares.ranks.largest(code.measure(vector, this_round))
        message, lanes = code.encode(vector, stats, this_round), code.lanes(COORDINATES, this_round)
        for name, reducer in (("switch", switch), ("shares", shares)):
            dist.barrier()
            begin = time.perf_counter()
            reducer.total(code.wire(world), message, lanes, this_round)
            if step >= WARM:
                took_s[name].append(time.perf_counter() - begin)
    found = switch.stats()
    if rank == 0:
        up, down = 4, (settings and json.loads(settings).get("recode")) or code.wire(world).down_width
        floor_bytes = COORDINATES * max(up, down) / 8
        print("@", json.dumps({**took_s, "floor_bytes": floor_bytes, "resent": found.transport.resent}), flush=True)
    switch.close()
    dist.barrier()
    dist.destroy_process_group()


def exchange(rate: str, workers: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Measures one cell in a lab of its own."""
    found: dict[str, Any] = {}

    def hear(host: str, line: str, is_error: bool) -> None:
        if line.startswith("@ "):
            found.update(json.loads(line[2:]))
        elif is_error:
            print(host, line, file=sys.stderr)

    topology = Topology(workers, rate_bps=read_rate_bps(rate, "rate"))
    server = (sys.executable, "-m", "evenkeel", "switch", "run", "--quiet")
    bind = ("--bind", f"{topology.switch_address}:{PORT}")
    with Lab(topology) as lab, lab.beside((*server, *bind)):
        checked = lab.check_rate()
        assert checked is not None
        lab.run(
            (sys.executable, __file__, "--as-rank", json.dumps(settings)),
            hear,
            inherited={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    floor_s = 8 * found["floor_bytes"] / min(checked.there_bps, checked.back_bps)
    switch_s, shares_s = statistics.median(found["switch"]), statistics.median(found["shares"])
    return {
        "rate": rate,
        "workers": workers,
        "settings": ",".join(f"{name}={value}" for name, value in settings.items()) or "-",
        "floor_ms": 1e3 * floor_s,
        "switch_ms": 1e3 * switch_s,
        "shares_ms": 1e3 * shares_s,
        "over_floor": switch_s / floor_s,
        "shares_over_switch": shares_s / switch_s,
        "resent": found["resent"],
    }


def training(name: str, *options: str) -> list[dict[str, Any]]:
    """Runs `evenkeel bench gradients`, and gives its rows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "evenkeel", "bench", "gradients", "--json", str(rows), *options]
        print(f"\n{name}: evenkeel bench gradients {' '.join(options)}", flush=True)
        subprocess.run(command, check=True)
        found: list[dict[str, Any]] = json.loads(rows.read_bytes())["rows"]
    return [{"part": name, **row} for row in found]


@click.command()
@click.option("--part", "parts", default="exchange,train,late,loss", show_default=True, help="What to measure.")
@click.option("--workers", default="4,8", show_default=True, help="Numbers of workers, for exchange and train.")
@click.option("--losses", default="0,1%,5%,10%", show_default=True, help="Shares of packets to lose, for loss.")
@click.option(
    "--steps", type=int, help="Steps of each training; default: 60, and 20 with losses, where TCP takes seconds."
)
@click.option("--seeds", default=1, show_default=True, help="Seeds of each training.")
@click.option("--mnist", type=click.Path(path_type=Path), help="Images; made up by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the rows.")
@click.option("--as-rank", hidden=True)
def main(
    parts: str,
    workers: str,
    losses: str,
    steps: int | None,
    seeds: int,
    mnist: Path | None,
    json_path: Path | None,
    as_rank: str | None,
) -> None:
    """Measure what a switch in user space gains."""
    if as_rank is not None:
        exchange_as_rank(as_rank)
        return
    rows: list[dict[str, Any]] = []
    common = ["--steps", str(steps or 60), "--seeds", str(seeds), *(["--mnist", str(mnist)] if mnist else [])]
    if "exchange" in parts:
        cells: list[tuple[str, int, dict[str, Any]]] = [
            (rate, int(count), settings)
            for rate in ("100mbit", "1gbit")
            for count in workers.split(",")
            for settings in ({}, {"recode": 5})
        ]
        found = [exchange(*cell) for cell in cells]
        show("One sum of THC messages of 1.33 M coordinates", found, COLUMNS)
        rows += [{"part": "exchange", **row} for row in found]
    if "train" in parts:
        methods = ("--methods", "thc,thc@switch,thc@switch:recode=5", "--rates", "100mbit,1gbit")
        for count in workers.split(","):
            rows += training(f"{count} workers", *methods, "--workers", count, *common)
    if "late" in parts:
        block = "thc:block=1024"
        methods = ("--methods", f"{block},{block}@switch,{block}@switch:deadline=20ms", "--rates", "1gbit")
        for slow in ("5:0.1", "5:0.1:all"):
            rows += training(f"slow {slow}", *methods, "--slow", slow, *common)
    if "loss" in parts:
        # Besides there is always fp32: DDP's own ring over Gloo and TCP, which is the slowest by far with losses.
        for loss in losses.split(","):
            methods = ("--methods", "thc,thc@switch", "--rates", "100mbit")
            rows += training(f"loss {loss}", *methods, "--loss", loss, *common, "--steps", str(steps or 20))
    if json_path is not None:
        arguments = {
            "parts": parts,
            "workers": workers,
            "losses": losses,
            "steps": steps,
            "seeds": seeds,
            "mnist": mnist is not None,
        }
        write_json(json_path, {**arguments, "mnist": mnist is not None}, rows)


if __name__ == "__main__":
    main()
