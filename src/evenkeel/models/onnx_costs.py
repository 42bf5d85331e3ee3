"""Counts what a pass of an ONNX file costs, from its graph, without running it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OnnxCosts", "count_costs"]

# Where the inputs of an operator stand: (what is multiplied, by what), both by number.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}
_PRODUCTS = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1)}
# They multiply much and are not counted here, so that a graph with one of them has no known sum.
_NOT_COUNTED = frozenset(
    {"Attention", "ConvTranspose", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan", "SequenceMap"}
)


@dataclass(frozen=True)
class OnnxCosts:
    """Holds what was counted in a graph; None where it cannot be known.

    Attributes:
        macs: multiply-accumulates of Conv, Gemm and MatMul (quantised ones too) in a pass over one image.
        parameters: numbers that the file holds as weights: floating point and quantised tensors.
    """

    macs: int | None
    parameters: int | None


def count_costs(path: Path, input_name: str, input_shape: Sequence[int]) -> OnnxCosts:
    """Counts the costs of the model at `path` for inputs of `input_shape`; knows nothing without the package onnx."""
    try:
        import onnx
    except ImportError:
        return OnnxCosts(None, None)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            from onnx import inliner

            model = inliner.inline_local_functions(model)
        for value in model.graph.input:
            if value.name == input_name:
                _set_shape(value, input_shape)
        # Shapes that were written down for any batch would stand in the way of those for this one.
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # of protobuf, of the checker and of inference, without a common base
        return OnnxCosts(None, None)
    return OnnxCosts(_macs(model.graph), _parameters(model.graph, onnx.TensorProto))


def _set_shape(value: Any, shape: Sequence[int]) -> None:
    axes = value.type.tensor_type.shape
    del axes.dim[:]
    for length in shape:
        axes.dim.add().dim_value = length


def _macs(graph: Any) -> int | None:
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        macs = _macs_of(node, shapes)
        if macs is None:
            return None
        total += macs
    return total


def _macs_of(node: Any, shapes: dict[str, tuple[int, ...] | None]) -> int | None:
    kind = node.op_type
    if kind in _CONVOLUTIONS:
        weights, output = shapes.get(node.input[_CONVOLUTIONS[kind]]), shapes.get(node.output[0])
        # Each number of the output is a product with one filter.
        return None if weights is None or output is None else math.prod(output) * math.prod(weights[1:])
    if kind in _PRODUCTS:
        left, right = (shapes.get(node.input[place]) for place in _PRODUCTS[kind])
        output = shapes.get(node.output[0])
        if left is None or right is None or output is None:
            return None
        transposed = kind == "Gemm" and any(each.name == "transA" and each.i for each in node.attribute)
        return math.prod(output) * (left[0] if transposed else left[-1])
    if kind in _NOT_COUNTED or node.domain not in ("", "ai.onnx"):
        return None
    return 0


def _shape(value: Any) -> tuple[int, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(axis.HasField("dim_value") for axis in kind.shape.dim):
        return None
    return tuple(axis.dim_value for axis in kind.shape.dim)


def _parameters(graph: Any, types: Any) -> int:
    floating = {types.FLOAT, types.DOUBLE, types.FLOAT16, types.BFLOAT16}
    quantised = {types.INT8, types.UINT8, types.INT4, types.UINT4}
    # Quantised scalars are zero points, not weights.
    return sum(
        math.prod(tensor.dims)
        for tensor in (*graph.initializer, *_constants(graph))
        if tensor.data_type in floating or (tensor.data_type in quantised and math.prod(tensor.dims) > 1)
    )


def _constants(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (each.t for each in node.attribute if each.name == "value" and math.prod(each.t.dims) > 1)
