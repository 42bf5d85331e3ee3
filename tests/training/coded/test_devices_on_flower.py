"""The same coordinator drives Flower's nodes; only where Flower is installed (examples/flower/constraints.txt)."""

import importlib
import importlib.util
import re
import subprocess
import sys
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
