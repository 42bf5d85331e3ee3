"""Turns a classifier of uint8 pixels into one of float32: mixtures of images are neither whole nor in 0..255.

Berrut's code sends such mixtures to the user's own model. Rounding and clipping them would be another code than the
paper's, so the input of the ONNX graph is declared FLOAT in place of UINT8. The graph's own cast then has nothing to
do, and the scores of ordinary images stay what they were (checked by whoever loads it).
"""

from collections.abc import Iterator

from evenkeel.errors import ConfigurationError

__all__ = ["with_float_input"]

# Numbers of fields and types in onnx.proto.
_MODEL_GRAPH, _GRAPH_INPUT, _VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 7, 11, 1, 2, 1, 1
_FLOAT, _UINT8 = 1, 2
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

_FieldPlace = tuple[int, int, int]  # number, where its value begins, where it ends


def with_float_input(content: bytes, input_name: str) -> bytes:
    """Gives the ONNX file `content` with input `input_name` of float32 where it was uint8; all else is the same.

    Raises:
        ConfigurationError: no ONNX file, or no such input of uint8.
    """
    try:
        place = next(_element_types(content, input_name.encode()), None)
    except (IndexError, ValueError) as error:
        raise ConfigurationError("the classifier's file is not an ONNX model") from error
    if place is None or content[place] != _UINT8:
        raise ConfigurationError(f"the classifier has no input {input_name!r} of uint8 that could take float32 instead")
    return content[:place] + bytes([_FLOAT]) + content[place + 1 :]


def _element_types(content: bytes, name: bytes) -> Iterator[int]:
    """Finds the byte that holds the element type of the input called `name`."""
    for graph in _within(content, (0, 0, len(content)), _MODEL_GRAPH):
        for value in _within(content, graph, _GRAPH_INPUT):
            if any(content[begin:end] == name for _, begin, end in _within(content, value, _VALUE_NAME)):
                for kind in _within(content, value, _VALUE_TYPE):
                    for tensor in _within(content, kind, _TYPE_TENSOR):
                        yield from (begin for _, begin, _ in _within(content, tensor, _TENSOR_ELEMENT))


def _within(content: bytes, message: _FieldPlace, wanted: int) -> Iterator[_FieldPlace]:
    """Finds the fields numbered `wanted` of a protobuf message."""
    _, at, end = message
    while at < end:
        tag, at = _varint(content, at)
        wire, begin = tag & 7, at
        if wire == _VARINT:
            _, at = _varint(content, at)
        elif wire == _LENGTH:
            length, begin = _varint(content, at)
            at = begin + length
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("a field that reaches out of its message")
        if tag >> 3 == wanted:
            yield wanted, begin, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Reads a number, and says where the next field begins."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
