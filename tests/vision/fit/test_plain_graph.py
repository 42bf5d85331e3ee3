"""A classifier of whatever form, written as a graph that takes plain pixels and gives the same scores."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evenkeel.backends.worker.model import load_model
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card
from evenkeel.vision.fit.serving import write_serving

SIDE, WIDE, CLASSES = 6, 9, 4


def write(
    path: Path,
    kind: int,
    layout: str,
    channels: int,
    *,
    rows: Any = "n",
    output: tuple[int, ...] = (CLASSES,),
    names: tuple[str, str] = ("images", "scores"),
    ir_version: int = 8,
) -> Path:
    """Scores from the mean of each channel, computed in the input's own type."""
    size = (channels, SIDE, WIDE) if layout == "NCHW" else (SIDE, WIDE, channels)
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    matrix = np.random.default_rng(1).normal(size=(channels, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", [names[0]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["shaped"]),
        helper.make_node("Cast", ["shaped"], [names[1]], to=TensorProto.FLOAT if kind == TensorProto.UINT8 else kind),
    ]
    weights = [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(np.array([-1, *output]), "shape")]
    inputs = [helper.make_tensor_value_info(names[0], kind, (rows, *size))]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights]
    outputs = [helper.make_tensor_value_info(names[1], nodes[-1].attribute[0].i, (rows, *output))]
    graph = helper.make_graph(nodes, "classifier", inputs, outputs, weights)
    opset = 11 if ir_version >= 4 else 8
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), str(path)
    )
    return path


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colours", ["RGB", "BGR", "GREY"])
@pytest.mark.parametrize("output", [(CLASSES,), (CLASSES, 1, 1), (1, CLASSES)])
@pytest.mark.parametrize("rows", ["n", 1])
def test_what_is_served_gives_the_scores_of_what_was_fitted_to(
    tmp_path: Path, kind: int, layout: str, colours: str, output: tuple[int, ...], rows: Any
) -> None:
    path = write(tmp_path / "mine.onnx", kind, layout, 1 if colours == "GREY" else 3, rows=rows, output=output)
    normalised = {} if kind == TensorProto.UINT8 else {"scale": 0.02, "mean": (0.5, 1, 2), "std": (1, 2, 0.5)}
    classifier = BlackBox.open(path, bgr=colours == "BGR", **normalised)  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    write_serving(classifier, tuple("abcd"), 1.5, [], out)
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, WIDE, 3), dtype=np.uint8)
    expected = classifier.scores(images)
    card = load_card(out / "mine.json")
    assert (card.classes, card.temperature, card.height, card.width) == (tuple("abcd"), 1.5, SIDE, WIDE)
    reach = 1e-2 * np.abs(expected).max()
    assert np.abs(BlackBox.open(out / "mine.json").scores(images) - expected).max() < reach
    model = load_model(str(out / "mine.json"))
    rows_in = images if card.layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    found = model.run(rows_in.astype("u1" if card.datatype == "UINT8" else "f4"))
    assert found.shape == (5, CLASSES)
    assert np.abs(found - expected).max() < reach
    if classifier.plain:
        assert (out / "mine.onnx").read_bytes() == path.read_bytes()


def test_names_that_the_graph_uses_are_left_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.onnx", TensorProto.FLOAT, "NCHW", 3, names=("pixels", "images"))
    write_serving(BlackBox.open(path, bgr=True), tuple("abcd"), 1.0, [], tmp_path)
    card = load_card(tmp_path / "mine.json")
    assert (card.input_name, card.output_name) == ("evenkeel_plain_images", "scores")


def test_the_users_own_file_is_never_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.onnx", TensorProto.FLOAT, "NCHW", 1)
    before = path.read_bytes()
    write_serving(BlackBox.open(path), tuple("abcd"), 1.0, [], tmp_path)
    assert path.read_bytes() == before
    assert load_card(tmp_path / "mine.json").file == "mine-plain.onnx"


def test_old_files_that_list_their_weights_as_inputs_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.onnx", TensorProto.FLOAT, "NCHW", 3, ir_version=3)
    out = tmp_path / "out"
    out.mkdir()
    write_serving(BlackBox.open(path, bgr=True), tuple("abcd"), 1.0, [], out)
    assert load_model(str(out / "mine.json")).input_shape == (SIDE, WIDE, 3)
