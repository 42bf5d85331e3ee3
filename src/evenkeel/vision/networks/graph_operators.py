"""Computes ONNX operators in PyTorch: those that image classifiers are made of.

Each function takes a node's attributes and its inputs (None for one left out), and gives what the node gives. Weights
and images are float32; axes, shapes and indices are int64 tensors. Source: the ONNX operator specification.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from evenkeel.vision.networks.depthwise import depthwise
from evenkeel.vision.networks.graph_integers import dequantised
from evenkeel.vision.networks.graph_resize import resized, sizes_of_resize

__all__ = ["OPERATORS", "OPERATOR_ERRORS", "Attributes", "filled", "margins"]

# What an operator fails with where it cannot take what it is given; of PyTorch, of Python, and of those here.
OPERATOR_ERRORS = (ArithmeticError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

Attributes = dict[str, Any]
Inputs = Sequence[Tensor | None]
Operator = Callable[[Attributes, Inputs], Tensor | Sequence[Tensor]]

_TORCH_TYPES = {2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool}


def _some(inputs: Inputs, place: int) -> Tensor | None:
    return inputs[place] if place < len(inputs) else None


def _given(inputs: Inputs, place: int) -> Tensor:
    value = inputs[place]
    assert value is not None
    return value


def _whole(value: Tensor) -> list[int]:
    """Gives the whole numbers in `value`."""
    return [int(each) for each in value.reshape(-1).tolist()]


def margins(attributes: Attributes, images: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Gives the padding before and behind each spatial axis."""
    axes = len(kernel)
    how = attributes.get("auto_pad", "NOTSET")
    if how in ("SAME_UPPER", "SAME_LOWER"):
        strides = attributes.get("strides", [1] * axes)
        dilations = attributes.get("dilations", [1] * axes)
        before, behind = [], []
        for place in range(axes):
            size, stride = int(images.shape[2 + place]), strides[place]
            reach = (kernel[place] - 1) * dilations[place] + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            first = total // 2 if how == "SAME_UPPER" else total - total // 2
            before.append(first)
            behind.append(total - first)
        return before, behind
    pads = [0] * (2 * axes) if how == "VALID" else list(attributes.get("pads", [0] * (2 * axes)))
    return pads[:axes], pads[axes:]


def _padded(images: Tensor, before: Sequence[int], behind: Sequence[int], value: float = 0.0) -> Tensor:
    """Pads the spatial axes of `images`."""
    if not any(before) and not any(behind):
        return images
    widths = [width for pair in zip(reversed(before), reversed(behind), strict=True) for width in pair]
    return functional.pad(images, widths, value=value)


def _conv(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, weight = _given(inputs, 0), _given(inputs, 1)
    axes = weight.ndim - 2
    before, behind = margins(attributes, images, weight.shape[2:])
    padding = before
    if before != behind:
        images, padding = _padded(images, before, behind), [0] * axes
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    strides, dilations = attributes.get("strides", [1] * axes), attributes.get("dilations", [1] * axes)
    groups, bias = attributes.get("group", 1), _some(inputs, 2)
    # While it is learned on a CPU; a graph that is exported keeps to plain operators.
    learned = torch.is_grad_enabled() and weight.requires_grad and not torch.onnx.is_in_onnx_export()
    if learned and axes == 2 and groups == len(weight) == images.shape[1] and images.device.type == "cpu":
        return depthwise(images, weight, bias, strides, padding, dilations)
    return convolve(images, weight, bias, strides, padding, dilations, groups)


def _conv_transpose(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, weight = _given(inputs, 0), _given(inputs, 1)
    axes = weight.ndim - 2
    if "output_shape" in attributes or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("its paddings follow from the size of its output; export it again with pads")
    pads, strides = attributes.get("pads", [0] * (2 * axes)), attributes.get("strides", [1] * axes)
    if pads[:axes] != pads[axes:]:
        raise ValueError(f"its paddings {pads} before and behind a map are not the same")
    convolve = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[axes - 1]
    more, dilations = attributes.get("output_padding", [0] * axes), attributes.get("dilations", [1] * axes)
    return convolve(images, weight, _some(inputs, 2), strides, pads[:axes], more, attributes.get("group", 1), dilations)


def _max_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, kernel = _given(inputs, 0), attributes["kernel_shape"]
    axes = len(kernel)
    before, behind = margins(attributes, images, kernel)
    strides, dilations = attributes.get("strides", [1] * axes), attributes.get("dilations", [1] * axes)
    padding = before
    if before != behind or any(2 * each > size for each, size in zip(before, kernel, strict=True)):
        images, padding = _padded(images, before, behind, float("-inf")), [0] * axes
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[axes - 1]
    return pool(images, kernel, strides, padding, dilations, bool(attributes.get("ceil_mode", 0)))


def _average_pool(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, kernel = _given(inputs, 0), attributes["kernel_shape"]
    axes = len(kernel)
    before, behind = margins(attributes, images, kernel)
    if any(each != 1 for each in attributes.get("dilations", [])):
        raise ValueError("it is dilated, which is not computed here")
    strides, ceil = attributes.get("strides", [1] * axes), bool(attributes.get("ceil_mode", 0))
    counted = bool(attributes.get("count_include_pad", 0))
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[axes - 1]
    if before == behind and all(2 * each <= size for each, size in zip(before, kernel, strict=True)):
        return pool(images, kernel, strides, before, ceil, counted)
    padded = _padded(images, before, behind)
    sums = pool(padded, kernel, strides, 0, ceil)
    if counted:
        return sums
    ones = _padded(torch.ones_like(images[:1, :1]), before, behind)
    return sums / pool(ones, kernel, strides, 0, ceil)


def _batch_normalization(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, scale, shift, mean, variance = (_given(inputs, place) for place in range(5))
    # With the statistics that the classifier was trained with: those of small batches would be worse.
    return functional.batch_norm(images, mean, variance, scale, shift, False, 0.0, attributes.get("epsilon", 1e-5))


def _gemm(attributes: Attributes, inputs: Inputs) -> Tensor:
    left, right, added = _given(inputs, 0), _given(inputs, 1), _some(inputs, 2)
    left = left.transpose(0, 1) if attributes.get("transA", 0) else left
    right = right.transpose(0, 1) if attributes.get("transB", 0) else right
    product = left @ right
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    return product if added is None else product + (added if beta == 1 else added * beta)


def _clip(attributes: Attributes, inputs: Inputs) -> Tensor:
    low, high = _some(inputs, 1), _some(inputs, 2)
    least = attributes.get("min") if low is None else float(low)
    most = attributes.get("max") if high is None else float(high)
    if least is not None and most is not None:
        return functional.hardtanh(_given(inputs, 0), float(least), float(most))  # its backward pass is one kernel
    return _given(inputs, 0) if least is most is None else _given(inputs, 0).clamp(least, most)


def _softmax(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, axis = _given(inputs, 0), int(attributes["axis"] if "axis" in attributes else attributes["default_axis"])
    if attributes["opset"] >= 13:
        return values.softmax(axis)
    axis = axis % values.ndim  # before, all axes from this one on were one
    return values.flatten(axis).softmax(-1).reshape(values.shape)


def _log_softmax(attributes: Attributes, inputs: Inputs) -> Tensor:
    return _softmax(attributes, inputs).clamp_min(1e-38).log()


def _layer_normalization(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    axis = attributes.get("axis", -1) % values.ndim
    shape = [int(size) for size in values.shape[axis:]]
    return functional.layer_norm(values, shape, _some(inputs, 1), _some(inputs, 2), attributes.get("epsilon", 1e-5))


def _instance_normalization(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, scale, shift = (_given(inputs, place) for place in range(3))
    return functional.instance_norm(images, None, None, scale, shift, eps=attributes.get("epsilon", 1e-5))


def _group_normalization(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, scale, shift = (_given(inputs, place) for place in range(3))
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)
    if attributes["opset"] < 21:  # with a scale per group, before
        scale, shift = (each.repeat_interleave(images.shape[1] // groups) for each in (scale, shift))
    return functional.group_norm(images, groups, scale, shift, epsilon)


def _lrn(attributes: Attributes, inputs: Inputs) -> Tensor:
    alpha, beta, bias = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    return functional.local_response_norm(_given(inputs, 0), attributes["size"], alpha, beta, bias)


def _axes(attributes: Attributes, inputs: Inputs, place: int = 1) -> list[int] | None:
    given = _some(inputs, place)
    if given is not None:
        return _whole(given)
    return attributes.get("axes")


def _reduce(reduction: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(attributes: Attributes, inputs: Inputs) -> Tensor:
        values, axes = _given(inputs, 0), _axes(attributes, inputs)
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return values
            axes = list(range(values.ndim))
        return reduction(values, axes, bool(attributes.get("keepdims", 1)))

    return run


def _product(values: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((each % values.ndim for each in axes), reverse=True):
        values = values.prod(axis, keepdim=keep)
    return values


def _cumulated(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, axis = _given(inputs, 0), int(_given(inputs, 1))
    backward = [axis] if attributes.get("reverse", 0) else []
    values = values.flip(backward) if backward else values
    sums = values.cumsum(axis)
    sums = sums - values if attributes.get("exclusive", 0) else sums
    return sums.flip(backward) if backward else sums


def _squeeze(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, axes = _given(inputs, 0), _axes(attributes, inputs)
    if axes is None:
        axes = [place for place, size in enumerate(values.shape) if place and size == 1]
    for axis in sorted((each % values.ndim for each in axes), reverse=True):
        # Of one image here, and of several elsewhere: a single image's graph may name the axis of images too.
        values = values.squeeze(axis) if int(values.shape[axis]) == 1 else values
    return values


def _unsqueeze(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, axes = _given(inputs, 0), _axes(attributes, inputs) or []
    for axis in sorted(each % (values.ndim + len(axes)) for each in axes):
        values = values.unsqueeze(axis)
    return values


def _flatten(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, axis = _given(inputs, 0), attributes.get("axis", 1)
    axis = axis + values.ndim if axis < 0 else axis
    if axis == 1:
        return values.flatten(1)
    if axis == 0:
        return values.reshape(1, -1)
    return values.flatten(0, axis - 1).flatten(1) if axis < values.ndim else values.reshape(-1, 1)


def _slice(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    if _some(inputs, 1) is None:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = _whole(_given(inputs, 1)), _whole(_given(inputs, 2))
        axes = list(range(len(starts))) if _some(inputs, 3) is None else _whole(_given(inputs, 3))
        steps = [1] * len(starts) if _some(inputs, 4) is None else _whole(_given(inputs, 4))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % values.ndim
        if step == 1:
            values = values[(slice(None),) * axis + (slice(start, None if end > 2**31 else end),)]
        else:
            size = int(values.shape[axis])
            kept = range(size)[slice(start, None if abs(end) > 2**31 else end, step)]
            values = values.index_select(axis, torch.tensor(list(kept), dtype=torch.int64, device=values.device))
    return values


def _gather(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, places = _given(inputs, 0), _given(inputs, 1)
    axis = attributes.get("axis", 0) % values.ndim
    size = int(values.shape[axis])
    places = torch.where(places < 0, places + size, places).long()
    if places.ndim == 0:
        return values.select(axis, int(places))
    chosen = values.index_select(axis, places.reshape(-1))
    return chosen.reshape(*values.shape[:axis], *places.shape, *values.shape[axis + 1 :])


def _split(attributes: Attributes, inputs: Inputs) -> Sequence[Tensor]:
    values, axis = _given(inputs, 0), attributes.get("axis", 0)
    given = _some(inputs, 1)
    sizes = attributes.get("split") if given is None else _whole(given)
    if sizes is None:
        parts = attributes["outputs"]
        sizes = [-(-int(values.shape[axis]) // parts)] * (parts - 1)
        sizes.append(int(values.shape[axis]) - sum(sizes))
    return torch.split(values, sizes, axis)


def _pad(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    pads = attributes.get("pads", attributes.get("paddings"))
    if pads is None:
        pads = _whole(_given(inputs, 1))
    axes = list(range(values.ndim)) if _some(inputs, 3) is None else _whole(_given(inputs, 3))
    widths = [0] * (2 * values.ndim)
    for place, axis in enumerate(axes):
        last = values.ndim - 1 - axis % values.ndim
        widths[2 * last], widths[2 * last + 1] = pads[place], pads[len(axes) + place]
    while len(widths) > 2 and not any(widths[-2:]):
        widths = widths[:-2]
    mode = {"constant": "constant", "edge": "replicate", "reflect": "reflect", "wrap": "circular"}[
        attributes.get("mode", "constant")
    ]
    if mode != "constant":
        return functional.pad(values, widths, mode=mode)
    filled = _some(inputs, 2)
    return functional.pad(values, widths, value=attributes.get("value", 0.0) if filled is None else float(filled))


def _shape(attributes: Attributes, inputs: Inputs) -> Tensor:
    sizes = [int(size) for size in _given(inputs, 0).shape]
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _transpose(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    return values.permute(attributes.get("perm", list(reversed(range(values.ndim)))))


def _cast_to(attributes: Attributes, inputs: Inputs) -> Tensor:
    # All floats are float32 here: half precision in a file is a matter of its size.
    return _given(inputs, 0).to(_TORCH_TYPES.get(attributes["to"], torch.float32))


def filled(attributes: Attributes, shape: Sequence[int]) -> Tensor:
    """Gives what ConstantOfShape does."""
    value = attributes.get("value")
    return torch.zeros(tuple(shape)) if value is None else cast(Tensor, value.reshape(-1)[0].expand(tuple(shape)))


def _reshape(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, shape = _given(inputs, 0), attributes.get("shape")
    asked = _whole(_given(inputs, 1)) if shape is None else list(shape)
    if not attributes.get("allowzero", 0):
        asked = [int(values.shape[axis]) if size == 0 else size for axis, size in enumerate(asked)]
    return values.reshape(asked)


def _expand(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    return values.expand(np.broadcast_shapes(tuple(values.shape), tuple(_whole(_given(inputs, 1)))))


def _dequantize_linear(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, scale = _given(inputs, 0), _given(inputs, 1)
    if values.is_floating_point() and not attributes.get("raw", False):
        return values  # as its quantiser left it
    if attributes.get("block_size", 0):
        raise ValueError("it has scales for blocks of weights; export it with one for each filter")
    return dequantised(values, scale, _some(inputs, 2), attributes.get("axis", 1) % max(1, values.ndim))


def _quantize_linear(attributes: Attributes, inputs: Inputs) -> Tensor:
    # The rounding is left out, so that it can be trained through; the bounds stay, which often stand for a ReLU.
    values, scale, zero = _given(inputs, 0), _given(inputs, 1), _some(inputs, 2)
    if scale.numel() > 1:
        return values
    low, high = (0, 255) if zero is None else (torch.iinfo(zero.dtype).min, torch.iinfo(zero.dtype).max)
    offset = 0.0 if zero is None else float(zero)
    return values.clamp((low - offset) * float(scale), (high - offset) * float(scale))


def _depth_to_space(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, block = _given(inputs, 0), attributes["blocksize"]
    if attributes.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(images, block)
    count, depth, height, width = images.shape
    parts = images.reshape(count, block, block, depth // block**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(count, depth // block**2, height * block, width * block)


def _space_to_depth(attributes: Attributes, inputs: Inputs) -> Tensor:
    images, block = _given(inputs, 0), attributes["blocksize"]
    count, depth, height, width = images.shape
    parts = images.reshape(count, depth, height // block, block, width // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(count, depth * block**2, height // block, width // block)


def _concat(attributes: Attributes, inputs: Inputs) -> Tensor:
    parts, axis = [each for each in inputs if each is not None], attributes["axis"]
    rows = max(int(each.shape[0]) for each in parts)
    if axis % parts[0].ndim and rows > 1:  # a constant part of one row, such as a class token, is for every image
        parts = [each.expand(rows, *each.shape[1:]) if each.shape[0] == 1 else each for each in parts]
    return torch.cat(parts, axis)


def _power(attributes: Attributes, inputs: Inputs) -> Tensor:
    base, exponent = _given(inputs, 0), _given(inputs, 1)
    return base.pow(float(exponent)) if exponent.numel() == 1 else base.pow(exponent)


def _divide(attributes: Attributes, inputs: Inputs) -> Tensor:
    left, right = _given(inputs, 0), _given(inputs, 1)
    whole = not left.is_floating_point() and not right.is_floating_point()
    return torch.div(left, right, rounding_mode="trunc") if whole else left / right


def _gelu(attributes: Attributes, inputs: Inputs) -> Tensor:
    return functional.gelu(_given(inputs, 0), approximate=attributes.get("approximate", "none"))


def _p_relu(attributes: Attributes, inputs: Inputs) -> Tensor:
    values, slope = _given(inputs, 0), _given(inputs, 1)
    return torch.where(values < 0, values * slope, values)


def _thresholded(attributes: Attributes, inputs: Inputs) -> Tensor:
    values = _given(inputs, 0)
    return torch.where(values > attributes.get("alpha", 1.0), values, torch.zeros_like(values))


def _one(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda attributes, inputs: function(_given(inputs, 0))


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda attributes, inputs: function(_given(inputs, 0), _given(inputs, 1))


def _all(function: Callable[[Tensor, Tensor], Tensor], shared: bool = False) -> Operator:
    def run(attributes: Attributes, inputs: Inputs) -> Tensor:
        total = _given(inputs, 0)
        for place in range(1, len(inputs)):
            total = function(total, _given(inputs, place))
        return total / len(inputs) if shared else total

    return run


def _spatial(values: Tensor) -> list[int]:
    return list(range(2, values.ndim))


OPERATORS: dict[str, Operator] = {
    "Abs": _one(torch.abs),
    "Add": _two(torch.add),
    "And": _two(torch.logical_and),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast_to,
    "CastLike": lambda attributes, inputs: _given(inputs, 0).to(_given(inputs, 1).dtype),
    "Ceil": _one(torch.ceil),
    "Celu": lambda attributes, inputs: functional.celu(_given(inputs, 0), attributes.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": lambda attributes, inputs: filled(attributes, _whole(_given(inputs, 0))),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _one(torch.cos),
    "CumSum": _cumulated,
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _dequantize_linear,
    "Div": _divide,
    "Dropout": _one(lambda values: values),
    "Einsum": lambda attributes, inputs: torch.einsum(
        attributes["equation"], *(each for each in inputs if each is not None)
    ),
    "Elu": lambda attributes, inputs: functional.elu(_given(inputs, 0), attributes.get("alpha", 1.0)),
    "Equal": _two(torch.eq),
    "Erf": _one(torch.erf),
    "Exp": _one(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _one(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _one(lambda images: images.mean(_spatial(images), keepdim=True)),
    "GlobalMaxPool": _one(lambda images: images.amax(_spatial(images), keepdim=True)),
    "Greater": _two(torch.gt),
    "GreaterOrEqual": _two(torch.ge),
    "GroupNormalization": _group_normalization,
    "HardSigmoid": lambda attributes, inputs: (
        _given(inputs, 0) * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5)
    ).clamp(0, 1),
    "HardSwish": _one(functional.hardswish),
    "Identity": _one(lambda values: values),
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": lambda attributes, inputs: functional.leaky_relu(_given(inputs, 0), attributes.get("alpha", 0.01)),
    "Less": _two(torch.lt),
    "LessOrEqual": _two(torch.le),
    "Log": _one(torch.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _two(torch.matmul),
    "Max": _all(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _all(torch.add, shared=True),
    "Min": _all(torch.minimum),
    "Mish": _one(functional.mish),
    "Mod": lambda attributes, inputs: (torch.fmod if attributes.get("fmod", 0) else torch.remainder)(
        _given(inputs, 0), _given(inputs, 1)
    ),
    "Mul": _two(torch.mul),
    "Neg": _one(torch.neg),
    "Not": _one(torch.logical_not),
    "Or": _two(torch.logical_or),
    "PRelu": _p_relu,
    "Pad": _pad,
    "Pow": _power,
    "QuantizeLinear": _quantize_linear,
    "Reciprocal": _one(torch.reciprocal),
    "Range": lambda attributes, inputs: torch.arange(*(each.item() for each in inputs if each is not None)),
    "ReduceL1": _reduce(lambda values, axes, keep: values.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(lambda values, axes, keep: (values * values).sum(axes, keepdim=keep).sqrt()),
    "ReduceMax": _reduce(lambda values, axes, keep: values.amax(axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda values, axes, keep: values.mean(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda values, axes, keep: values.amin(axes, keepdim=keep)),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(lambda values, axes, keep: values.sum(axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda values, axes, keep: (values * values).sum(axes, keepdim=keep)),
    "Relu": _one(functional.relu),
    "Reshape": _reshape,
    "Resize": lambda attributes, inputs: resized(attributes, inputs, sizes_of_resize(attributes, inputs)),
    "Round": _one(torch.round),
    "Selu": _one(functional.selu),
    "Shape": _shape,
    "Sigmoid": _one(torch.sigmoid),
    "Sign": _one(torch.sign),
    "Sin": _one(torch.sin),
    "Size": _one(lambda values: torch.tensor(values.numel(), dtype=torch.int64)),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _one(functional.softplus),
    "Softsign": _one(functional.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _two(torch.sub),
    "Sum": _all(torch.add),
    "Tanh": _one(torch.tanh),
    "ThresholdedRelu": _thresholded,
    "Tile": lambda attributes, inputs: _given(inputs, 0).repeat(_whole(_given(inputs, 1))),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": lambda attributes, inputs: resized(attributes, inputs, sizes_of_resize(attributes, inputs)),
    "Where": lambda attributes, inputs: torch.where(_given(inputs, 0), _given(inputs, 1), _given(inputs, 2)),
}
