"""A light classifier for a cascade: from `evenkeel fit --grid 1` to the cards that both models are served by."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from evenkeel.cli.main import main
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.images.resize import resized
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card
from evenkeel.models.measure import ModelSession
from evenkeel.vision.fit.light import _WholeImages
from evenkeel.vision.networks.architecture import TileNet
from fit_helpers import easy_pixels, trained_a_little

PIXELS, LABELS = easy_pixels(600, 0)
MEANS = np.stack([PIXELS[label == LABELS].mean((0, 1, 2)) for label in range(10)])


def classifier(path: Path, height: int, width: int, layout: str = "NCHW", datatype: int = TensorProto.FLOAT) -> Path:
    """Knows flat colours, from images of any size: floats of 0..1, or bytes."""
    scale = 255.0 if datatype == TensorProto.UINT8 else 1.0
    weight = (MEANS / 255 / scale).T.astype(np.float32) * 400
    bias = (-((MEANS / 255) ** 2).sum(1) / 2 * 400).astype(np.float32)
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    shape = ["n", 3, height, width] if layout == "NCHW" else ["n", height, width, 3]
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("Gemm", ["mean", "w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", datatype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    from evenkeel.models import measure
    from evenkeel.vision.fit import size

    monkeypatch.setattr(size, "_ROUNDS", 5)
    monkeypatch.setattr(measure, "LATENCY_ROUNDS", 5)
    monkeypatch.setattr(size, "sizes", lambda side, coarse=False, widest=128: [size.Size((16, 24, 32))])


@pytest.mark.parametrize(
    ("height", "width", "layout", "datatype"),
    [
        (32, 32, "NCHW", TensorProto.FLOAT),
        (40, 72, "NHWC", TensorProto.UINT8),
        (48, 48, "NCHW", TensorProto.UINT8),
    ],
)
def test_a_light_classifier_takes_items_as_the_classifier_does(
    height: int, width: int, layout: str, datatype: int, tmp_path: Path
) -> None:
    path = classifier(tmp_path / "colours.onnx", height, width, layout, datatype)
    large = np.stack([resized(image, height, width) for image in PIXELS])
    np.savez(tmp_path / "images.npz", images=large, labels=LABELS)
    arguments = ["fit", "--classifier", str(path), "--images", str(tmp_path / "images.npz"), "--grid", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--held-out", "100", "--epochs", "6"]
    result = CliRunner().invoke(main, [*arguments, "--weights", "fresh"])
    assert result.exit_code == 0, result.output
    whole, light = (load_card(tmp_path / "out" / f"{name}.json") for name in ("colours", "colours-light"))
    for field in ("kind", "classes", "height", "width", "layout", "datatype", "normalisation_inside", "mean", "std"):
        assert getattr(light, field) == getattr(whole, field), field
    assert light.agreement is not None
    assert light.agreement.value > 0.7
    pixels = Pixels.from_card(whole)
    items = np.stack([pixels.finish(image) for image in large[:50]])
    scores = ModelSession.open(tmp_path / "out" / light.file)(items)
    assert (scores.argmax(1) == LABELS[:50]).mean() > 0.6
    written = (tmp_path / "out" / "cascade.yaml").read_text()
    assert "kind: cascade" in written
    assert "evenkeel certify" in written
    assert not (tmp_path / "out" / "serve.yaml").exists()


def test_collages_and_a_light_classifier_may_be_fitted_together(tmp_path: Path) -> None:
    path = classifier(tmp_path / "colours.onnx", 32, 32)
    np.savez(tmp_path / "images.npz", images=PIXELS)
    arguments = ["fit", "--classifier", str(path), "--images", str(tmp_path / "images.npz"), "--grid", "2,1"]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--held-out", "100", "--epochs", "1"]
    result = CliRunner().invoke(main, [*arguments, "--weights", "fresh", "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert {"serve.yaml", "cascade.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "light" in (tmp_path / "out" / "cascade.yaml").read_text()
    assert "light" not in (tmp_path / "out" / "serve.yaml").read_text()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (47, 33), (200, 130)])
def test_images_are_shrunk_in_the_graph_as_they_are_everywhere(height: int, width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    black_box = BlackBox.open(classifier(tmp_path / "c.onnx", height, width, "NHWC", TensorProto.UINT8))
    network = trained_a_little(TileNet(10, (16, 24, 32)))
    rng = np.random.default_rng(0)
    images = np.stack([resized(rng.integers(0, 256, (9, 9, 3), np.uint8), height, width) for _ in range(3)])
    tiles = []
    network.register_forward_pre_hook(lambda module, inputs: tiles.append(inputs[0]))
    with torch.no_grad():
        _WholeImages(network, 32, black_box)(torch.from_numpy(images))
        small = np.stack([resized(image, 32, 32, interpolation="bicubic") for image in images])
        whole = classifier(tmp_path / "d.onnx", 32, 32, "NHWC", TensorProto.UINT8)
        _WholeImages(network, 32, BlackBox.open(whole))(torch.from_numpy(small))
    # Pillow rounds to whole pixels, twice; tiles are divided by 255 times their spread.
    assert torch.allclose(tiles[0], tiles[1], atol=2.5 / 255 / 0.2)
