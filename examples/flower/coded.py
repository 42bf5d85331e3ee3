"""Coded training on Flower, with local SuperNodes: python examples/flower/coded.py

Install it beside evenkeel in a virtual environment of its own:

    python -m venv venv-flower && venv-flower/bin/pip install -c examples/flower/constraints.txt -e '.[flower]'
"""

import tempfile
from pathlib import Path

import numpy as np
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.flower import CodedStrategy, coded_client
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.store import BlockStore
from evenkeel.training.coded.training import TrainingPlan

NODES, ROWS, COLUMNS = 5, 60, 6
FOLDER = Path(tempfile.mkdtemp())


def examples(node: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(node)
    table = random.normal(size=(ROWS, COLUMNS))
    noise = random.normal(size=ROWS)
    return table, (table @ np.arange(1, COLUMNS + 1) + noise > 0).astype(float)


def make(context) -> Device:
    node = int(context.node_config["partition-id"])
    return Device(f"node{node}", examples(node), BlockStore(FOLDER / f"node{node}"))


client = coded_client(make)
strategy = CodedStrategy(
    NODES,
    lambda partitions, sizes: linear_code("balanced:copies=2", partitions, sizes=sizes),
    TrainingPlan(Logistic(), 1.0, (0.0, 1.0), tolerance=1e-6),
)
server = ServerApp()


@server.main()
def main(grid, context) -> None:
    strategy.start(grid, timeout=120.0)


if __name__ == "__main__":
    run_simulation(server, client, NODES, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    assert strategy.model is not None
    weights = strategy.model.weights
    gradient = weights.copy()
    for each in range(NODES):
        table, labels = examples(each)
        gradient += table.T @ Logistic().slope(table @ weights, 2 * labels - 1)
    print(
        f"{strategy.model.rounds} rounds; largest part of the exact gradient at the end: {np.abs(gradient).max():.1e}"
    )
