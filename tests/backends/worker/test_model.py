"""Models that a worker can load, and what is said of those that it cannot."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest

from evenkeel.backends.worker.model import load_model
from evenkeel.bench.fills.float_input import with_float_input
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import IMAGES, card_path, model_path

BASE, COLLAGE = "cifar10-base", "cifar10-collage-3x3"


@pytest.fixture
def changed(tmp_path):
    """Gives the path of a copy of a shipped card with some fields changed, beside a copy of its model."""

    def change(name=BASE, **fields):
        shutil.copy(model_path(name), tmp_path)
        path = tmp_path / "card.json"
        save_card(dataclasses.replace(load_card(card_path(name)), **fields), path)
        return str(path)

    return change


def test_a_shipped_classifier_knows_its_images():
    model = load_model(str(card_path(BASE)))
    card = load_card(card_path(BASE))
    assert (model.name, model.input_shape, model.output_shape, model.dtype) == (BASE, (32, 32, 3), (10,), "uint8")
    assert model.relative_cost == card.relative_cost
    with np.load(IMAGES) as file:
        images, labels = file["images"][:100], file["labels"][:100]
    scores = model.run(images)
    assert scores.shape == (100, 10)
    assert card.accuracy is not None
    assert (scores.argmax(1) == labels).mean() == pytest.approx(card.accuracy.value, abs=0.15)


def test_a_shipped_collage_gives_scores_for_each_cell():
    model = load_model(f"spare={card_path(COLLAGE)}")
    assert (model.name, model.output_shape) == ("spare", (9, 10))
    assert model.run(np.zeros((2, *model.input_shape), np.uint8)).shape == (2, 9, 10)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sha256": "0" * 64}, "field 'sha256' is 0000"),
        ({"file": "gone.onnx"}, "gone.onnx cannot be read"),
        ({"input_name": "pixels"}, "field 'input_name' is 'pixels', the model's inputs are "),
        ({"output_name": "logits"}, "field 'output_name' is 'logits', the model's outputs are "),
        ({"datatype": "FP32"}, "must be float32"),
        ({"normalisation_inside": False}, "must be float32"),
        ({"height": 31}, r"the card says rows of \(31, 32, 3\)"),
        ({"classes": ("cat", "dog")}, r"one row gives \(1, 10\), the card says \(1, 2\)"),
    ],
)
def test_a_card_that_contradicts_its_model_is_refused_by_name(changed, fields, says):
    with pytest.raises(ConfigurationError, match=says):
        load_model(changed(**fields))


def test_a_file_that_is_no_model_is_refused(changed, tmp_path):
    (tmp_path / "cifar10-base.onnx").write_bytes(b"not a model")
    path = tmp_path / "card.json"
    card = load_card(card_path(BASE))
    save_card(dataclasses.replace(card, sha256=hashlib.sha256(b"not a model").hexdigest()), path)
    with pytest.raises(ConfigurationError, match="is not an ONNX model that can be run"):
        load_model(str(path))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_rows_are_normalised_as_the_card_says(layout):
    from evenkeel.backends.worker.model import _normaliser

    card = dataclasses.replace(
        load_card(card_path(BASE)), layout=layout, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), normalisation_inside=False
    )
    rows = np.random.default_rng(0).integers(0, 256, (2, *card.input_shape)).astype(np.uint8)
    axes = (3,) if layout == "NHWC" else (3, 1, 1)
    expected = (rows / 255 - np.reshape(card.mean, axes)) / np.reshape(card.std, axes)
    normalised = _normaliser(card)(rows)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, expected, atol=1e-5)


def test_a_python_model_comes_from_a_module_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "users_model.py").write_text(
        "def make():\n"
        "    run = lambda rows: rows + 1\n"
        "    run.input_shape, run.output_shape, run.dtype = [4, 4], (4, 4), 'float32'\n"
        "    run.relative_cost = 0.25\n"
        "    return run\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    for spec in ("python:users_model:make", f"python:{tmp_path / 'users_model.py'}:make"):
        model = load_model(spec)
        known = (model.name, model.input_shape, model.output_shape, model.dtype, model.relative_cost)
        assert known == ("users_model", (4, 4), (4, 4), "float32", 0.25)
        np.testing.assert_array_equal(model.run(np.zeros((1, 4, 4))), np.ones((1, 4, 4)))
    assert load_model("mine=python:users_model:make").name == "mine"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "No such file"),
        ("import not_there", "No module named 'not_there'"),
        ("x = 1", "has no attribute 'make'"),
        ("def make(): raise RuntimeError('no weights')", "its factory raised RuntimeError: no weights"),
        ("def make(): return 7", "must return a callable, not int"),
        (
            "def make():\n    def run(x): return x\n    run.input_shape = 'wide'\n    return run",
            "its input_shape must be",
        ),
        ("def make():\n    def run(x): return x\n    run.dtype = 'colour'\n    return run", "its dtype 'colour'"),
        (
            "def make():\n    def run(x): return x\n    run.relative_cost = 0\n    return run",
            "its relative_cost must be",
        ),
    ],
)
def test_a_python_model_that_cannot_be_had_says_why(tmp_path, source, says):
    path = tmp_path / "wrong.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigurationError, match=says):
        load_model(f"python:{path}:make")


@pytest.mark.parametrize("named", ["", "mine="])
def test_a_path_may_hold_an_equals_sign(tmp_path, named, monkeypatch):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    for path in (card_path(BASE), model_path(BASE)):
        (folder / path.name).write_bytes(path.read_bytes())
    card = folder / card_path(BASE).name
    assert load_model(f"{named}{card}").name == (named.rstrip("=") or BASE)
    monkeypatch.chdir(tmp_path)
    assert load_model(f"{named}{card.relative_to(tmp_path)}").name == (named.rstrip("=") or BASE)


@pytest.mark.parametrize("spec", ["python:", "python:module", "python::make", "nowhere.json"])
def test_a_spec_that_names_nothing_is_refused(spec):
    with pytest.raises(ConfigurationError):
        load_model(spec)


def test_what_a_code_has_normalised_is_not_normalised_again(changed, tmp_path):
    # The same graph, for float32 rows that come normalised from the code of a parity model.
    content = with_float_input(model_path(BASE).read_bytes(), "images")
    (tmp_path / "float.onnx").write_bytes(content)
    fields = {
        "file": "float.onnx",
        "sha256": hashlib.sha256(content).hexdigest(),
        "datatype": "FP32",
        "normalisation_inside": False,
    }
    rows = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    inputs = load_model(changed(**fields)).run(rows)
    parity = load_model(changed(**fields, kind="parity", encoder="sum", group=2)).run(rows)
    plain = load_model(changed(**{**fields, "normalisation_inside": True})).run(rows)
    np.testing.assert_array_equal(parity, plain)
    assert np.abs(inputs - plain).max() > 0.01
