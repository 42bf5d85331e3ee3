"""Reads an ONNX graph as a list of steps, each of an operator on floats, and takes out what training does not need."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor

from evenkeel.errors import ConfigurationError
from evenkeel.vision.networks.graph_integers import INTEGER_KINDS, of_floats
from evenkeel.vision.networks.graph_operators import OPERATOR_ERRORS, OPERATORS, Attributes

__all__ = ["GraphNode", "first_line", "read_steps", "without_late_blocks"]

_LAYERS = ("Conv", "Gemm", "MatMul")
# What they give of pixels are pixels.
_ON_RAW = ("Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_INTEGERS = (TensorProto.UINT8, TensorProto.INT8)
_BEHIND_SCORES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze")  # may stand between a softmax and the output


@dataclass(frozen=True)
class GraphNode:
    """Holds a step: an operator, the values that it takes and gives, its attributes, and its name in the graph."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else f"{self.kind} that gives {self.outputs[0]!r}"


def read_steps(model: ModelProto, output_name: str) -> tuple[list[GraphNode], dict[str, Tensor]]:
    """Gives the steps that lead to the output, in a pass's order, and the constants that they take.

    Local functions are written out, operators on integers become those on floats, what follows from constants alone is
    computed, paddings are joined with convolutions behind them, scales of integer weights with those, and a softmax
    at the end is left out.

    Raises:
        ConfigurationError: an operator is not known or cannot be read, or the graph is older than operator set 7.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)
    if opset < 7:
        raise ConfigurationError(f"the graph is of operator set {opset}; export it again with 7 or newer")
    constants = {each.name: _tensor(numpy_helper.to_array(each)) for each in model.graph.initializer}
    pixels = {each.name for each in model.graph.input if each.type.tensor_type.elem_type in _INTEGERS}
    steps = _needed(_steps(model.graph.node, constants, opset, pixels), output_name)
    _check(steps)
    steps = _with_own_scale(_folded(_without_softmax(steps, output_name), constants), constants)
    return _with_own_padding(steps, constants), constants


def without_late_blocks(steps: list[GraphNode], output_name: str, left_out: int) -> tuple[list[GraphNode], int]:
    """Passes by the last `left_out` residual blocks; gives the steps that are left, and how many blocks there were.

    Raises:
        ConfigurationError: there are fewer.
    """
    blocks = _residual_blocks(steps)
    if left_out > len(blocks):
        raise ConfigurationError(f"the graph has {len(blocks)} residual blocks, {left_out} are to be left out")
    return _needed(_passed_by(steps, blocks[len(blocks) - left_out :]), output_name), len(blocks)


def first_line(error: Exception) -> str:
    """Gives the first line of what an error says, or its name."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _tensor(array: Any) -> Tensor:
    whole = np.asarray(array)
    if whole.dtype.name in ("int2", "int4", "uint2", "uint4"):  # of a package of its own, to be held two in a byte
        whole = whole.astype(np.int8 if whole.dtype.name.startswith("int") else np.uint8)
    if whole.dtype.kind not in "iub":
        whole = whole.astype(np.float32)
    return torch.from_numpy(np.array(whole))


def _steps(
    nodes: Iterable[NodeProto], constants: dict[str, Tensor], opset: int, pixels: Iterable[str] = ()
) -> list[GraphNode]:
    """Reads the nodes; constants among them go to `constants`, operators on integers become those on floats.

    Args:
        nodes: in order.
        constants: the weights.
        opset: of the graph.
        pixels: inputs that are of integers.

    Raises:
        ConfigurationError: one of them cannot be read.
    """
    steps: list[GraphNode] = []
    raw = set(pixels)
    for node in nodes:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        attributes = {each.name: _attribute(each) for each in node.attribute}
        step = GraphNode(kind, tuple(node.input), tuple(node.output), attributes, node.name)
        try:
            if kind == "Constant":
                constants[node.output[0]] = _constant(attributes)
                continue
            if isinstance(attributes.get("value"), onnx.TensorProto):
                attributes["value"] = _tensor(numpy_helper.to_array(attributes["value"]))
            attributes |= {"opset": opset, "default_axis": 1 if opset < 13 else -1, "outputs": len(node.output)}
            if node.input and node.input[0] in raw:
                if kind in _ON_RAW:
                    raw.update(node.output)
                attributes["raw"] = True
            elif kind == "DequantizeLinear" and node.input[0] in constants:
                attributes["raw"] = True  # weights, which may be floats of eight bits
            if kind in INTEGER_KINDS:
                plain = of_floats((kind, step.inputs, step.outputs, attributes), constants, raw)
                steps += [GraphNode(*each, node.name) for each in plain]
            else:
                steps.append(step)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"the operator {step} cannot be read: {first_line(error)}") from error
    return steps


def _attribute(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _constant(attributes: dict[str, Any]) -> Tensor:
    value = next(iter(attributes.values()))
    return _tensor(numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value))


def _needed(steps: list[GraphNode], output: str) -> list[GraphNode]:
    """Leaves out what the scores do not come from."""
    wanted, kept = {output}, []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _residual_blocks(steps: list[GraphNode]) -> list[tuple[int, str]]:
    """Finds additions of a map to what layers made of it: their places, and the map's name, in a pass's order."""
    before: dict[str, int] = {}  # of each value, the steps that it was computed by: a bit for each
    made: dict[str, int] = {}
    layers, blocks = 0, []
    for place, step in enumerate(steps):
        seen = 1 << place
        for name in step.inputs:
            seen |= before.get(name, 0)
        layers |= (step.kind in _LAYERS) << place
        if step.kind == "Add" and all(name in made for name in step.inputs):
            for kept, branch in (step.inputs, step.inputs[::-1]):
                # Without a layer it is a part of an activation, such as that of a Gelu by a tanh.
                if before[branch] >> made[kept] & 1 and before[branch] & ~before[kept] & layers:
                    blocks.append((place, kept))
        for name in step.outputs:
            before[name], made[name] = seen, place
    return blocks


def _passed_by(steps: list[GraphNode], blocks: Iterable[tuple[int, str]]) -> list[GraphNode]:
    """Makes each of the `blocks` hand on the map that it would have added to."""
    changed = list(steps)
    for place, name in blocks:
        changed[place] = replace(steps[place], kind="Identity", inputs=(name,))
    return changed


def _check(steps: list[GraphNode]) -> None:
    unknown = {step.kind: step for step in reversed(steps) if step.kind not in OPERATORS}  # the first of each kind
    if unknown:
        flow = [str(step) for kind, step in unknown.items() if kind in ("If", "Loop", "Scan")]
        why = "control flow" if flow else "operators that evenkeel cannot train"
        raise ConfigurationError(f"the graph holds {why}: {', '.join(sorted(flow or map(str, unknown.values())))}")


def _without_softmax(steps: list[GraphNode], output: str) -> list[GraphNode]:
    """Makes a softmax at the end hand its input on: what stands before it are logits."""
    kept, name = list(steps), output
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        if name not in step.outputs:
            continue
        if step.kind in ("Softmax", "LogSoftmax"):
            kept[place] = replace(step, kind="Identity")
        if step.kind not in _BEHIND_SCORES:
            break
        name = step.inputs[0]
    return kept


def _folded(steps: list[GraphNode], constants: dict[str, Tensor]) -> list[GraphNode]:
    """Computes what follows from constants alone, into `constants`."""
    kept = []
    for step in steps:
        if not all(not name or name in constants for name in step.inputs):
            kept.append(step)
            continue
        inputs = [constants[name] if name else None for name in step.inputs]
        try:
            given = OPERATORS[step.kind](step.attributes, inputs)
        except OPERATOR_ERRORS as error:
            raise ConfigurationError(f"the operator {step} cannot be computed: {first_line(error)}") from error
        outputs = [given] if isinstance(given, Tensor) else given
        constants.update(zip(step.outputs, outputs, strict=False))
    return kept


def _named_padding(attributes: Attributes) -> bool:
    return attributes.get("auto_pad", "NOTSET") != "NOTSET"


def _readers(steps: list[GraphNode]) -> dict[str, list[int]]:
    """Gives the places of the steps that take each value."""
    readers: dict[str, list[int]] = {}
    for place, step in enumerate(steps):
        for name in step.inputs:
            readers.setdefault(name, []).append(place)
    return readers


def _with_own_scale(steps: list[GraphNode], constants: dict[str, Tensor]) -> list[GraphNode]:
    """Joins the factor behind a layer of integers with its weights: as integers they would hardly be learned.

    A dynamic quantiser leaves it there, since it multiplies by the scale of the images too.
    """
    readers, changed = _readers(steps), list(steps)
    for place, step in enumerate(steps):
        weight = step.inputs[1] if len(step.inputs) == 2 else ""
        # A dynamic quantiser makes no Gemm.
        if step.kind not in ("Conv", "MatMul") or not weight.endswith(".floats") or weight not in constants:
            continue
        value, behind = step.outputs[0], readers.get(step.outputs[0], [])
        while len(behind) == 1 and steps[behind[0]].kind in ("Cast", "Identity"):
            value = steps[behind[0]].outputs[0]
            behind = readers.get(value, [])
        if len(behind) != 1 or steps[behind[0]].kind != "Mul":
            continue
        factor = next((constants[name] for name in steps[behind[0]].inputs if name in constants), None)
        if factor is None or (along := _along_channels(factor, constants[weight], step.kind)) is None:
            continue
        scaled = f"{weight}.{place}"  # others may read the same weights
        constants[scaled] = constants[weight] * along
        changed[place] = replace(step, inputs=(step.inputs[0], scaled))
        changed[behind[0]] = replace(steps[behind[0]], kind="Identity", inputs=(value,))
    return changed


def _along_channels(factor: Tensor, weight: Tensor, kind: str) -> Tensor | None:
    """Gives a factor of a layer's output as one of its weights; None where it is not one number for each channel."""
    shape = [1] * weight.ndim
    if factor.numel() > 1:
        # Where channels are: in the output, counted from its end, and in the weights.
        behind, place = (weight.ndim - 1, 0) if kind == "Conv" else (1, -1)
        channels = weight.shape[place]
        if weight.ndim < 2 or factor.numel() != channels or factor.ndim < behind or factor.shape[-behind] != channels:
            return None
        shape[place] = channels
    return factor.reshape(shape)


def _with_own_padding(steps: list[GraphNode], constants: dict[str, Tensor]) -> list[GraphNode]:
    """Joins a Pad of zeros with the convolution behind it: padding by itself copies the map, and hides its size."""
    readers, joined, gone = _readers(steps), list(steps), set()
    for place, step in enumerate(steps):
        behind = readers.get(step.outputs[0], [])
        if step.kind != "Pad" or len(behind) != 1 or steps[behind[0]].kind != "Conv":
            continue
        reader, pads = steps[behind[0]], _pads_of_zeros(step, constants)
        if pads is None or _named_padding(reader.attributes) or reader.inputs[0] != step.outputs[0]:
            continue
        axes = len(pads) // 2 - 2
        before, after = pads[2 : 2 + axes], pads[4 + axes :]
        own = reader.attributes.get("pads", [0] * (2 * axes))
        both = [first + second for first, second in zip([*before, *after], own, strict=True)]
        inputs = (step.inputs[0], *reader.inputs[1:])
        joined[behind[0]] = replace(reader, inputs=inputs, attributes=reader.attributes | {"pads": both})
        gone.add(place)
    return [step for place, step in enumerate(joined) if place not in gone]


def _pads_of_zeros(step: GraphNode, constants: dict[str, Tensor]) -> list[int] | None:
    """Gives the widths of a Pad that puts zeros around maps; None for any other."""
    value = constants.get(step.inputs[2]) if len(step.inputs) > 2 and step.inputs[2] else None
    if len(step.inputs) > 3 or step.attributes.get("mode", "constant") != "constant":
        return None
    if len(step.inputs) > 2 and step.inputs[2] and value is None:
        return None
    if float(step.attributes.get("value", 0.0)) or (value is not None and float(value)):
        return None
    pads = step.attributes.get("pads")
    if pads is None:
        given = constants.get(step.inputs[1]) if len(step.inputs) > 1 else None
        pads = None if given is None else [int(each) for each in given.tolist()]
    if pads is None or len(pads) < 6 or min(pads) < 0:
        return None
    half = len(pads) // 2
    return None if any((*pads[:2], *pads[half : half + 2])) else list(pads)
