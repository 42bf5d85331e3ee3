"""The same coordinator drives Flower's nodes; only where Flower is installed (examples/flower/constraints.txt)."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from evenkeel.errors import MissingExtraError

HAS_FLOWER = importlib.util.find_spec("flwr") is not None
EXAMPLE = Path(__file__).parents[3] / "examples" / "flower" / "coded.py"


@pytest.mark.skipif(HAS_FLOWER, reason="Flower is installed")
def test_without_flower_the_error_is_the_install_line() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'evenkeel\[flower\]'"):
        importlib.import_module("evenkeel.training.coded.flower")


@pytest.mark.skipif(not HAS_FLOWER, reason="pip install -c examples/flower/constraints.txt 'evenkeel[flower]'")
def test_the_example_ends_where_the_exact_gradient_vanishes() -> None:
    ran = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=110, check=True)
    steepest = re.search(r"gradient at the end: (\S+)", ran.stdout)
    assert steepest is not None, ran.stdout
    assert float(steepest[1]) < 1e-3


@pytest.mark.skipif(not HAS_FLOWER, reason="pip install -c examples/flower/constraints.txt 'evenkeel[flower]'")
def test_supernodes_that_take_too_long_are_ended_with_an_error(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), "--supernodes", "--timeout", "15"],
        capture_output=True, text=True, timeout=110, env=environment, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert re.search("no model after 15 s|the SuperLink did not start", ran.stderr), ran.stderr
    assert not list(tmp_path.iterdir())
    left = [each for each in Path("/proc").glob("[0-9]*/environ") if f"FLOWER_FOLDER={tmp_path}" in _text(each)]
    assert not left


def test_the_app_that_supernodes_run_is_what_the_example_defines() -> None:
    components = tomllib.loads(EXAMPLE.with_name("pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    assigned = {
        target.id
        for statement in ast.parse(EXAMPLE.read_text()).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    assert set(components) == {"serverapp", "clientapp"}
    for reference in components.values():
        module, name = reference.split(":")
        assert module == EXAMPLE.stem
        assert name in assigned


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""
