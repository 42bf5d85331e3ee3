"""The example trains, and differs from plain DDP by two lines."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).parents[3] / "examples" / "ddp_with_thc.py"


def test_the_example_trains(tmp_path: Path) -> None:
    labels = np.arange(600) % 3
    images = np.random.default_rng(0).normal(size=(600, 8)) + 3 * np.eye(3, 8)[labels]
    np.savez(tmp_path / "data.npz", images=images.astype(np.float32), labels=labels)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), "--data", str(tmp_path / "data.npz"), "--epochs", "3"]
    ended = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=60, check=True)
    assert "epoch 2: 9" in ended.stdout
    assert "MB per rank" in ended.stdout


def test_the_example_says_two_lines_and_has_two() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert sum("state = " in line or "register_comm_hook" in line for line in text.splitlines()) == 2
