"""Models that travel to nodes without a common file system."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evenkeel.backends.ray_actors.parcels import Parcel, pack, unpack
from evenkeel.backends.worker.model import load_model
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import card_path


def test_a_card_arrives_with_its_file_and_is_the_same_model(tmp_path: Path) -> None:
    spec = str(card_path("cifar10-base"))
    parcel = pack(spec)
    there = load_model(unpack(parcel, tmp_path / "there"))
    here = load_model(spec)
    assert (there.name, there.digest) == (here.name, here.digest)
    rows = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    assert np.array_equal(there.run(rows), here.run(rows))


def test_weights_beside_the_file_travel_and_nothing_else_that_a_graph_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"do not send")
    names = ("weights.bin", "../secret", str(secret))
    graph = b"".join(b"\x0a\x08location\x12" + bytes([len(name)]) + name.encode() for name in names)
    here = tmp_path / "here"
    (here / "deep").mkdir(parents=True)
    (here / "deep" / "model.onnx").write_bytes(graph)
    (here / "deep" / "weights.bin").write_bytes(b"weights")
    card = replace(load_card(card_path("cifar10-base")), file="deep/model.onnx")
    save_card(card, here / "card.json")
    parcel = pack(f"mine={here / 'card.json'}")
    assert set(parcel.files) == {"card.json", "deep/model.onnx", "deep/weights.bin"}
    assert unpack(parcel, tmp_path / "there") == f"mine={tmp_path}/there/card.json"
    assert (tmp_path / "there" / "deep" / "weights.bin").read_bytes() == b"weights"


def test_a_python_file_travels_and_a_module_does_not(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text("def make():\n    return lambda rows: rows * 2\n")
    model = load_model(unpack(pack(f"double=python:{tmp_path}/twice.py:make"), tmp_path / "there"))
    assert model.name == "double"
    assert model.digest.startswith("python:")
    for spec in ("cifar10-base", "python:package.module:make"):
        assert pack(spec) == Parcel(spec)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone.py: No such file"):
        pack(f"python:{tmp_path}/gone.py:make")
    with pytest.raises(ConfigurationError, match=r"gone.json"):
        pack(str(tmp_path / "gone.json"))


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "."])
def test_a_file_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="lies outside of its folder"):
        unpack(Parcel("spec", {name: b"x"}), tmp_path / "there")
    assert not list(tmp_path.rglob("out"))
