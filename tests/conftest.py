"""Skips test modules whose optional packages are not installed, so that they can import them in plain lines."""

import ast
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

import evenkeel  # noqa: F401 - before any test imports onnxruntime, which it keeps from sending usage data

# The same examples in every run, so that a change is judged by what it does; HYPOTHESIS_PROFILE=default tries others.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TESTS = Path(__file__).parent
# What `pip install evenkeel[train]` brings.
EXTRAS = {"numba", "onnx", "pyarrow", "torch"}
# Whatever is tested in these folders imports torch itself, or starts a process that does.
NEED_TORCH = ("coding/sums", "reducers", "training/hook", "vision")


def needed(path: Path) -> set[str]:
    """The optional packages that a test module imports at its top, or that its folder needs."""
    roots = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    if any(path.is_relative_to(TESTS / folder) for folder in NEED_TORCH):
        roots |= {"torch", "onnx"}
    return roots & EXTRAS


class Skipped(pytest.Module):
    """A module that is reported as skipped, with what it lacks."""

    def collect(self):
        missing = sorted(name for name in needed(self.path) if find_spec(name) is None)
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[train]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if all(find_spec(name) for name in needed(module_path)):
        return None
    return Skipped.from_parent(parent, path=module_path)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names long bytes by their parameter: a gzip file holds the time, and two workers must collect the same tests."""
    return argname if isinstance(val, bytes) and len(val) > 20 else None
