"""Does coded training end where it would have ended undisturbed, although devices and the coordinator are killed?

Real processes on this machine: devices are killed and started again at random, one is gone for good, one joins late
with new data and one without, and the coordinator is killed twice. The objective at the end is compared with that of
a training in one process, with all data there from the beginning. Exit code 0 if they agree to 1e-9.

    python benchmarks/coded_churn.py --rounds 200
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import LocalDevices
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.tcp_link import TcpDevices
from evenkeel.training.coded.training import TrainingPlan, train

DEVICES, COLUMNS = 8, 12
KEY = "0123456789abcdef0123456789abcdef"


def data() -> list[tuple[np.ndarray, np.ndarray]]:
    """The devices' examples; the last pair joins late."""
    source = np.random.default_rng(0)
    truth = source.normal(size=COLUMNS)
    pairs = []
    for size in source.integers(60, 90, DEVICES + 1):
        table = source.normal(size=(size, COLUMNS))
        pairs.append((table, (table @ truth + source.normal(size=size) > 0).astype(float)))
    return pairs


def plan(rounds: int) -> TrainingPlan:
    return TrainingPlan(Logistic(), 60.0, (0.0, 1.0), "gd", rounds, 0.0, 2.0, 0.5, True)


def coordinator(link, folder: Path | None) -> Coordinator:
    settings = CodedSettings(wait_s=60.0, gone_after_rounds=25, inspect_every=10, least_wait_s=0.2)
    return Coordinator(
        link, lambda count, sizes: linear_code("balanced:copies=3", count, sizes=sizes), settings, folder
    )


def coordinate(folder: Path, address: str, rounds: int, pace_s: float) -> None:
    """The coordinator's process: says each round on its output."""
    link = TcpDevices(address, KEY.encode())
    made = coordinator(link, folder / "memory")
    made.set_up(DEVICES)

    def say(progress) -> None:
        decoded = len(progress.evaluation.decoded)
        print(json.dumps({"round": progress.round, "value": progress.value, "decoded": decoded}), flush=True)
        time.sleep(pace_s)

    model = train(made, plan(rounds), say)
    np.savez(folder / "model.npz", weights=model.weights)
    facts = {"setup_bytes": made.setup_bytes, "repair_bytes": made.repair_bytes, "excluded": made.excluded}
    (folder / "facts.json").write_text(json.dumps(facts))


class Run:
    """All processes of a run."""

    def __init__(self, folder: Path, rounds: int, pace_s: float) -> None:
        self.folder, self.rounds, self.pace_s = folder, rounds, pace_s
        self.address = "tcp://127.0.0.1:0"
        self.environment = {**os.environ, "EVENKEEL_DEVICE_KEY": KEY}
        self.devices: dict[str, subprocess.Popen] = {}
        probe = TcpDevices(key=KEY.encode())
        self.address = probe.address
        probe.close()

    def device(self, name: str, with_data: bool = True) -> None:
        own = ["--data", str(self.folder / f"{name}.npz")] if with_data else []
        self.devices[name] = subprocess.Popen(
            [
                *(sys.executable, "-m", "evenkeel.training.coded.device_process", "--coordinator", self.address),
                *("--name", name, "--store", str(self.folder / f"store-{name}"), "--parent-pid", str(os.getpid())),
                *own,
            ],
            env=self.environment,
            stdout=subprocess.DEVNULL,
        )

    def coordinator(self) -> subprocess.Popen:
        arguments = ["--coordinate", str(self.folder), "--address", self.address]
        arguments += ["--rounds", str(self.rounds), "--pace", str(self.pace_s)]
        return subprocess.Popen(
            [sys.executable, __file__, *arguments], env=self.environment, stdout=subprocess.PIPE, text=True
        )

    def kill(self, name: str) -> None:
        process = self.devices.pop(name)
        process.kill()
        process.wait()


def churn(folder: Path, rounds: int, pace_s: float, seed: int) -> dict:
    pairs, chance = data(), random.Random(seed)
    for place, (table, labels) in enumerate(pairs):
        np.savez(folder / f"device{place}.npz", X=table, y=labels)
    run = Run(folder, rounds, pace_s)
    for place in range(DEVICES):
        run.device(f"device{place}")
    process = run.coordinator()
    kills_at = [rounds * 3 // 10, rounds * 13 // 20]
    gone, late, helper = "device0", f"device{DEVICES}", "helper"
    events = {rounds // 8: "gone", rounds // 5: "join", rounds * 2 // 5: "helper"}
    counts = {"killed": 0, "started": 0, "coordinator_killed": 0, "decoded_rounds": 0}
    seen = 0
    try:
        while True:
            line = process.stdout.readline()
            if not line:
                if process.wait():
                    raise SystemExit(f"the coordinator ended with exit code {process.returncode}")
                break
            said = json.loads(line)
            counts["decoded_rounds"] += bool(said["decoded"])
            seen = max(seen, said["round"])
            for at in [at for at in events if at <= seen]:
                what = events.pop(at)
                if what == "gone" and gone in run.devices:
                    run.kill(gone)
                elif what == "join":
                    run.device(late)
                elif what == "helper":
                    run.device(helper, with_data=False)
            # At most two of those that come back are away, so that the code survives the one that is gone, too.
            away = [f"device{place}" for place in range(1, DEVICES) if f"device{place}" not in run.devices]
            if seen % 3 == 0 and seen < rounds * 17 // 20:
                if len(away) == 2 or (away and chance.random() < 0.5):
                    run.device(chance.choice(away))
                    counts["started"] += 1
                else:
                    run.kill(chance.choice([name for name in run.devices if name not in (gone, late, helper)]))
                    counts["killed"] += 1
            if kills_at and seen >= kills_at[0]:
                kills_at.pop(0)
                counts["coordinator_killed"] += 1
                process.kill()
                process.wait()
                process.stdout.close()
                process = run.coordinator()
    finally:
        process.kill()
        process.wait()
        for name in list(run.devices):
            run.kill(name)
    weights = np.load(folder / "model.npz")["weights"]
    return {"weights": weights, **counts, **json.loads((folder / "facts.json").read_text())}


def objective(weights: np.ndarray) -> float:
    total, count = 0.0, 0
    for table, labels in data():
        total += float(Logistic().cost(table @ weights, 2 * labels - 1).sum())
        count += len(labels)
    return total / count + plan(1).l2 / count / 2 * float(weights @ weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--pace", type=float, default=0.1, help="Seconds after each round.")
    parser.add_argument("--seed", type=int, default=1, help="Of who is killed when.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--coordinate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.coordinate:
        coordinate(given.coordinate, given.address, given.rounds, given.pace)
        return 0
    devices = [Device(f"device{place}", pair) for place, pair in enumerate(data())]
    undisturbed = coordinator(LocalDevices(devices), None)
    undisturbed.set_up(DEVICES + 1)
    wanted = objective(train(undisturbed, plan(given.rounds)).weights)
    with tempfile.TemporaryDirectory() as folder:
        found = churn(Path(folder), given.rounds, given.pace, given.seed)
    weights = found.pop("weights")
    reached = objective(weights)
    facts = {"rounds": given.rounds, "objective": reached, "undisturbed": wanted, "apart": abs(reached / wanted - 1)}
    facts |= found
    print(json.dumps(facts, indent=1))
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not facts["apart"] <= 1e-9)


if __name__ == "__main__":
    sys.exit(main())
