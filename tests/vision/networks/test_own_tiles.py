"""A collage's tiles, read by the classifier itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evenkeel.models.black_box import BlackBox
from evenkeel.vision.networks.architecture import count_macs
from evenkeel.vision.networks.own_tiles import OwnTiles

RANDOM = np.random.default_rng(0)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def classifier(path: Path, kind: int, layout: str, channels: int = 3) -> Path:
    """A convolution, the mean of its map, a matrix; of floats or of bytes."""
    weights = {
        "w": RANDOM.normal(size=(6, channels, 3, 3)).astype(np.float32),
        "m": RANDOM.normal(size=(6, 5)).astype(np.float32),
    }
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]))
    nodes += [
        helper.make_node("Conv", ["t" if layout == "NHWC" else "f", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["y"]),
    ]
    shape = ["n", 16, 16, channels] if layout == "NHWC" else ["n", channels, 16, 16]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "layout", "channels", "bgr"),
    [
        (TensorProto.FLOAT, "NCHW", 3, False),
        (TensorProto.FLOAT, "NHWC", 3, True),
        (TensorProto.UINT8, "NHWC", 3, False),
        (TensorProto.FLOAT, "NCHW", 1, False),
    ],
)
def test_a_tile_gets_the_scores_of_the_image(tmp_path: Path, kind: int, layout: str, channels: int, bgr: bool) -> None:
    path = classifier(tmp_path / "c.onnx", kind, layout, channels)
    numbers = {} if kind == TensorProto.UINT8 else {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    box = BlackBox.open(path, bgr=bgr, **numbers)
    images = RANDOM.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    shown = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    shown = (shown - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    network = OwnTiles(box, 16, MEAN, STD)
    with torch.no_grad():
        found = network(shown).numpy()
        wanted = box.scores(images)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        network.scale_scores(0.5)
        np.testing.assert_allclose(network(shown), found / 2, rtol=1e-5)
    assert OwnTiles(box, 8, MEAN, STD)(shown[:, :, :8, :8]).shape == (4, 5)
    assert count_macs(network, (3, 16, 16)) == 16 * 16 * 6 * channels * 9 + 6 * 5
