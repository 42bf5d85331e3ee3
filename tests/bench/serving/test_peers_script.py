"""The benchmark beside other servers: which evenkeel it serves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[3]


def test_the_tree_that_the_script_stands_in_is_served_whatever_is_installed(tmp_path):
    shutil.copytree(TREE / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    package = tmp_path / "src" / "evenkeel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('served from ' + __file__)\n")
    rows = tmp_path / "rows.json"
    script = str(tmp_path / "benchmarks" / "peers.py")
    done = subprocess.run(
        [sys.executable, script, "--only", "evenkeel", "--json", str(rows)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TREE / "src")},
    )
    assert done.returncode == 0, done.stderr
    text = rows.read_text()
    [row] = json.loads(text)["rows"]
    assert row["not_run"].endswith("served from .../__main__.py")
    assert str(tmp_path) not in text, "a reason names no folder of this machine"
