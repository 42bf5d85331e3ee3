"""Coded training on Flower, in Flower's simulation or with a SuperLink and SuperNodes as processes on this machine:

    python examples/flower/coded.py
    python examples/flower/coded.py --supernodes

Install it beside evenkeel in a virtual environment of its own:

    python -m venv venv-flower && venv-flower/bin/pip install -c examples/flower/constraints.txt -e '.[flower]'
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.serverapp import ServerApp

from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.flower import CodedStrategy, coded_client
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.store import BlockStore
from evenkeel.training.coded.training import TrainingPlan

NODES, ROWS, COLUMNS = 5, 60, 6
FOLDER = "EVENKEEL_FLOWER_FOLDER"  # the variable that names the folder that all processes of a run share


def examples(node: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(node)
    table = random.normal(size=(ROWS, COLUMNS))
    noise = random.normal(size=ROWS)
    return table, (table @ np.arange(1, COLUMNS + 1) + noise > 0).astype(float)


def make(context) -> Device:
    node = int(context.node_config["partition-id"])
    return Device(f"node{node}", examples(node), BlockStore(Path(os.environ[FOLDER]) / f"node{node}"))


client = coded_client(make)
server = ServerApp()


@server.main()
def main(grid, context) -> None:
    strategy = CodedStrategy(
        NODES,
        lambda partitions, sizes: linear_code("balanced:copies=2", partitions, sizes=sizes),
        TrainingPlan(Logistic(), 1.0, (0.0, 1.0), tolerance=1e-6),
    )
    strategy.start(grid, timeout=120.0)
    assert strategy.model is not None
    part = Path(os.environ[FOLDER]) / "part.npz"
    np.savez(part, weights=strategy.model.weights, rounds=strategy.model.rounds)
    part.replace(part.with_name("model.npz"))


def simulate(folder: Path) -> None:
    """Runs server and nodes in Flower's simulation."""
    from flwr.simulation import run_simulation  # it loads Ray, which would slow down each start of a ClientApp

    os.environ[FOLDER] = str(folder)
    run_simulation(server, client, NODES, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})


def run_supernodes(folder: Path, timeout_s: float) -> None:
    """Runs server and nodes under a SuperLink and SuperNodes on loopback, and ends these whatever happens."""
    scripts = Path(sysconfig.get_path("scripts"))
    link, *nodes = [f"{port}" for port in free_ports(1 + NODES)]
    home = folder / "flwr"
    home.mkdir()
    # Fleet and Control APIs both answer at the SuperLink's HTTP port; its gRPC ports are of the past.
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = os.environ | {
        FOLDER: str(folder),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # each message waits for it, and it is a second otherwise
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(
                [str(scripts / command[0]), *command[1:]], env=environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def fail(what: str, name: str) -> None:
        said = (folder / f"{name}.log").read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([f"{what}; the last lines of {name}.log:", *said]))

    end = time.monotonic() + timeout_s
    local = ("--insecure", "--host", "127.0.0.1", "--port")
    try:
        start("superlink", "flower-superlink", *local, link, "--disable-runtime-dependency-installation")
        while not answers(int(link)):
            if started["superlink"].poll() is not None or time.monotonic() > end:
                fail("the SuperLink did not start", "superlink")
            time.sleep(0.2)
        for node, port in enumerate(nodes):
            where = ("--superlink", f"127.0.0.1:{link}", "--node-config", f"partition-id={node}")
            start(f"supernode{node}", "flower-supernode", *local, port, *where)
        start("run", "flwr", "run", str(Path(__file__).parent), "local", "--stream")
        model = folder / "model.npz"
        while not model.exists():
            for name in started:
                if started[name].poll() is not None and not model.exists():
                    fail(f"{name} ended before the model was there", name)
            if time.monotonic() > end:
                fail(f"no model after {timeout_s:g} s", "run")
            time.sleep(0.2)
    finally:
        end_processes(list(started.values()), folder)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end_processes(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Ends the processes, and what they started: Flower gives some of that sessions of its own."""
    for process in started:
        process.terminate()
    end = time.monotonic() + 10.0
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    mark = f"{FOLDER}={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):  # on Linux: whatever else has this run's folder
        try:
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
        except OSError:  # it has ended, or is another user's
            continue


def report(folder: Path) -> None:
    with np.load(folder / "model.npz") as model:
        weights, rounds = model["weights"], int(model["rounds"])
    objective, gradient = 0.5 * float(weights @ weights), weights.copy()
    for each in range(NODES):
        table, labels = examples(each)
        signs = 2 * labels - 1
        objective += float(Logistic().cost(table @ weights, signs).sum())
        gradient += table.T @ Logistic().slope(table @ weights, signs)
    steepest = np.abs(gradient).max()
    print(f"{rounds} rounds; objective {objective:.6f}; largest part of the exact gradient at the end: {steepest:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coded training on Flower.")
    parser.add_argument("--supernodes", action="store_true", help="a SuperLink and SuperNodes, each a process")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a run with SuperNodes may take")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that SuperNodes are ended then, too
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if options.supernodes:
            run_supernodes(Path(folder), options.timeout)
        else:
            simulate(Path(folder))
        report(Path(folder))
