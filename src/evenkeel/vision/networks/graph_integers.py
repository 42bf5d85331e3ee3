"""Turns operators on 8-bit integers into those on the floats that the integers stand for.

Between them values flow as floats: what a quantiser gives is what it was given, cut off at its bounds. Sources: the
ONNX operator specification, and ONNX Runtime's contributed operators (ContribOperators.md).
"""

from typing import Any

from torch import Tensor

__all__ = ["INTEGER_KINDS", "dequantised", "of_floats"]

_StepOfGraph = tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]  # kind, inputs, outputs, attributes

_MICROSOFT = "com.microsoft."
# Operators of one image-like input, its scale and zero point, and those of the output.
_OF_ONE = ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax")
_OF_TWO = ("Add", "Mul")
_ONNX = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
_CONTRIBUTED = ("QGemm", *(f"QLinear{kind}" for kind in (*_OF_ONE, *_OF_TWO, "Concat", "MatMul")))
INTEGER_KINDS = frozenset((*_ONNX, *(f"{_MICROSOFT}{kind}" for kind in _CONTRIBUTED)))


def of_floats(step: _StepOfGraph, constants: dict[str, Tensor], raw: set[str]) -> list[_StepOfGraph]:
    """Gives the steps on floats that stand for `step`, of a kind in `INTEGER_KINDS`; weights go to `constants`.

    Args:
        step: an operator on integers.
        constants: of the graph.
        raw: values that are integers in this graph too: the pixels.

    Raises:
        ValueError: its weights are computed, or it is laid out in a way that is not known.
    """
    kind, inputs, outputs, attributes = step
    name = kind.removeprefix(_MICROSOFT).removeprefix("QLinear")
    names, before = [*inputs, *[""] * 9], list[_StepOfGraph]()

    def floats(value: str, scale: str, zero: str, axis: int = 0) -> str:
        """Gives the name of what an input stands for."""
        if value not in constants:
            if value not in raw:
                return value
            before.append(("DequantizeLinear", (value, scale, zero), (f"{value}.floats",), attributes | {"raw": True}))
        else:
            missing = [each for each in (scale, zero) if each and each not in constants]
            if missing:
                raise ValueError(f"its weights are computed ({', '.join(missing)})")
            constants[f"{value}.floats"] = dequantised(
                constants[value], constants.get(scale), constants.get(zero), axis % max(1, constants[value].ndim)
            )
        return f"{value}.floats"

    def bias(value: str, scale: str, other: str) -> list[str]:
        if not value:
            return []
        constants[f"{value}.floats"] = constants[value].float() * constants[scale] * constants[other]
        return [f"{value}.floats"]

    if kind == "DynamicQuantizeLinear":  # a scale of one and a zero point of zero, so that it changes nothing
        constants[outputs[1]], constants[outputs[2]] = Tensor([1.0]).reshape(()), Tensor([0.0]).reshape(())
        return [("Identity", inputs[:1], outputs[:1], attributes)]
    if kind in ("ConvInteger", "MatMulInteger"):
        axis = 0 if kind == "ConvInteger" else -1
        sides = (floats(names[0], "", names[2]), floats(names[1], "", names[3], axis))
        return [*before, (kind.removesuffix("Integer"), sides, outputs, attributes)]
    if name == "Conv":
        made = [
            floats(names[0], names[1], names[2]),
            floats(names[3], names[4], names[5]),
            *bias(names[8], names[1], names[4]),
        ]
        plain, scale, zero = "Conv", names[6], names[7]
    elif name == "QGemm":
        axis = 0 if attributes.get("transB", 0) else -1
        made = [
            floats(names[0], names[1], names[2]),
            floats(names[3], names[4], names[5], axis),
            *bias(names[6], names[1], names[4]),
        ]
        plain, scale, zero = "Gemm", names[7], names[8]
    elif name == "MatMul":
        made, plain, scale, zero = (
            [floats(names[0], names[1], names[2]), floats(names[3], names[4], names[5], -1)],
            "MatMul",
            names[6],
            names[7],
        )
    elif name in _OF_TWO:
        made, plain, scale, zero = (
            [floats(names[0], names[1], names[2]), floats(names[3], names[4], names[5])],
            name,
            names[6],
            names[7],
        )
    elif name == "Concat":
        made = [floats(*three) for three in zip(inputs[2::3], inputs[3::3], inputs[4::3], strict=True)]
        plain, scale, zero = "Concat", names[0], names[1]
    else:
        if attributes.get("channels_last", 0):
            raise ValueError("its channels are on the last axis; export it again with them on the second")
        made, plain, scale, zero = [floats(names[0], names[1], names[2])], name, names[3], names[4]
    if not scale:  # it gives floats
        return [*before, (plain, tuple(made), outputs, attributes)]
    between = f"{outputs[0]}.floats"
    bounds: _StepOfGraph = ("QuantizeLinear", (between, scale, zero), outputs, {})
    return [*before, (plain, tuple(made), (between,), attributes), bounds]


def dequantised(values: Tensor, scale: Tensor | None, zero: Tensor | None, axis: int) -> Tensor:
    """Gives the floats that integers stand for, with one scale and zero point for all or for each place on `axis`."""
    shape = [1] * values.ndim
    if values.ndim:
        shape[axis] = -1
    floats = values.float()
    if zero is not None:
        floats = floats - (zero.float().reshape(shape) if zero.numel() > 1 else zero.float().reshape(()))
    if scale is not None:
        floats = floats * (scale.reshape(shape) if scale.numel() > 1 else scale.reshape(()))
    return floats
