"""Imports point one way (docs/design.md), and serving stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "evenkeel"

LEAVES = {"errors", "clock", "delays", "text_values", "figures", "images", "models", "processes"}

# Room -> rooms it may import from, besides its own and those leaves that every room may use.
ALLOWED = {
    "coding": set(),
    "oip": set(),
    "backends": {"coding", "oip"},
    "serving": {"backends", "oip", "coding"},
    "vision": {"coding", "images"},
    "bench": {"serving", "backends", "oip", "coding", "reducers", "training", "lab", "vision"},
    "reducers": {"coding"},
    "training": {"reducers", "coding"},
    "lab": set(),
    "cli": {"serving", "backends", "bench", "vision", "lab", "training"},
    "__main__": {"cli"},
    "__init__": {"coding", "reducers", "training"},  # on first use only
    **{leaf: set() for leaf in LEAVES},
}
FILES = sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "evenkeel" and len(words) > 1 and words[1] != "__version__":
                rooms.add(words[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    assert own in ALLOWED, f"{own} is a new room: say in ALLOWED and in docs/design.md what it may import"
    wrong = imported_rooms(path) - ALLOWED[own] - LEAVES - {own}
    assert not wrong, f"{path.relative_to(SRC)} imports {sorted(wrong)}"


def test_modules_say_what_they_export() -> None:
    for path in FILES:
        if path.name in {"__main__.py"} or (path.name == "__init__.py" and "import" not in path.read_text()):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        exported = {
            name.value
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            for name in node.value.elts  # type: ignore[attr-defined]
        }
        assert exported, f"{path.relative_to(SRC)} has no __all__"
        defined = {getattr(node, "name", None) for node in tree.body} | {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for name in getattr(target, "elts", [target]):
                    defined.add(getattr(name, "id", None))
        assert exported <= defined, f"{path.relative_to(SRC)} exports {exported - defined}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("evenkeel.serving.service", {"torch", "matplotlib", "rich", "pyarrow", "onnx", "onnxruntime"}),
        ("evenkeel.bench.fills.command", {"torch", "pyarrow", "onnx"}),
        ("evenkeel.backends.worker.main", {"torch", "matplotlib", "rich", "aiohttp", "httptools", "prometheus_client"}),
        ("evenkeel", {"torch", "numpy"}),
        ("evenkeel.cli.main", {"torch", "matplotlib", "rich", "aiohttp", "httptools", "numpy", "onnxruntime"}),
    ],
)
def test_what_serves_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not heavy & set(loaded.stdout.split())
