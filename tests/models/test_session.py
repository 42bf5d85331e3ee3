"""ONNX Runtime sessions: weights from beside the model, and nothing sent to anybody."""

import ast
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from evenkeel.backends.worker.model import load_model
from evenkeel.errors import ConfigurationError
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.measure import ModelSession
from evenkeel.models.session import open_session
from evenkeel.models.shipped import card_path
from onnx_bytes import FLOAT, UINT8, block, model, node, number, value, whole, wholes

SRC = Path(__file__).parents[2] / "src"
CLASSES = 10
IMAGE = np.full((1, 32, 32, 3), 7, np.uint8)


def write_model(folder: Path, factor: float) -> Path:
    """A card beside a model of `factor` times the mean colour, whose weights are in the file `weights.data`."""
    folder.mkdir()
    weights = np.full((3, CLASSES), factor, np.float32)
    (folder / "weights.data").write_bytes(weights.tobytes())
    elsewhere = block(13, block(1, "location") + block(2, "weights.data")) + number(14, 1)
    tensor = number(1, 3) + number(1, CLASSES) + number(2, FLOAT) + block(8, "weights") + elsewhere
    nodes = [
        node("Cast", ["images"], "a", whole("to", FLOAT)),
        node("ReduceMean", ["a"], "b", wholes("axes", [1, 2]), whole("keepdims", 0)),
        node("MatMul", ["b", "weights"], "scores"),
    ]
    inputs, outputs = [value("images", UINT8, ("n", 32, 32, 3))], [value("scores", FLOAT, ("n", CLASSES))]
    file = folder / "model.onnx"
    file.write_bytes(model(nodes, inputs, outputs, [tensor]))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = dataclasses.replace(load_card(card_path("cifar10-base")), file=file.name, sha256=digest)
    save_card(card, folder / "model.json")
    return folder / "model.json"


def test_weights_that_are_replaced_while_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_model(tmp_path / "own", 2.0)

    def slowly(file: Path, threads: int = 1) -> object:
        (file.parent / "weights.data").write_bytes(np.full((3, CLASSES), 5.0, np.float32).tobytes() + b"newer")
        return open_session(file, threads)

    monkeypatch.setattr("evenkeel.backends.worker.model.open_session", slowly)
    with pytest.raises(ConfigurationError, match="its weights were replaced while read"):
        load_model(str(card))


@pytest.mark.parametrize("relative", [False, True])
def test_weights_come_from_beside_the_model_and_not_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    write_model(tmp_path / "other", 5.0)
    card = write_model(tmp_path / "own", 2.0)
    monkeypatch.chdir(tmp_path / "other")
    if relative:
        card = Path("../own/model.json")
    for scores in (
        load_model(str(card)).run(IMAGE),
        BlackBox.open(card).scores(IMAGE),
        BlackBox.open(card.with_suffix(".onnx")).scores(IMAGE),
        ModelSession.open(card.with_suffix(".onnx"))(IMAGE),
    ):
        assert np.allclose(scores, 2.0 * 3 * 7)


def test_weights_that_are_missing_are_named_although_the_working_directory_has_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "other", 5.0)
    card = write_model(tmp_path / "own", 2.0)
    (tmp_path / "own" / "weights.data").unlink()
    monkeypatch.chdir(tmp_path / "other")
    for opened in (load_model, BlackBox.open):
        with pytest.raises(ConfigurationError, match=r"its weights are in weights\.data, which is not beside it"):
            opened(str(card))


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="threads must be 1 or more"):
        open_session(tmp_path / "x.onnx", 0)


def run(code: str, **environment: str) -> str:
    kept = {name: text for name, text in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment = {**kept, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def importers() -> list[str]:
    """Our modules that import onnxruntime, anywhere in them."""
    found = []
    for path in sorted((SRC / "evenkeel").rglob("*.py")):
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in each.names] if isinstance(each, ast.Import) else []
            names += [each.module or ""] if isinstance(each, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                found.append(".".join(path.relative_to(SRC).with_suffix("").parts))
    return list(dict.fromkeys(found))


def test_only_one_module_makes_sessions() -> None:
    makers = [path.name for path in (SRC / "evenkeel").rglob("*.py") if "InferenceSession(" in path.read_text()]
    assert makers == ["session.py"]


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    modules = importers()
    assert "evenkeel.models.session" in modules
    if not (find_spec("torch") and find_spec("onnx")):
        modules = [name for name in modules if ".vision." not in name]
    for module in modules:
        code = (
            "import os, sys\n"
            "class Watch:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'onnxruntime': print('found', os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
            "sys.meta_path.insert(0, Watch())\n"
            f"import {module}\n"
            "from evenkeel.models.session import open_session\n"
            "from evenkeel.models.shipped import model_path\n"
            "open_session(model_path('cifar10-base'))\n"
        )
        assert run(code).split() == ["found", "1"]


def test_a_users_own_setting_is_kept() -> None:
    code = "import os, evenkeel; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, ORT_DISABLE_TELEMETRY="0").strip() == "0"


def test_a_loaded_model_opens_no_socket_and_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import json, os\n"
        "from evenkeel.backends.worker.model import load_model\n"
        "load_model('cifar10-base')\n"
        "links = [os.path.join('/proc/self/fd', name) for name in os.listdir('/proc/self/fd')]\n"
        "print(json.dumps([os.readlink(link) for link in links if os.path.islink(link)]))\n"
    )
    opened = json.loads(run(code, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path)))
    assert not [name for name in opened if name.startswith("socket:") or "onnxruntime.db" in name]
    assert not list(tmp_path.iterdir())
