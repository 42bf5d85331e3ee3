"""Writes a classifier as a graph that takes plain pixels: uint8 [n, h, w, 3], red first, and gives scores [n, classes].

A model card can say uint8 or float32 images of three colours in either layout. A graph that takes grey images, blue
first, half precision, or gives its scores with further axes, gets the steps from plain pixels put in front of it and
the reshaping behind it, so that whatever serves it needs to know nothing of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from evenkeel.errors import EvenkeelError
from evenkeel.files import write_whole
from evenkeel.models.black_box import BlackBox
from evenkeel.models.classifier_form import GREY_WEIGHTS

__all__ = ["write_plain_graph"]

_PREFIX = "evenkeel_plain_"  # of every name that is added
_TYPES = {"u1": TensorProto.UINT8, "f2": TensorProto.FLOAT16, "f4": TensorProto.FLOAT, "f8": TensorProto.DOUBLE}


def write_plain_graph(classifier: BlackBox, path: Path) -> tuple[str, str]:
    """Writes the graph of `classifier` to `path`, weights inside, and gives the names of its input and its output.

    Raises:
        EvenkeelError: it would not give the same scores.
        OSError: it cannot be written.
    """
    model = onnx.load(str(classifier.path))
    graph, form = model.graph, classifier.form
    rows = 1 if form.fixed_batch else "n"
    used = set(_names(graph))
    pixels, scores = (
        next(name for name in (*wanted, f"{_PREFIX}{wanted[0]}") if name not in used)
        for wanted in (("images", "pixels"), ("scores", "class_scores"))
    )
    front, behind = _Steps("front"), _Steps("behind")
    value = front.add("Cast", pixels, to=TensorProto.FLOAT)
    if form.dtype != "u1":
        std = np.array(form.normalisation.std, np.float64)
        value = front.add("Mul", value, np.asarray(form.normalisation.scale / std, np.float32))
        value = front.add("Add", value, np.asarray(-np.array(form.normalisation.mean) / std, np.float32))
    if form.colours == "BGR":
        value = front.add("Gather", value, np.array([2, 1, 0], np.int64), axis=3)
    elif form.colours == "GREY":
        value = front.add("MatMul", value, np.array(GREY_WEIGHTS, np.float32)[:, None])
        if form.dtype == "u1":
            value = front.add("Floor", front.add("Add", value, np.array(0.5, np.float32)))
    if form.layout == "NCHW":
        value = front.add("Transpose", value, perm=[0, 3, 1, 2])
    front.add("Cast", value, output=form.name, to=_TYPES[form.dtype])
    value = behind.add("Reshape", classifier.output_name, np.array([-1, classifier.classes], np.int64))
    behind.add("Cast", value, output=scores, to=TensorProto.FLOAT)
    nodes = [*front.nodes, *graph.node, *behind.nodes]
    others = [each for each in graph.input if each.name != form.name]  # older files list their weights there
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*front.constants, *behind.constants])
    size = [rows, form.height, form.width, 3]
    graph.input.extend([helper.make_tensor_value_info(pixels, TensorProto.UINT8, size), *others])
    added = [] if model.ir_version >= 4 else [*front.constants, *behind.constants]
    graph.input.extend(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in added)
    graph.output.append(helper.make_tensor_value_info(scores, TensorProto.FLOAT, [rows, classifier.classes]))
    write_whole(path, model.SerializeToString())
    _compare(classifier, path)
    return pixels, scores


class _Steps:
    """Nodes, one behind the other, and the constants that they use."""

    def __init__(self, place: str) -> None:
        self._place = place
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(
        self,
        kind: str,
        value: str,
        constant: NDArray[Any] | None = None,
        *,
        output: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node on `value` (and a constant); gives the name of what it makes."""
        name = f"{_PREFIX}{self._place}_{len(self.nodes)}"
        inputs = [value]
        if constant is not None:
            self.constants.append(numpy_helper.from_array(constant, f"{name}_constant"))
            inputs.append(f"{name}_constant")
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=name, **attributes))
        return output or name


def _names(graph: GraphProto) -> Iterator[str]:
    """Gives every name of a value in `graph` and the graphs inside it."""
    yield from (each.name for each in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names(inner)


def _compare(classifier: BlackBox, path: Path) -> None:
    plain = BlackBox.open(path)
    shape = (3, classifier.height, classifier.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = classifier.scores(images)
    reach = 1e-2 * max(float(np.abs(expected).max()), 1e-3)
    difference = float(np.abs(plain.scores(images) - expected).max())
    if difference > reach:
        raise EvenkeelError(
            f"{path}: with plain pixels the classifier gives scores that differ by {difference:.3g}; serve it by a "
            "graph of your own that takes uint8 [n, h, w, 3]"
        )
