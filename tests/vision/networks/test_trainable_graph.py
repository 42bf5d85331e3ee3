"""The user's ONNX graph in PyTorch: equal to ONNX Runtime, trainable, at any resolution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from evenkeel.errors import ConfigurationError
from evenkeel.vision.networks.graph_steps import _steps, _with_own_padding
from evenkeel.vision.networks.reshape_alike import reshaped_alike
from evenkeel.vision.networks.trainable_graph import TrainableGraph

FLOATS = NDArray[np.float32]
RANDOM = np.random.default_rng(0)


def drawn(*shape: int) -> FLOATS:
    return RANDOM.normal(size=shape).astype(np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
    shape: Sequence[int | str] = ("n", 4, 8, 8),
    opset: int = 17,
) -> onnx.ModelProto:
    """A model from `x` to `y`."""
    whole = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def expected(model: onnx.ModelProto, images: FLOATS) -> FLOATS:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    scores: FLOATS = session.run(["y"], {"x": images})[0]
    return scores.reshape(len(images), -1)


def ours(model: onnx.ModelProto, images: FLOATS, own: tuple[int, ...] | None = None) -> FLOATS:
    made = TrainableGraph(model, "x", "y", own or (1, *images.shape[1:]))
    if own is not None:
        height, width = images.shape[2:]
        made.resize(height, width)
    with torch.no_grad():
        scores: FLOATS = made(torch.from_numpy(images)).numpy()
    return scores


def one(kind: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(kind, ["x", *inputs], ["y"], **attributes)]


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


W3 = drawn(6, 4, 3, 3)
OPERATORS: dict[str, tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]] = {
    "conv": (one("Conv", "w", "b", pads=[1, 1, 1, 1]), {"w": W3, "b": drawn(6)}),
    "conv stride, uneven pads": (one("Conv", "w", pads=[0, 1, 2, 1], strides=[2, 2]), {"w": W3}),
    "conv same upper": (one("Conv", "w", auto_pad="SAME_UPPER", strides=[2, 2]), {"w": W3}),
    "conv same lower": (one("Conv", "w", auto_pad="SAME_LOWER", strides=[2, 2]), {"w": drawn(6, 4, 4, 4)}),
    "conv dilated": (one("Conv", "w", dilations=[2, 2], pads=[2, 2, 2, 2]), {"w": W3}),
    "conv grouped": (one("Conv", "w", group=2), {"w": drawn(6, 2, 3, 3)}),
    "conv depthwise": (one("Conv", "w", group=4, pads=[1, 1, 1, 1]), {"w": drawn(4, 1, 3, 3)}),
    "max pool": (one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), {}),
    "max pool ceil": (one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), {}),
    "max pool uneven": (one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]), {}),
    "average pool": (one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), {}),
    "average pool counts": (one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), {}),
    "average pool same": (one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"), {}),
    "global average": (one("GlobalAveragePool"), {}),
    "global max": (one("GlobalMaxPool"), {}),
    "batch norm": (
        one("BatchNormalization", "s", "b", "m", "v", epsilon=1e-3),
        {"s": drawn(4), "b": drawn(4), "m": drawn(4), "v": drawn(4) ** 2 + 0.1},
    ),
    "instance norm": (one("InstanceNormalization", "s", "b"), {"s": drawn(4), "b": drawn(4)}),
    "layer norm": (one("LayerNormalization", "s", "b", axis=-1), {"s": drawn(8), "b": drawn(8)}),
    "local response": (one("LRN", size=3, alpha=0.1, beta=0.7, bias=1.5), {}),
    "clip": (one("Clip", "l", "h"), {"l": np.float32(-0.5), "h": np.float32(0.7)}),
    "clip above": (one("Clip", "", "h"), {"h": np.float32(0.1)}),
    "leaky": (one("LeakyRelu", alpha=0.2), {}),
    "prelu": (one("PRelu", "s"), {"s": drawn(4, 1, 1)}),
    "elu": (one("Elu", alpha=0.7), {}),
    "selu": (one("Selu"), {}),
    "hard sigmoid": (one("HardSigmoid", alpha=0.3, beta=0.4), {}),
    "hard swish": (one("HardSwish"), {}),
    "softplus": (one("Softplus"), {}),
    "erf": (one("Erf"), {}),
    "power": (one("Pow", "e"), {"e": np.float32(2)}),
    "add": (one("Add", "c"), {"c": drawn(4, 1, 1)}),
    "subtract": (one("Sub", "c"), {"c": drawn(8)}),
    "multiply": (one("Mul", "c"), {"c": drawn(1, 4, 8, 8)}),
    "divide": (one("Div", "c"), {"c": drawn(4, 1, 1) + 3}),
    "mean over sides": (one("ReduceMean", axes=[2, 3], keepdims=0), {}),
    "sum over an axis": (one("ReduceSum", "a", keepdims=1), {"a": ints(-1)}),
    "largest": (one("ReduceMax", axes=[1]), {}),
    "length": (one("ReduceL2", axes=[1]), {}),
    "transpose": (one("Transpose", perm=[0, 2, 3, 1]), {}),
    "slice": (one("Slice", "s", "e", "a", "t"), {"s": ints(1, 7), "e": ints(4, -9), "a": ints(1, 3), "t": ints(2, -2)}),
    "slice to the end": (one("Slice", "s", "e", "a"), {"s": ints(-5), "e": ints(2**62), "a": ints(2)}),
    "gather": (one("Gather", "p", axis=1), {"p": ints(2, 0, -1)}),
    "gather one": (one("Gather", "p", axis=2), {"p": np.int64(3)}),
    "pad": (one("Pad", "p", "v"), {"p": ints(0, 0, 1, 2, 0, 0, 0, 1), "v": np.float32(0.5)}),
    "pad by reflection": (one("Pad", "p", mode="reflect"), {"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}),
    "pad by edge": (one("Pad", "p", mode="edge"), {"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}),
    "depth to space": (one("DepthToSpace", blocksize=2), {}),
    "depth to space, columns first": (one("DepthToSpace", blocksize=2, mode="CRD"), {}),
    "space to depth": (one("SpaceToDepth", blocksize=2), {}),
    "flatten": (one("Flatten"), {}),
    "squeeze and back": (
        [
            helper.make_node("Unsqueeze", ["x", "a"], ["h"]),
            helper.make_node("Squeeze", ["h", "a"], ["y"]),
        ],
        {"a": ints(2)},
    ),
    "split and join": (
        [
            helper.make_node("Split", ["x", "s"], ["a", "b"], axis=1),
            helper.make_node("Concat", ["b", "a"], ["y"], axis=1),
        ],
        {"s": ints(1, 3)},
    ),
    "gemm": (
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1, alpha=0.5),
        ],
        {"w": drawn(5, 256), "b": drawn(5)},
    ),
    "where": (
        [
            helper.make_node("Equal", ["m", "z"], ["q"]),
            helper.make_node("Where", ["q", "x", "c"], ["y"]),
        ],
        {"m": ints(0, 1, 0, 1, 0, 1, 0, 1), "z": ints(0), "c": drawn(8)},
    ),
    "squeeze and excite": (
        [
            helper.make_node("GlobalAveragePool", ["x"], ["g"]),
            helper.make_node("Conv", ["g", "w"], ["s"]),
            helper.make_node("Sigmoid", ["s"], ["k"]),
            helper.make_node("Mul", ["x", "k"], ["y"]),
        ],
        {"w": drawn(4, 4, 1, 1)},
    ),
    "channels are shuffled": (
        [
            helper.make_node("Reshape", ["x", "a"], ["h"]),
            helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", ["t", "b"], ["y"]),
        ],
        {"a": ints(-1, 2, 2, 8, 8), "b": ints(0, 4, 8, 8)},
    ),
    "shape by parts": (
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "z"], ["n"]),
            helper.make_node("Unsqueeze", ["n", "a"], ["u"]),
            helper.make_node("Concat", ["u", "m"], ["t"], axis=0),
            helper.make_node("Reshape", ["x", "t"], ["y"]),
        ],
        {"z": np.int64(0), "a": ints(0), "m": ints(-1)},
    ),
    "weights of 8 bits": (
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=0),
            helper.make_node("Conv", ["x", "f"], ["y"]),
        ],
        {
            "w": RANDOM.integers(-9, 9, (6, 4, 3, 3)).astype(np.int8),
            "s": np.abs(drawn(6)) + 0.1,
            "z": np.zeros(6, np.int8),
        },
    ),
    "pool as large as its map, with borders": (one("AveragePool", kernel_shape=[8, 8], pads=[4, 4, 3, 3]), {}),
    "pool of all, named": (one("AveragePool", kernel_shape=[8, 8], auto_pad="VALID"), {}),
    "resize nearest": (one("Resize", "", "f", mode="nearest"), {"f": np.array([1, 1, 2, 1.5], np.float32)}),
    "resize as torch": (
        one("Resize", "", "f", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        {"f": np.array([1, 1, 2, 0.5], np.float32)},
    ),
    "resize linear": (one("Resize", "", "", "s", mode="linear"), {"s": ints(3, 4, 12, 5)}),
    "resize linear to corners": (
        one("Resize", "", "f", mode="linear", coordinate_transformation_mode="align_corners"),
        {"f": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize cubic": (one("Resize", "", "f", mode="cubic"), {"f": np.array([1, 1, 2, 0.5], np.float32)}),
    "transposed convolution": (
        one("ConvTranspose", "w", "b", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        {"w": drawn(4, 6, 3, 3), "b": drawn(6)},
    ),
    "einstein": (one("Einsum", "w", equation="nchw,cd->ndhw"), {"w": drawn(4, 6)}),
    "running sum": (one("CumSum", "a", exclusive=1, reverse=1), {"a": np.int64(1)}),
    "mean of two": (one("Mean", "c"), {"c": drawn(4, 1, 1)}),
    "remainder of floats": (one("Mod", "c", fmod=1), {"c": np.float32(0.7)}),
    "threshold": (one("ThresholdedRelu", alpha=0.3), {}),
    "wave": (one("Sin"), {}),
    "clip without bounds": (one("Clip"), {}),
    "part of a shape": (
        [
            helper.make_node("Shape", ["x"], ["s"], start=0, end=2),
            helper.make_node("Concat", ["s", "m"], ["t"], axis=0),
            helper.make_node("Reshape", ["x", "t"], ["y"]),
        ],
        {"m": ints(-1)},
    ),
    "flatten further back": (
        [
            helper.make_node("Flatten", ["x"], ["f"], axis=2),
            helper.make_node("Reshape", ["f", "t"], ["y"]),
        ],
        {"t": ints(-1, 256)},
    ),
    "weights of half precision": (
        [helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), helper.make_node("Conv", ["x", "f"], ["y"])],
        {"w": W3.astype(np.float16)},
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_of_onnx_runtime(name: str) -> None:
    nodes, constants = OPERATORS[name]
    model = graph(nodes, constants)
    images = drawn(3, 4, 8, 8)
    np.testing.assert_allclose(ours(model, images, (1, 4, 8, 8)), expected(model, images), rtol=1e-4, atol=1e-4)


def small_network(batch: int | str = "n") -> onnx.ModelProto:
    """A convolution, a pool over the whole map of 8x8, a Reshape to one row, a matrix and a softmax."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["p"], kernel_shape=[8, 8]),
        helper.make_node("Reshape", ["p", "t"], ["f"]),
        helper.make_node("Gemm", ["f", "m", "b"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], axis=1),
    ]
    constants = {"w": drawn(6, 3, 3, 3), "m": drawn(6, 5), "b": drawn(5), "t": ints(1, 6)}
    return graph(nodes, constants, (batch, 3, 8, 8))


def test_a_graph_for_one_image_takes_many_at_any_size() -> None:
    model = small_network(1)
    made = TrainableGraph(model, "x", "y", (1, 3, 8, 8))
    images = drawn(4, 3, 8, 8)
    alone = np.concatenate([expected(model, image[None]) for image in images])
    logits = made(torch.from_numpy(images))
    np.testing.assert_allclose(logits.softmax(1).detach().numpy(), alone, atol=1e-5)
    assert (logits < 0).any()  # not the softmax itself
    made.resize(13, 6)
    assert made(torch.zeros(7, 3, 13, 6)).shape == (7, 5)
    # The pool is over the whole map: an image repeated in all directions without borders has the same mean.
    tiled = torch.full((1, 3, 8, 8), 0.5)
    made.resize(8, 8)
    np.testing.assert_allclose(made(tiled).detach(), TrainableGraph(model, "x", "y", (1, 3, 8, 8))(tiled).detach())


def test_weights_learn_and_constants_do_not() -> None:
    made = TrainableGraph(small_network(), "x", "y", (1, 3, 8, 8))
    shapes = sorted(tuple(each.shape) for each in made.parameters())
    assert shapes == [(5,), (6, 3, 3, 3), (6, 5)]
    images, wanted = torch.from_numpy(drawn(16, 3, 8, 8)), torch.arange(16) % 5
    optimiser = torch.optim.SGD(made.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(made(images), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


class Attention(nn.Module):
    """A vision transformer of one layer, with a class token and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.patches(images).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1) + self.positions
        scores: torch.Tensor = self.head(self.layer(rows)[:, 0])
        return scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("free", [True, False], ids=["any number of images", "one image"])
def test_a_vision_transformer_is_resampled_or_refused(tmp_path: Path, free: bool) -> None:
    torch.manual_seed(0)
    network, path = Attention().eval(), tmp_path / "attention.onnx"
    axes = {"x": {0: "n"}, "y": {0: "n"}} if free else None
    torch.onnx.export(
        network, (torch.zeros(1, 3, 16, 16),), str(path), input_names=["x"], output_names=["y"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    if not free:  # torch's attention has the images on its second axis, and of one that leaves no trace
        with pytest.raises(ConfigurationError, match="free first axis"):
            TrainableGraph.load(path, "x", "y", (1, 3, 16, 16))
        return
    made = TrainableGraph.load(path, "x", "y", (1, 3, 16, 16))
    images = torch.from_numpy(drawn(3, 3, 16, 16))
    with torch.no_grad():
        np.testing.assert_allclose(made(images), network(images), atol=1e-4)
        made.resize(24, 24)
        assert made(torch.zeros(2, 3, 24, 24)).shape == (2, 5)
    with pytest.raises(ConfigurationError, match="no square grids"):
        made.resize(24, 16)


def residual_network(blocks: int) -> onnx.ModelProto:
    """A convolution, `blocks` residual blocks, and one that changes its shortcut too; a Gelu by a tanh ends each."""
    constants: dict[str, NDArray[Any]] = {"s": drawn(6, 4, 1, 1), "cube": np.float32(3), "tenth": np.float32(0.1)}
    nodes = [helper.make_node("Conv", ["x", "s"], ["at 0"])]
    for number in range(blocks + 1):
        start, kept = f"at {number}", f"at {number}"
        for part in ("a", "b", "shortcut"):
            constants[f"{part} {number}"] = drawn(6, 6, 1, 1) / 6
        inner = [
            helper.make_node("Conv", [start, f"a {number}"], [f"inner {number}"]),
            helper.make_node("Relu", [f"inner {number}"], [f"positive {number}"]),
            helper.make_node("Conv", [f"positive {number}", f"b {number}"], [f"branch {number}"]),
        ]
        if number == blocks:
            kept = "changed"
            inner.append(helper.make_node("Conv", [start, f"shortcut {number}"], [kept]))
        pair = [f"branch {number}", kept] if number % 2 else [kept, f"branch {number}"]
        summed, third, scaled = (f"{what} {number}" for what in ("sum", "third", "scaled"))
        nodes += [
            *inner,
            helper.make_node("Add", pair, [summed]),
            helper.make_node("Pow", [summed, "cube"], [third]),
            helper.make_node("Mul", [third, "tenth"], [scaled]),
            helper.make_node("Add", [summed, scaled], [f"at {number + 1}"]),
        ]
    nodes.append(helper.make_node("GlobalAveragePool", [f"at {blocks + 1}"], ["y"]))
    return graph(nodes, constants)


def test_late_residual_blocks_are_left_out() -> None:
    model = residual_network(3)
    images = drawn(2, 4, 8, 8)
    whole = TrainableGraph(model, "x", "y", (1, 4, 8, 8))
    assert whole.residual_blocks == 3
    np.testing.assert_allclose(whole(torch.from_numpy(images)).detach(), expected(model, images), rtol=1e-4)
    for left_out in (1, 2, 3):
        less = TrainableGraph(model, "x", "y", (1, 4, 8, 8), left_out=left_out)
        assert (less.residual_blocks, less.left_out) == (3, left_out)
        without = onnx.ModelProto()
        without.CopyFrom(model)
        for number in range(3 - left_out, 3):  # a branch of zeros adds nothing
            for each in without.graph.initializer:
                if each.name == f"b {number}":
                    each.CopyFrom(numpy_helper.from_array(np.zeros((6, 6, 1, 1), np.float32), each.name))
        np.testing.assert_allclose(less(torch.from_numpy(images)).detach(), expected(without, images), rtol=1e-4)
        assert len(list(less.parameters())) == len(list(whole.parameters())) - 2 * left_out
    with pytest.raises(ConfigurationError, match="has 3 residual blocks, 4 are to be left out"):
        TrainableGraph(model, "x", "y", (1, 4, 8, 8), left_out=4)


@pytest.mark.filterwarnings("ignore")
def test_what_is_exported_from_it_takes_any_number_of_images(tmp_path: Path) -> None:
    made = TrainableGraph(small_network(1), "x", "y", (1, 3, 8, 8)).eval()
    made.resize(6, 6)
    path = tmp_path / "again.onnx"
    torch.onnx.export(
        made, (torch.zeros(2, 3, 6, 6),), str(path), input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "n"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    images = drawn(5, 3, 6, 6)
    scores = onnxruntime.InferenceSession(str(path)).run(["y"], {"x": images})[0]
    np.testing.assert_allclose(scores, made(torch.from_numpy(images)).detach(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Tile", "Expand", "Range"])
def test_what_is_made_for_each_image_is_exported_for_any_number(tmp_path: Path, kind: str) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Concat", ["s", "ones"], ["t"], axis=0),
        helper.make_node("Squeeze", ["s"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["r"]),
        helper.make_node("Gather", ["x", "r"], ["g"]),
        helper.make_node("Tile" if kind == "Tile" else "Expand", ["token", "t"], ["k"]),
        helper.make_node("Concat", ["g" if kind == "Range" else "x", "k"], ["c"], axis=1),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    constants = {"ones": ints(1, 1, 1), "zero": np.int64(0), "one": np.int64(1), "token": drawn(1, 2, 8, 8)}
    model, images = graph(nodes, constants), drawn(5, 4, 8, 8)
    made, path = TrainableGraph(model, "x", "y", (1, 4, 8, 8)), tmp_path / "again.onnx"
    torch.onnx.export(
        made, (torch.zeros(2, 4, 8, 8),), str(path), input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "n"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    scores = onnxruntime.InferenceSession(str(path)).run(["y"], {"x": images})[0]
    np.testing.assert_allclose(scores, expected(model, images), atol=1e-5)


def test_a_map_that_is_scaled_to_a_written_size_is_scaled_in_proportion() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["p", "", "", "s"], ["r"], mode="linear"),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    made = TrainableGraph(graph(nodes, {"s": ints(1, 4, 8, 8)}, (1, 4, 8, 8)), "x", "y", (1, 4, 8, 8))
    made.resize(12, 12)
    assert made(torch.zeros(3, 4, 12, 12)).shape == (3, 4 * 12 * 12)


def test_the_answer_to_one_image_may_lack_the_axis_of_images() -> None:
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["g"]), helper.make_node("Squeeze", ["g", "a"], ["y"])]
    model = graph(nodes, {"a": ints(0, 2, 3)}, (1, 4, 8, 8))
    images = drawn(3, 4, 8, 8)
    alone = np.concatenate([expected(model, image[None]).reshape(1, 4) for image in images])
    np.testing.assert_allclose(ours(model, images), alone, atol=1e-5)


@pytest.mark.parametrize("how", ["one by one", "transposed"])
def test_pixels_of_integers_are_scaled_as_the_graph_says(how: str) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("DequantizeLinear", ["t" if how == "transposed" else "x", "s", "z"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["y"]),
    ]
    model = graph(nodes, {"s": np.float32(0.02), "z": np.uint8(100)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    images = RANDOM.integers(0, 256, (3, 4, 8, 8)).astype(np.uint8)
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": images})[0].reshape(3, 4)
    np.testing.assert_allclose(ours(model, images.astype(np.float32)), wanted, atol=1e-4)


def test_dynamic_quantisation_is_taken_for_what_it_stands_for() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z", "wz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["k"]),
        helper.make_node("Mul", ["f", "k"], ["y"]),
    ]
    constants = {
        "w": RANDOM.integers(0, 99, (6, 4, 3, 3)).astype(np.uint8), "ws": np.float32(0.01), "wz": np.uint8(50),
    }  # fmt: skip
    model, images = graph(nodes, constants), drawn(2, 4, 8, 8)
    found, wanted = ours(model, images), expected(model, images)
    assert np.abs(found - wanted).max() < 0.01 * np.ptp(wanted)


@pytest.mark.parametrize("shape", [(), (1, 6, 1, 1), (6, 1, 1), (6,)])
def test_weights_that_a_dynamic_quantiser_left_as_integers_are_learned_at_their_own_scale(
    shape: tuple[int, ...],
) -> None:
    scale = (np.abs(drawn(*shape)) / 100 + 0.01).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["k"]),
        helper.make_node("Mul", ["f", "k"], ["y"]),
    ]
    integers = RANDOM.integers(-99, 99, (6, 4, 3, 3)).astype(np.int8)
    model, images = graph(nodes, {"w": integers, "ws": scale}), drawn(2, 4, 8, 8)
    made = TrainableGraph(model, "x", "y", (1, 4, 8, 8))
    with torch.no_grad():
        found, wanted = made(torch.from_numpy(images)).numpy(), expected(model, images)
    assert np.abs(found - wanted).max() < 0.02 * np.ptp(wanted)
    largest = max(float(each.detach().abs().max()) for each in made.parameters())
    # A factor for each column of the map is none of the weights.
    wanted_largest = 99 if shape == (6,) else float(np.abs(integers * scale.reshape(-1, 1, 1, 1)).max())
    assert largest == pytest.approx(wanted_largest, rel=0.1)


@pytest.mark.parametrize("channels", [5, 4])
def test_a_matrix_that_a_dynamic_quantiser_left_as_integers_gets_the_scale_of_its_columns(channels: int) -> None:
    """As many columns as rows, too, where only the last axis can be meant."""
    scale = (np.abs(drawn(channels)) / 100 + 0.01).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["k"]),
        helper.make_node("Mul", ["c", "k"], ["y"]),
    ]
    integers = RANDOM.integers(-99, 99, (4, channels)).astype(np.int8)
    model, images = graph(nodes, {"w": integers, "ws": scale}), drawn(2, 4, 8, 8)
    made = TrainableGraph(model, "x", "y", (1, 4, 8, 8))
    with torch.no_grad():
        found, wanted = made(torch.from_numpy(images)).numpy(), expected(model, images)
        (weight,) = made.parameters()
        np.testing.assert_allclose(weight, integers * scale, rtol=1e-5)
    assert np.abs(found - wanted).max() < 0.02 * np.ptp(wanted)


def test_matrices_and_sums_of_integers_are_taken_for_what_they_stand_for() -> None:
    contributed = "com.microsoft"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearGlobalAveragePool", ["q", "s", "z", "s", "z"], ["g"], domain=contributed),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("QLinearMatMul", ["f", "s", "z", "w", "ws", "wz", "ys", "z"], ["m"]),
        helper.make_node("QLinearAdd", ["m", "ys", "z", "b", "ys", "z", "ys", "z"], ["a"], domain=contributed),
        helper.make_node("QGemm", ["a", "ys", "z", "v", "s", "vz", "c"], ["y"], transB=1, domain=contributed),
    ]
    constants: dict[str, NDArray[Any]] = {
        "s": np.float32(0.02), "z": np.uint8(128), "ws": np.abs(drawn(6)) / 50 + 0.01, "wz": np.zeros(6, np.int8),
        "w": RANDOM.integers(-99, 99, (4, 6)).astype(np.int8), "ys": np.float32(0.03),
        "b": RANDOM.integers(99, 150, 6).astype(np.uint8), "v": RANDOM.integers(-99, 99, (5, 6)).astype(np.int8),
        "c": RANDOM.integers(-99, 99, 5).astype(np.int32), "vz": np.int8(0),
    }  # fmt: skip
    model = graph(nodes, constants)
    model.opset_import.append(helper.make_opsetid(contributed, 1))
    images = drawn(2, 4, 8, 8)
    found, wanted = ours(model, images), expected(model, images)
    assert np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)


def test_what_cannot_be_read_is_refused_by_name() -> None:
    strings = [helper.make_node("Constant", [], ["c"], value_strings=["a"]), *one("Relu")]
    with pytest.raises(ConfigurationError, match="the operator Constant that gives 'c' cannot be read"):
        TrainableGraph(graph(strings, {}), "x", "y", (1, 4, 8, 8))
    shaped = [helper.make_node("Reshape", ["c", "s"], ["k"], name="bad"), *one("Mul", "k")]
    with pytest.raises(ConfigurationError, match="the operator Reshape 'bad' cannot be computed"):
        TrainableGraph(graph(shaped, {"c": drawn(4), "s": ints(7, 7)}), "x", "y", (1, 4, 8, 8))
    with pytest.raises(ConfigurationError, match="'y' does not come from the images"):
        TrainableGraph(graph([helper.make_node("Identity", ["c"], ["y"])], {"c": drawn(1, 4)}), "x", "y", (1, 4, 8, 8))


@pytest.mark.parametrize(
    ("before", "after", "now", "wanted"),
    [
        ([2, 576, 32], [2, 24, 24, 32], [2, 144, 32], [2, 12, 12, 32]),
        ([2, 576, 32], [2, 576, 1, 32], [2, 64, 32], [2, 64, 1, 32]),
        ([1, 8, 32], [1, 2, 4, 32], [2, 8, 32], [2, 2, 4, 32]),
    ],
    ids=["a square map", "one head", "two images"],
)
def test_a_reshape_at_another_side(before: list[int], after: list[int], now: list[int], wanted: list[int]) -> None:
    assert reshaped_alike(before, after, now, 2) == wanted


def test_convolutions_of_integers_are_taken_for_what_they_stand_for() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "ys", "yz"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "xs": np.float32(0.02), "xz": np.uint8(128), "w": RANDOM.integers(-50, 50, (6, 4, 3, 3)).astype(np.int8),
        "ws": (np.abs(drawn(6)) / 100 + 0.005), "wz": np.zeros(6, np.int8), "ys": np.float32(0.05), "yz": np.uint8(0),
        "b": RANDOM.integers(-99, 99, 6).astype(np.int32),
    }  # fmt: skip
    model = graph(nodes, constants)
    images = drawn(2, 4, 8, 8)
    found, wanted = ours(model, images), expected(model, images)
    assert np.abs(found - wanted).max() < 0.15  # three roundings
    assert (wanted == 0).any()
    assert ((wanted == 0) == (found < 0.03)).mean() > 0.99  # what is below zero is cut off, as by a ReLU


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (one("NonMaxSuppression"), "operators that evenkeel cannot train: NonMaxSuppression"),
        ([helper.make_node("Fancy", ["x"], ["y"], domain="com.example")], r"com\.example\.Fancy"),
        (
            [
                helper.make_node(
                    "If", ["c"], ["y"],
                    then_branch=helper.make_graph([], "a", [], []), else_branch=helper.make_graph([], "b", [], []),
                )
            ],
            "control flow: If",
        ),
    ],
    ids=["detection", "custom", "branches"],
)  # fmt: skip
def test_what_cannot_be_trained_is_named(nodes: list[onnx.NodeProto], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrainableGraph(graph(nodes, {"c": np.array(True)}), "x", "y", (1, 4, 8, 8))


def test_a_side_that_the_graph_cannot_take_is_refused_by_the_operators_name() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["y"], name="head"),
    ]
    made = TrainableGraph(graph(nodes, {"w": drawn(256, 5)}), "x", "y", (1, 4, 8, 8))
    with pytest.raises(ConfigurationError, match="Gemm 'head' cannot take images of 4x6x6"):
        made.resize(6, 6)


@pytest.mark.parametrize("behind", [0, 2])
def test_a_pad_that_is_joined_with_its_convolution_changes_nothing(behind: int) -> None:
    constants = {
        "pads": np.array([0, 0, 1, 1, 0, 0, behind, behind], np.int64),
        "w": drawn(4, 1, 5, 5),
        "v": drawn(3, 4, 1, 1),
    }
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"]),
        helper.make_node("Conv", ["p", "w"], ["c"], strides=[2, 2], group=4, pads=[1, 0, 1, 0]),
        helper.make_node("Conv", ["c", "v"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    model, images = graph(nodes, constants), drawn(2, 4, 8, 8)
    trained = TrainableGraph(model, "x", "y", (1, 4, 8, 8))
    assert not any(step.kind == "Pad" for step in trained._steps)
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": images})[0]
    np.testing.assert_allclose(trained(torch.from_numpy(images)).detach().numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("how", ["value", "images", "mode", "two"])
def test_a_pad_of_other_kinds_stays_by_itself(how: str) -> None:
    pads = [1, 0, 0, 0, 0, 0, 0, 0] if how == "images" else [0, 0, 1, 1, 0, 0, 1, 1]
    constants = {"pads": np.array(pads, np.int64), "w": drawn(4, 4, 3, 3), "value": np.float32(2)}
    inputs = ["x", "pads", *(["value"] if how == "value" else [])]
    nodes = [
        helper.make_node("Pad", inputs, ["p"], mode="reflect" if how == "mode" else "constant"),
        helper.make_node("Conv", ["p", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("GlobalMaxPool", ["p" if how == "two" else "c"], ["h"]),
        helper.make_node("Add", ["g", "h"], ["s"]),
        helper.make_node("Flatten", ["s"], ["y"]),
    ]
    kept = _with_own_padding(
        _steps(nodes, {}, 17), {name: torch.from_numpy(np.array(each)) for name, each in constants.items()}
    )
    assert [step.kind for step in kept][:2] == ["Pad", "Conv"]
