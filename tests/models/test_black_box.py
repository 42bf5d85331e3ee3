"""The user's classifier, whatever its ONNX graph looks like: the same scores, or a refusal before anything long."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.models.black_box import BlackBox, log_softmax
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.models.onnx_costs import count_costs
from evenkeel.models.shipped import IMAGES, card_path, model_path

SIDE, CLASSES = 6, 4
FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


def weights(inputs: int = 3, classes: int = CLASSES) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(inputs, classes)).astype(np.float32)


def write(
    path: Path,
    *,
    shape: tuple[Any, ...] = ("n", SIDE, SIDE, 3),
    kind: int = UINT8,
    last: str | None = None,
    matrix: np.ndarray | None = None,
    head: list[Any] | None = None,
    output: tuple[Any, ...] | None = None,
    output_kind: int = FLOAT,
    more_inputs: tuple[Any, ...] = (),
    external: bool = False,
) -> Path:
    """A classifier of the mean colour: scores = mean over the pixels, times `matrix` [3, classes]; then `last`."""
    matrix = weights() if matrix is None else matrix
    axes = [2, 3] if len(shape) == 4 and shape[1] == 3 else [1, 2]
    nodes = [helper.make_node("Cast", ["images"], ["float"], to=FLOAT)]
    nodes += [helper.make_node("ReduceMean", ["float"], ["mean"], axes=axes, keepdims=0)]
    nodes += [helper.make_node("MatMul", ["mean", "w"], ["scores" if last is None and not head else "product"])]
    if last is not None:
        nodes += [helper.make_node(last, ["product"], ["scores"])]
    nodes += head or []
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", kind, shape), *more_inputs],
        [helper.make_tensor_value_info("scores", output_kind, output or ("n", matrix.shape[1]))],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if external:
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, str(path))
    return path


def some_images(count: int = 7, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def by_hand(pixels: np.ndarray, normalise: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray:
    return normalise(pixels.astype(np.float64)).mean(axis=(1, 2)) @ weights().astype(np.float64)


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        BlackBox.open(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", [UINT8, FLOAT])
@pytest.mark.parametrize("rows", ["n", 1, None])
@pytest.mark.parametrize("open_size", [False, True])
def test_any_usual_input_gives_the_same_scores(
    tmp_path: Path, layout: str, kind: int, rows: Any, open_size: bool
) -> None:
    size: tuple[Any, ...] = ("h", "w") if open_size else (SIDE, SIDE)
    shape = (rows, *size, 3) if layout == "NHWC" else (rows, 3, *size)
    path = write(tmp_path / "mine.onnx", shape=shape, kind=kind, output=(rows, CLASSES))
    box = BlackBox.open(path, side=SIDE if open_size else None)
    images = some_images()
    expected = by_hand(images, (lambda x: x) if kind == UINT8 else lambda x: x / 255)
    for batch in (1, 3, 100):
        found = box.scores(images, batch=batch)
        assert found.dtype == np.float32
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert (box.height, box.width, box.classes, box.kind, box.name) == (SIDE, SIDE, CLASSES, "logits", "mine")
    assert (box.layout, box.datatype) == (layout, "UINT8" if kind == UINT8 else "FP32")
    assert (box.input_name, box.output_name, box.card, box.class_names) == ("images", "scores", None, None)
    assert box.scores(images[:0]).shape == (0, CLASSES)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    box = BlackBox.open(write(tmp_path / "x.onnx", shape=("n", 3, 4, 9), kind=FLOAT), scale=1)
    assert (box.height, box.width) == (4, 9)
    images = some_images(3, 4, 9)
    assert np.allclose(box.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    scale=st.floats(1e-3, 2),
    mean=st.tuples(*[st.floats(-1, 1)] * 3),
    std=st.tuples(*[st.floats(0.1, 3)] * 3),
)
def test_float_inputs_are_normalised_as_told(
    scale: float, mean: tuple[float, float, float], std: tuple[float, float, float], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "normalised.onnx"
    if not path.exists():
        write(path, shape=("n", 3, SIDE, SIDE), kind=FLOAT)
    box = BlackBox.open(path, scale=scale, mean=mean, std=std)
    images = some_images(3)
    expected = by_hand(images, lambda x: (x * scale - np.array(mean)) / np.array(std))
    assert np.allclose(box.scores(images), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [("n", CLASSES, 1, 1), ("n", 1, CLASSES), ("n", CLASSES, 1), ("n", 1, 1, CLASSES)])
@pytest.mark.parametrize("known", [True, False])
def test_scores_may_have_further_axes_of_length_one(tmp_path: Path, shape: tuple[Any, ...], known: bool) -> None:
    wanted = np.array([-1, *shape[1:]])
    head = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(wanted, "shape")),
        helper.make_node("Reshape", ["product", "shape"], ["scores"]),
    ]
    path = write(tmp_path / "x.onnx", head=head, output=shape)
    if not known:  # as exporters leave it where they cannot tell
        model = onnx.load(str(path))
        model.graph.output[0].type.tensor_type.ClearField("shape")
        onnx.save(model, str(path))
    box = BlackBox.open(path)
    images = some_images()
    assert (box.classes, box.plain) == (CLASSES, False)
    assert np.allclose(box.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)
    card = write_card(path)
    assert "give the ONNX file itself to evenkeel fit" in refusal(card)


def test_one_row_of_scores_may_come_without_its_axis(tmp_path: Path) -> None:
    head = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([-1]), "shape")),
        helper.make_node("Reshape", ["product", "shape"], ["scores"]),
    ]
    path = write(tmp_path / "x.onnx", shape=(1, SIDE, SIDE, 3), head=head, output=(CLASSES,))
    box = BlackBox.open(path, output="scores")
    images = some_images()
    assert np.allclose(box.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_floats_are_taken(tmp_path: Path, kind: int) -> None:
    box = BlackBox.open(write(tmp_path / "x.onnx", kind=kind, shape=("n", 3, SIDE, SIDE)))
    images = some_images()
    assert (box.datatype, box.plain) == ("FP32", False)
    assert np.allclose(box.scores(images), by_hand(images, lambda x: x / 255), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [UINT8, FLOAT])
@pytest.mark.parametrize("shape", [("n", 1, SIDE, SIDE), ("n", SIDE, SIDE, 1)])
def test_grey_images_are_made_of_coloured_ones(tmp_path: Path, kind: int, shape: tuple[Any, ...]) -> None:
    path = write(tmp_path / "x.onnx", kind=kind, shape=shape, matrix=weights(1))
    model = onnx.load(str(path))
    model.graph.node[1].attribute[0].ints[:] = [2, 3] if shape[1] == 1 else [1, 2]
    onnx.save(model, str(path))
    box = BlackBox.open(path, scale=None if kind == UINT8 else 1)
    images = some_images()
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images]).astype(np.float64)
    expected = grey.mean(axis=(1, 2))[:, None] @ weights(1).astype(np.float64)
    assert box.form.colours == "GREY"
    assert np.allclose(box.scores(images), expected, rtol=1e-2, atol=0.5)
    assert "bgr is for colour images, and it takes grey ones; leave bgr out" in refusal(path, bgr=True)


def test_colours_may_come_blue_first(tmp_path: Path) -> None:
    """Mean and deviation are given for red, green and blue, whatever the order that the graph takes."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 1, 2)
    path = write(tmp_path / "x.onnx", kind=FLOAT, shape=("n", 3, SIDE, SIDE))
    box = BlackBox.open(path, bgr=True, scale=1 / 255, mean=mean, std=std)
    images = some_images()
    expected = by_hand(images, lambda x: ((x / 255 - np.array(mean)) / np.array(std))[..., ::-1])
    assert np.allclose(box.scores(images), expected, rtol=1e-4, atol=1e-3)
    assert not box.plain


def test_what_a_graph_leaves_open_can_be_said(tmp_path: Path) -> None:
    open_axes = write(tmp_path / "x.onnx", kind=FLOAT, shape=("n", "a", "b", "c"))
    assert "give layout (NHWC or NCHW)" in refusal(open_axes, side=(4, 9))
    images = some_images(3, 4, 9)
    for layout, axes in (("NHWC", [1, 2]), ("NCHW", [2, 3])):
        model = onnx.load(str(open_axes))
        model.graph.node[1].attribute[0].ints[:] = axes
        onnx.save(model, str(open_axes))
        box = BlackBox.open(open_axes, side=(4, 9), layout=layout, scale=1)
        assert (box.height, box.width, box.layout) == (4, 9, layout)
        assert np.allclose(box.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)
    both = write(tmp_path / "y.onnx", shape=("n", 3, SIDE, 3))
    assert "give layout (NHWC or NCHW)" in refusal(both)
    assert BlackBox.open(both, layout="NCHW").width == 3
    assert "layout: must be NHWC or NCHW" in refusal(both, layout="CHWN")
    assert "with layout NCHW the axis that holds the colours" in refusal(write(tmp_path / "z.onnx"), layout="NCHW")


def test_a_graph_with_one_row_built_in_is_run_row_by_row(tmp_path: Path) -> None:
    """Its signature says any number of rows, and a constant inside says one."""
    head = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1, CLASSES]), "shape")),
        helper.make_node("Reshape", ["product", "shape"], ["scores"]),
    ]
    images = some_images()
    box = BlackBox.open(write(tmp_path / "x.onnx", head=head))
    assert np.allclose(box.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)


def test_a_graph_whose_rows_depend_on_their_neighbours_is_run_row_by_row(tmp_path: Path) -> None:
    head = [
        helper.make_node("ReduceMean", ["product"], ["middle"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["product", "middle"], ["apart"]),
        helper.make_node("Add", ["apart", "apart"], ["scores"]),
    ]
    box = BlackBox.open(write(tmp_path / "x.onnx", head=head))
    assert np.abs(box.scores(some_images(), batch=7)).max() == 0  # what each gives alone


@pytest.mark.parametrize(("last", "kind"), [(None, "logits"), ("Softmax", "probabilities"), ("LogSoftmax", "logits")])
def test_log_probabilities_are_the_same_whatever_the_scores_are(tmp_path: Path, last: str | None, kind: str) -> None:
    small = weights() / 100
    box = BlackBox.open(write(tmp_path / "x.onnx", last=last, matrix=small))
    assert box.kind == kind
    images = some_images()
    logits = images.mean(axis=(1, 2)) @ small.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = box.log_probabilities(images)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-4)
    assert np.allclose(box.as_log_probabilities(box.scores(images)), expected, atol=1e-4)


def test_positive_scores_that_do_not_sum_to_one_are_logits(tmp_path: Path) -> None:
    assert BlackBox.open(write(tmp_path / "x.onnx", last="Sigmoid")).kind == "logits"


def test_a_probability_of_zero_has_a_finite_logarithm(tmp_path: Path) -> None:
    box = BlackBox.open(write(tmp_path / "x.onnx", last="Softmax", matrix=weights() * 1000))
    found = box.log_probabilities(some_images())
    assert np.isfinite(found).all()
    assert found.min() < -60


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_log_softmax_sums_to_one_and_does_not_see_a_shift(row: list[float], shift: float) -> None:
    scores = np.array([row], np.float64)
    found = log_softmax(scores)
    assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
    assert np.allclose(found, log_softmax(scores + shift), atol=1e-3, rtol=1e-5)


# Cards


def write_card(path: Path, **changes: Any) -> Path:
    box = BlackBox.open(path)
    fields: dict[str, Any] = {
        "name": "carded",
        "kind": "classifier",
        "file": path.name,
        "sha256": box.sha256,
        "classes": tuple("abcd"),
        "height": SIDE,
        "width": SIDE,
    }
    save_card(ModelCard(**(fields | changes)), path.with_suffix(".json"))
    return path.with_suffix(".json")


def test_a_card_says_what_the_graph_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", kind=FLOAT, shape=("n", 3, SIDE, SIDE))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    card = write_card(path, layout="NCHW", datatype="FP32", normalisation_inside=False, mean=mean, std=std)
    box = BlackBox.open(card)
    images = some_images()
    expected = by_hand(images, lambda x: (x / 255 - np.array(mean)) / np.array(std))
    assert np.allclose(box.scores(images), expected, rtol=1e-4, atol=1e-3)
    assert (box.name, box.class_names) == ("carded", ("a", "b", "c", "d"))
    inside = write_card(path, layout="NCHW", datatype="FP32")
    assert np.allclose(BlackBox.open(inside).scores(images), by_hand(images), rtol=1e-4, atol=1e-2)
    assert "mean, side stands in its model card" in refusal(card, mean=(0, 0, 0), side=SIDE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "'sha256'"),
        ({"classes": ("a", "b")}, "gives 4 scores, its card lists 2 classes"),
        ({"input_name": "x"}, "'input_name' is 'x'; its inputs are images tensor(uint8) [n, 6, 6, 3]"),
        ({"output_name": "y"}, "'output_name' is 'y', its outputs are scores"),
        ({"height": 12}, "its card says images of 12 x 6, and it takes 6 x 6"),
        ({"layout": "NCHW"}, "which axis holds the 3 colours"),
        ({"datatype": "FP32"}, "say FP32"),
        ({"scores": "probabilities"}, "card says that scores are probabilities"),
        ({"kind": "collage", "tile_side": SIDE}, "a classifier is needed"),
        ({"file": "gone.onnx"}, "gone.onnx is not there"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(write_card(write(tmp_path / "x.onnx"), **changes))


def test_a_card_may_call_any_row_logits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", last="Softmax")
    assert BlackBox.open(path).kind == "probabilities"
    assert BlackBox.open(write_card(path)).kind == "logits"


def test_a_shipped_model_answers_by_name() -> None:
    box = BlackBox.open("cifar10-base")
    with np.load(IMAGES) as shipped:
        images, labels = shipped["images"][:40], shipped["labels"][:40]
    assert (box.scores(images).argmax(axis=1) == labels).mean() > 0.8
    card = json.loads(card_path("cifar10-base").read_text())
    assert (box.macs, box.sha256, box.class_names) == (card["macs"], card["sha256"], tuple(card["classes"]))
    assert BlackBox.open(model_path("cifar10-base")).macs == box.macs
    assert box.parameters == pytest.approx(card["parameters"], rel=0.01)  # norms are folded into the file


# Refusals


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ({"more_inputs": (helper.make_tensor_value_info("z", FLOAT, [1]),)}, "takes 2 inputs"),
        ({"kind": TensorProto.INT32}, "its input is tensor(int32)"),
        ({"shape": ("n", SIDE, 3)}, "has 3 axes"),
        ({"shape": ("n", SIDE, SIDE, 4), "matrix": weights(4)}, "which axis holds the 3 colours"),
        ({"shape": ("n", 3, SIDE, 3)}, "which axis holds the 3 colours"),
        ({"shape": ("n", "h", "w", 3)}, "leaves the size of its images open; give it with side"),
        ({"shape": (8, SIDE, SIDE, 3), "output": (8, CLASSES)}, "exactly 8 images at once"),
        ({"matrix": weights(classes=1)}, "tell no classes apart"),
    ],
)
def test_a_graph_that_is_no_classifier_is_refused_with_both_shapes(
    tmp_path: Path, graph: dict[str, Any], said: str
) -> None:
    message = refusal(write(tmp_path / "x.onnx", **graph))
    assert said in message
    assert "expected one input of images, uint8 or float, [n, h, w, 3] or [n, 3, h, w]" in message
    if "classes" not in said:
        shape = graph.get("shape", ("n", SIDE, SIDE, 3))
        assert f"[{', '.join(map(str, shape))}]" in message


def test_scores_of_another_shape_are_refused(tmp_path: Path) -> None:
    apart = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([-1, 2, 2]), "shape")),
        helper.make_node("Reshape", ["product", "shape"], ["scores"]),
    ]
    message = refusal(write(tmp_path / "x.onnx", head=apart, output=("n", 2, 2)))
    assert "no output may be scores [n, classes]; its outputs are scores tensor(float) [n, 2, 2]" in message
    flat = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([2, -1]), "shape")),
        helper.make_node("Reshape", ["product", "shape"], ["scores"]),
    ]
    message = refusal(write(tmp_path / "y.onnx", head=flat, output=("a", "b")))
    assert "an image [1, 6, 6, 3] gives scores [2, 2]" in message
    arg_max = [helper.make_node("ArgMax", ["product"], ["scores"], axis=1)]
    message = refusal(write(tmp_path / "z.onnx", head=arg_max, output=("n", 1), output_kind=TensorProto.INT64))
    assert "no output may be scores" in message


def test_a_file_whose_name_is_not_text_is_refused(tmp_path: Path) -> None:
    """Its name goes into cards and configurations, which are UTF-8."""
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    path.write_bytes(write(tmp_path / "x.onnx").read_bytes())
    assert "is not UTF-8 text" in refusal(path)


def test_two_outputs_of_scores_need_a_card_or_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx")
    model = onnx.load(str(path))
    model.graph.node.append(helper.make_node("Softmax", ["scores"], ["shares"]))
    model.graph.output.append(helper.make_tensor_value_info("shares", FLOAT, ("n", CLASSES)))
    card = write_card(path)
    onnx.save(model, str(path))
    assert "2 outputs may be scores" in refusal(path)
    assert BlackBox.open(path, output="shares").kind == "probabilities"
    assert BlackBox.open(path, output="scores").kind == "logits"
    assert "output is 'logits', its outputs are scores" in refusal(path, output="logits")
    raw = json.loads(card.read_text())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    card.write_text(json.dumps(raw | {"sha256": sha256, "output_name": "shares", "scores": "probabilities"}))
    box = BlackBox.open(card)
    assert box.kind == "probabilities"
    assert np.allclose(box.scores(some_images()).sum(axis=1), 1, atol=1e-5)


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    matrix = weights()
    matrix[0, 0] = np.nan
    assert "scores of a plain image are not finite" in refusal(write(tmp_path / "x.onnx", matrix=matrix))


def test_scores_that_stop_being_finite_later_name_the_image(tmp_path: Path) -> None:
    """The logarithm of what only one image has below zero."""
    matrix = np.array([[-1, 1], [0.9, 1], [0.9, 1]], np.float32)
    head = [
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([1], np.float32), "one")),
        helper.make_node("Add", ["product", "one"], ["raised"]),
        helper.make_node("Log", ["raised"], ["scores"]),
    ]
    box = BlackBox.open(write(tmp_path / "x.onnx", matrix=matrix, head=head, output=("n", 2)))
    images = np.full((5, SIDE, SIDE, 3), 100, np.uint8)
    images[3] = (255, 0, 0)
    with pytest.raises(EvenkeelError, match="not finite for 1 of 5 images, first for number 3"):
        box.scores(images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 0.5, "std": (1, 1, 1)}, "normalises them itself; leave scale, std away"),
        ({"scale": 0.0}, "scale must be"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above zero"),
        ({"threads": 0}, "threads must be"),
        ({"side": 7}, "side says images of 7 x 7, and it takes 6 x 6"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    assert said in refusal(write(tmp_path / "x.onnx"), **options)


@pytest.mark.parametrize(
    "images", [some_images(2, SIDE, 7), some_images(2)[0], some_images(2).astype(np.float32), some_images(2)[..., :1]]
)
def test_images_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path, images: np.ndarray) -> None:
    box = BlackBox.open(write(tmp_path / "x.onnx"))
    with pytest.raises(ConfigurationError) as caught:
        box.scores(images)
    assert "takes images uint8 [n, 6, 6, 3]" in str(caught.value)
    assert f"{images.dtype} {list(images.shape)}" in str(caught.value)


# Weights in a file of their own


def test_external_weights_are_found_and_are_part_of_the_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", external=True)
    images = some_images()
    first = BlackBox.open(path)
    assert np.allclose(first.scores(images), by_hand(images), rtol=1e-4, atol=1e-3)
    assert first.parameters == 3 * CLASSES
    (tmp_path / "x.onnx.data").write_bytes((weights() * 2).tobytes())
    second = BlackBox.open(path)
    assert np.allclose(second.scores(images), 2 * by_hand(images), rtol=1e-4, atol=1e-3)
    assert first.sha256 != second.sha256
    (tmp_path / "x.onnx.data").unlink()
    message = refusal(path)
    assert "not an ONNX model that can be run" in message
    assert "its weights are in x.onnx.data, which is not beside it" in message


# Costs


def graph_of(path: Path, nodes: list[Any], shape: tuple[Any, ...], tensors: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_costs_are_counted_by_hand(tmp_path: Path) -> None:
    path = graph_of(
        tmp_path / "x.onnx",
        [
            helper.make_node("Conv", ["x", "k"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1], group=3),
            helper.make_node("GlobalAveragePool", ["a"], ["b"]),
            helper.make_node("Flatten", ["b"], ["c"]),
            helper.make_node("Gemm", ["c", "g", "bias"], ["d"], transB=1),
            helper.make_node("MatMul", ["d", "m"], ["y"]),
        ],
        ("n", 3, "h", "w"),
        {"k": zeros(6, 1, 3, 3), "g": zeros(5, 6), "bias": zeros(5), "m": zeros(5, 2), "ints": np.array([1, 2])},
    )
    costs = count_costs(path, "x", (1, 3, 8, 10))
    assert costs.macs == 6 * 9 * (4 * 5) + 6 * 5 + 5 * 2
    assert costs.parameters == 6 * 9 + 30 + 5 + 10


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("ConvTranspose", ["x", "k"], ["y"]), ("n", 3, 8, 8)),
        (helper.make_node("Einsum", ["x", "x"], ["y"], equation="nchw,nchw->nc"), ("n", 3, 8, 8)),
        (helper.make_node("FusedConv", ["x", "k"], ["y"], domain="com.microsoft"), ("n", 3, 8, 8)),
        (helper.make_node("Something", ["x", "k"], ["y"], domain="mine"), ("n", 3, 8, 8)),
    ],
)
def test_what_cannot_be_counted_is_unknown(tmp_path: Path, node: Any, shape: tuple[Any, ...]) -> None:
    path = graph_of(tmp_path / "x.onnx", [node], shape, {"k": zeros(3, 4, 3, 3)})
    assert count_costs(path, "x", (1, 3, 8, 8)).macs is None


def test_costs_of_no_graph_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.onnx").write_bytes(b"hello")
    assert count_costs(tmp_path / "x.onnx", "x", (1, 3, 8, 8)).macs is None
    path = write(tmp_path / "y.onnx")
    assert BlackBox.open(path).macs == 3 * CLASSES
    card = write_card(path, macs=77)
    monkeypatch.setitem(sys.modules, "onnx", None)
    box = BlackBox.open(path)
    assert (box.macs, box.parameters) == (None, None)
    assert BlackBox.open(card).macs == 77
    assert box.scores(some_images()).shape == (7, CLASSES)


def test_one_pass_is_timed_from_pixels(tmp_path: Path) -> None:
    box = BlackBox.open(write(tmp_path / "x.onnx", kind=FLOAT, shape=(1, 3, SIDE, SIDE), output=(1, CLASSES)))
    assert np.asarray(box.one_pass()()[0]).shape == (1, CLASSES)
    assert 0 < box.latency_ms(rounds=3) < 10_000
