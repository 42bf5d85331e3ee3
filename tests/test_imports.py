"""Imports point one way (docs/design.md), without cycles, and what serves stays light."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "evenkeel"

# Every room may use these; they use no room but each other.
LEAVES = {"arrays", "clock", "errors", "files", "logs", "processes", "schema", "settings", "text_values", "version"}

# Room -> what it may import besides itself, the rooms inside it and the leaves. A name stands for itself and for all
# inside it. A room is a folder up to two levels deep; what lies deeper belongs to it.
ALLOWED: dict[str, set[str]] = {
    "bench": set(),
    "client": {"coding", "http_client", "oip", "promises.promise", "trust"},
    "delays": set(),
    "edge": {"backends", "coding.answers", "figures", "images", "models", "promises", "serving"},
    "figures": set(),
    "http2": {"http_client.client", "trust"},
    "http_client": {"trust"},
    "images": set(),
    "images.sources": {"images.decode", "images.memory"},
    "lab": set(),
    "oip": set(),
    "promises": set(),
    "trust": set(),
    "models": {"figures.estimates"},
    "coding": set(),
    "coding.answers": {"coding.code", "coding.checks", "images.resize", "models.cards"},
    "coding.sums": {"coding.saved_state", "coding.sum_code", "coding.wire", "coding.checks"},
    "backends": {"delays"},
    "backends.worker": {"backends.backend", "delays", "models", "trust"},
    "backends.lossy": {"backends.backend", "backends.worker.address", "backends.worker.key"},
    "backends.ray_actors": {"backends.worker", "models"},
    "backends.oip": {"backends.backend", "http2", "http_client", "models", "oip", "trust"},
    "reducers": {"coding.wire", "switch"},
    "reducers.ranks": {"coding.checks"},
    "serving": {
        "backends",
        "coding.code",
        "coding.answers",
        "delays",
        "figures.records",
        "models",
        "promises",
        "trust",
    },
    "serving.gateway": {"backends.backend", "coding.code", "coding.answers", "delays.laws", "promises"},
    "serving.discovery": set(),
    "serving.front": {"coding.code", "images", "models", "oip", "promises.promise", "serving.gateway", "trust"},
    "serving.http": {"coding.code", "models", "oip", "serving.front", "serving.gateway", "serving.live", "trust"},
    "serving.live": {"serving.gateway"},
    "serving.grpc": {"http2", "models", "oip", "serving.front", "serving.gateway", "serving.http.bodies", "trust"},
    "switch": set(),
    "training.hook": {
        "coding.saved_state",
        "coding.sum_code",
        "coding.wire",
        "coding.checks",
        "coding.sums",
        "reducers",
    },
    "training.plan": {
        "coding.sum_code",
        "coding.wire",
        "coding.answers",
        "coding.sums",
        "figures",
        "reducers",
        "training.hook",
    },
    "training.coded": {"backends.worker.address", "backends.worker.key", "coding.answers", "delays", "figures.records"},
    "training": set(),
    "vision": set(),
    "vision.networks": {"images", "models"},
    "vision.fit": {
        "backends.lossy.conceal",
        "backends.lossy.intervals",
        "coding.answers",
        "figures",
        "images",
        "models",
        "vision.networks",
    },
    "vision.peers": {"coding.answers", "models", "vision.networks"},
    "bench.serving": {"coding.code", "delays", "figures", "http_client", "images", "models", "oip", "serving"},
    "bench.fills": {"backends.worker.model", "coding.code", "coding.answers", "figures", "images", "models"},
    "bench.codes": {"coding.sum_code", "coding.wire", "coding.sums", "figures"},
    "bench.coded": {
        "coding.answers",
        "delays",
        "figures",
        "images",
        "training.coded.data_files",
        "training.coded.losses",
        "training.coded.matrix",
    },
    "bench.aggregation": {"figures", "switch"},
    "bench.modeless": {
        "backends.backend",
        "backends.lossy",
        "coding.answers",
        "edge.both_models",
        "figures",
        "images",
        "models",
        "promises",
    },
    "bench.gradients": {"coding.sum_code", "coding.sums", "figures", "images", "lab", "reducers", "training.hook"},
    "cli": {
        "backends.worker.main",
        "bench",
        "edge",
        "figures",
        "lab",
        "serving",
        "switch",
        "training.coded",
        "training.plan",
        "vision.fit",
    },
    "__main__": {"cli"},
    # On first use only.
    "__init__": {"coding", "reducers", "serving.gateway", "serving.simulate", "training"},
    "testing": {"backends", "reducers", "serving.simulate"},
    **{leaf: set() for leaf in LEAVES},
}
FILES = sorted(SRC.rglob("*.py"))


def module(path: Path) -> str:
    """`bench.fills.rows`, or the folder's name for its `__init__`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path): path for path in FILES}


def room(path: Path) -> str:
    folders = path.relative_to(SRC).parts[:-1]
    return ".".join(folders[:2]) or path.stem


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # A name is a module of its own, or stands in the module that it is imported from.
            pairs = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            names = [name if name.removeprefix("evenkeel.") in MODULES else home for name, home in pairs]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("evenkeel.") for name in names if name.split(".")[0] == "evenkeel"}
    return found


def inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    assert own in ALLOWED, f"{own} is a new room: say in ALLOWED and in docs/design.md what it may import"
    places = ALLOWED[own] | LEAVES | {own}
    wrong = [name for name in imported(path) if not any(inside(name, place) for place in places)]
    assert not wrong, f"{module(path)} imports {sorted(wrong)}"


def test_the_rooms_have_no_cycles() -> None:
    def rooms(place: str) -> set[str]:
        """Those that a name in `ALLOWED` opens: the room it is or lies in, and all rooms inside it."""
        around = max((room for room in ALLOWED if inside(place, room)), key=len, default=place)
        return {around, *(room for room in ALLOWED if inside(room, place))}

    # A room and the rooms inside it are one here: whether their files have a cycle, the next test says.
    arrows = {
        own: {name for place in places for name in rooms(place) if not inside(name, own) and not inside(own, name)}
        for own, places in ALLOWED.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"rooms that import each other: {error.args[1]}")


def test_no_modules_import_each_other() -> None:
    arrows = {name: imported(path) & MODULES.keys() - {name} for name, path in MODULES.items() if name != "__init__"}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"modules that import each other: {error.args[1]}")


def test_modules_say_what_they_export() -> None:
    for path in FILES:
        if path in {SRC / "__main__.py", SRC / "__init__.py"} or (
            path.name == "__init__.py" and "import" not in path.read_text()
        ):
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
        ("evenkeel.serving.service", {"torch", "matplotlib", "rich", "pyarrow", "onnx", "onnxruntime", "aiohttp"}),
        ("evenkeel.bench.serving.measure", {"torch", "aiohttp"}),
        ("evenkeel.bench.fills.command", {"torch", "pyarrow", "onnx"}),
        (
            "evenkeel.backends.worker.main",
            {"torch", "matplotlib", "rich", "aiohttp", "httptools", "prometheus_client", "pydantic"},
        ),
        ("evenkeel", {"torch", "numpy", "pydantic"}),
        ("evenkeel.serving.simulate", {"pydantic"}),
        (
            "evenkeel.cli.main",
            {"torch", "matplotlib", "rich", "aiohttp", "httptools", "numpy", "onnxruntime", "pydantic"},
        ),
    ],
)
def test_what_serves_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not heavy & set(loaded.stdout.split())


def named_types(tree: ast.Module) -> list[str]:
    """The classes of a file, and its type aliases: names at the top level that are written as classes are."""
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assigned = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    assigned += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names = [target.id for target in assigned if isinstance(target, ast.Name)]
    return classes + [name for name in names if re.match(r"_?[A-Z][a-z]", name)]


def test_no_two_classes_or_type_aliases_have_one_name() -> None:
    where: dict[str, list[str]] = {}
    for path in FILES:
        for name in named_types(ast.parse(path.read_text(encoding="utf-8"))):
            where.setdefault(name.strip("_"), []).append(module(path))
    assert {name: places for name, places in where.items() if len(places) > 1} == {}
