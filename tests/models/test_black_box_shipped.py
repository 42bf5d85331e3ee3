"""The black box where only ONNX Runtime is installed: what is counted from a graph may be missing, nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card
from evenkeel.models.shipped import IMAGES, card_path, model_path


def test_a_shipped_model_answers_by_name_by_card_and_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with np.load(IMAGES) as shipped:
        images, labels = shipped["images"][:40], shipped["labels"][:40]
    card = load_card(card_path("cifar10-base"))
    by_name = BlackBox.open("cifar10-base")
    scores = by_name.scores(images)
    assert (scores.argmax(axis=1) == labels).mean() > 0.8
    assert np.allclose(scores, by_name.scores(images, batch=1), atol=1e-3)
    assert (by_name.sha256, by_name.class_names, by_name.kind) == (card.sha256, card.classes, "logits")
    assert (by_name.macs, by_name.parameters) == (card.macs, card.parameters)
    by_file = BlackBox.open(model_path("cifar10-base"))
    assert np.array_equal(by_file.scores(images), scores)
    assert (by_file.height, by_file.width, by_file.classes, by_file.macs) == (32, 32, 10, None)


def test_a_backup_is_no_classifier() -> None:
    with pytest.raises(ConfigurationError, match="a classifier is needed here"):
        BlackBox.open("cifar10-collage-3x3")
    with pytest.raises(ConfigurationError, match=r"no output may be scores \[n, classes\]; its outputs are scores"):
        BlackBox.open(model_path("cifar10-collage-3x3"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.onnx", None, "no such file; give an ONNX file"),
        ("x.onnx", b"\x80\x04K\x01.", "is not an ONNX model that can be run"),  # a pickle
        ("x.json", b"{}", "evenkeel_card"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        BlackBox.open(tmp_path / name)


def test_neither_images_nor_classifier_need_torch() -> None:
    code = "import sys, evenkeel.models.black_box, evenkeel.images.image_set; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "pyarrow", "onnx"} & set(loaded.stdout.split())
