"""Every sum is exact in a network that loses, doubles and reorders, while workers and servers restart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from switch_packets import RULES, needs_compiler, why_no_kernel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "switch_exactly_once.py"
WHY_NOT = why_no_kernel()
pytestmark = needs_compiler


def ran(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--fragments", "30000", "--restart-every", "500", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_sum_is_wrong_and_nothing_stands_still(seed, tmp_path):
    file = tmp_path / "rows.json"
    done = ran("--seed", str(seed), "--loss", "0.03", "--twice", "0.03", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["policy"] for row in rows] == list(RULES)
    for row in rows:
        assert row["finished"] >= 30000
        assert (row["wrong"], row["stuck"]) == (0, 0)
        assert min(row["worker_restarts"], row["server_restarts"], row["lost"], row["doubled"]) > 10
        assert row["switch_completed"] > 0


def test_a_rule_that_adds_twice_is_found_out():
    done = ran("--broken", "--policies", "esa")
    assert done.returncode == 1
    assert "wrong 0 " not in done.stdout


@pytest.mark.root
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_the_kernel_goes_the_same_way_step_by_step(tmp_path):
    rows = []
    for where in ((), ("--kernel",)):
        file = tmp_path / "rows.json"
        done = ran("--fragments", "5000", "--policies", "unlimited,atp,esa,assoc", "--json", str(file), *where)
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(json.loads(file.read_text())["rows"])
    for user, kernel in zip(*rows, strict=True):
        differ = {name for name in user if user[name] != kernel[name]}
        assert differ <= {"by", "seconds"}
