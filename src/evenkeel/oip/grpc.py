"""Reads and writes the protocol's gRPC messages for inference, for both sides.

They hold what the REST form holds: a request becomes the same `InferRequest`. Tensors travel as raw_input_contents, or
as typed contents, which are slower. Source: the protocol's published service definition, which has these numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ProtocolError, RequestError, UnsupportedError
from evenkeel.oip.message import MAX_TENSORS
from evenkeel.oip.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    MessageTable,
    read,
    read_fields,
    read_varint,
    text,
    varint,
    write_field,
)
from evenkeel.oip.requests import MAX_ID, NOT_OFFERED, check_count, refuse_twins
from evenkeel.oip.tensors import aligned, pack, read_raw, read_shape
from evenkeel.oip.types import (
    InferRequest,
    InferResponse,
    Parameter,
    Parameters,
    RequestedOutput,
    Tensor,
    TensorHead,
    numpy_dtype,
    shown,
)

__all__ = [
    "PARAMETER",
    "InferCall",
    "RepeatedCalls",
    "parse_infer_request",
    "parse_infer_response",
    "read_target",
    "write_infer_request",
    "write_infer_response",
    "write_outputs",
]

PARAMETER: MessageTable = {
    1: ("bool_param", "bool"),
    2: ("int64_param", "int64"),
    3: ("string_param", "string"),
    4: ("double_param", "double"),
    5: ("uint64_param", "uint64"),
}
_ENTRY: MessageTable = {1: ("key", "string"), 2: ("value", PARAMETER)}

# The field of typed contents that holds each datatype's values; FP16 and BF16 have none.
_CONTENTS = {
    "BOOL": (1, "bool_contents"),
    "INT8": (2, "int_contents"),
    "INT16": (2, "int_contents"),
    "INT32": (2, "int_contents"),
    "INT64": (3, "int64_contents"),
    "UINT8": (4, "uint_contents"),
    "UINT16": (4, "uint_contents"),
    "UINT32": (4, "uint_contents"),
    "UINT64": (5, "uint64_contents"),
    "FP32": (6, "fp32_contents"),
    "FP64": (7, "fp64_contents"),
    "BYTES": (8, "bytes_contents"),
}
_PIECE_BYTES = 64 << 10  # of packed integers that are read in one step
_MAX_VARINT_BYTES = 10
_MAX_KNOWN = 128
_MAX_HEAD_BYTES = 1024

InferCall = tuple[str, str, InferRequest]  # the model's name, its version (empty for any), the request


def parse_infer_request(message: bytes, check: Callable[[TensorHead], object] = lambda head: None) -> InferCall:
    """Reads a ModelInferRequest, and checks it.

    Args:
        message: without gRPC's own five bytes.
        check: is given each input before its values are read, and may refuse it by an error.

    Raises:
        RequestError: anything malformed; the message names the tensor and says what is expected.
        UnsupportedError: a datatype or an extension that is not offered.
    """
    texts = {1: "", 2: "", 3: ""}
    parameters: Parameters = {}
    entries: dict[int, list[tuple[int, int]]] = {5: [], 6: [], 7: []}
    for number, wire, begin, end in read_fields(message, 0, len(message)):
        if number > 7:
            continue
        if wire != BYTES:
            raise RequestError("the message is no valid protobuf: a field has a wrong type")
        if number <= 3:
            texts[number] = text(message, begin, end)
        elif number == 4:
            _read_parameter(message, begin, end, parameters, "request")
        else:
            entries[number].append((begin, end))
    if len(texts[3]) > MAX_ID:
        raise RequestError(f"'id' has {len(texts[3])} characters; at most {MAX_ID} are taken")
    if not entries[5]:
        raise RequestError("'inputs' must hold at least one tensor")
    for number, what in ((5, "inputs"), (6, "outputs"), (7, "raw_input_contents")):
        check_count(entries[number], what)  # type: ignore[arg-type]
    inputs = _read_tensors(message, entries[5], entries[7], "input", check)
    outputs = [_read_output(message, begin, end, place) for place, (begin, end) in enumerate(entries[6])]
    refuse_twins([tensor.name for tensor in inputs], "input")
    refuse_twins([output.name for output in outputs], "output")
    request = InferRequest(inputs, outputs or None, texts[3] or None, parameters, binary_output=True)
    return texts[1], texts[2], request


def read_target(message: bytes) -> tuple[str, str]:
    """Reads the model's name and version of a ModelInferRequest, and nothing else.

    Raises:
        RequestError: it is malformed.
    """
    texts = {1: "", 2: ""}
    for number, wire, begin, end in read_fields(message, 0, len(message)):
        if number in texts and wire == BYTES:
            texts[number] = text(message, begin, end)
    return texts[1], texts[2]


class RepeatedCalls:
    """Reads requests that differ from an earlier one in nothing but their pixels, without reading the rest again.

    The plain twin is `parse_infer_request`: for every message both give equal requests, or raise the same error. What
    it returns must not be changed: it is shared.
    """

    def __init__(self) -> None:
        self._heads: dict[int, int] = {}  # size of a message -> that of its part before the pixels
        self._known: dict[bytes, tuple[str, str, InferRequest, np.dtype[np.generic], int]] = {}

    def parse(self, message: bytes) -> InferCall:
        """Parses as `parse_infer_request` does."""
        size = len(message)
        head_bytes = self._heads.get(size)
        if head_bytes is not None:
            known = self._known.get(message[:head_bytes])
            # The head ends with the length of the pixels: that much follows, and nothing else.
            if known is not None and size == head_bytes + known[4] * known[3].itemsize:
                name, version, request, dtype, count = known
                before = request.inputs[0]
                data = aligned(message, dtype, count, head_bytes).reshape(before.shape)
                tensor = Tensor(before.name, before.datatype, before.shape, data, before.parameters)
                return name, version, InferRequest([tensor], request.outputs, None, request.parameters, True)
        name, version, request = parse_infer_request(message)
        self._remember(message, name, version, request)
        return name, version, request

    def _remember(self, message: bytes, name: str, version: str, request: InferRequest) -> None:
        tensor = request.inputs[0]
        # A BOOL has to be checked value by value, BYTES hold lengths of their own, an id is another one each time.
        if len(request.inputs) > 1 or tensor.datatype in ("BYTES", "BOOL") or request.id is not None:
            return
        number, _, begin, end = read_fields(message, 0, len(message))[-1]
        count, dtype = prod(tensor.shape), numpy_dtype(tensor.datatype)
        if number != 7 or begin > _MAX_HEAD_BYTES or not count or end - begin != count * dtype.itemsize:
            return
        if len(self._known) >= _MAX_KNOWN or len(self._heads) >= _MAX_KNOWN:
            self._known.clear()
            self._heads.clear()
        blank = Tensor(tensor.name, tensor.datatype, tensor.shape, [], tensor.parameters)  # holds no message
        kept = InferRequest([blank], request.outputs, None, request.parameters, True)
        self._heads[len(message)] = begin
        self._known[message[:begin]] = name, version, kept, dtype, count


def parse_infer_response(message: bytes) -> InferResponse:
    """Reads a ModelInferResponse, and checks it.

    Raises:
        ProtocolError: anything malformed.
    """
    texts = {1: "", 2: "", 3: ""}
    entries: dict[int, list[tuple[int, int]]] = {5: [], 6: []}
    try:
        for number, wire, begin, end in read_fields(message, 0, len(message)):
            if number > 6 or number == 4:
                continue
            if wire != BYTES:
                raise RequestError("a field has a wrong type")
            if number <= 3:
                texts[number] = text(message, begin, end)
            else:
                entries[number].append((begin, end))
        check_count(entries[5], "outputs")  # type: ignore[arg-type]
        outputs = _read_tensors(message, entries[5], entries[6], "output", lambda head: None)
    except RequestError as error:
        raise ProtocolError(f"the server's response is malformed: {error}") from error
    return InferResponse(texts[1], outputs, texts[2] or None, texts[3] or None)


def write_infer_request(
    name: str,
    version: str,
    tensor: TensorHead,
    outputs: Sequence[str],
    parameters: Parameters,
    tensor_parameters: Parameters,
) -> bytes:
    """Writes a ModelInferRequest up to its raw_input_contents, which are to follow by `write_field(7, ...)`."""
    head = [write_field(1, tensor.name.encode()), write_field(2, tensor.datatype.encode()), _write_shape(tensor.shape)]
    head += [_write_parameter(4, key, value) for key, value in tensor_parameters.items()]
    parts = [write_field(1, name.encode())]
    if version:
        parts.append(write_field(2, version.encode()))
    parts += [_write_parameter(4, key, value) for key, value in parameters.items()]
    parts.append(write_field(5, b"".join(head)))
    parts += [write_field(6, write_field(1, output.encode())) for output in outputs]
    return b"".join(parts)


def write_infer_response(response: InferResponse) -> bytes:
    """Writes a ModelInferResponse, all of its outputs as raw_output_contents."""
    raw = [write_field(6, pack(tensor)) for tensor in response.outputs]
    return b"".join([write_outputs(response), *raw])


def write_outputs(response: InferResponse) -> bytes:
    """Writes a ModelInferResponse up to its raw_output_contents, which are to follow by `write_field(6, ...)`."""
    parts = [write_field(1, response.model_name.encode())]
    if response.model_version:
        parts.append(write_field(2, response.model_version.encode()))
    if response.id:
        parts.append(write_field(3, response.id.encode("utf-8", "replace")))
    for tensor in response.outputs:
        head = write_field(1, tensor.name.encode()) + write_field(2, tensor.datatype.encode())
        parts.append(write_field(5, head + _write_shape(tensor.shape)))
    return b"".join(parts)


def _write_shape(shape: Sequence[int]) -> bytes:
    return write_field(3, b"".join(map(varint, shape))) if shape else b""


def _write_parameter(number: int, key: str, value: Parameter) -> bytes:
    if isinstance(value, bool):
        written = varint(1 << 3 | VARINT) + varint(value)
    elif isinstance(value, int):
        written = varint(2 << 3 | VARINT) + varint(value)
    elif isinstance(value, str):
        written = write_field(3, value.encode())
    else:
        written = varint(4 << 3 | FIXED64) + np.float64(value).astype("<f8").tobytes()
    return write_field(number, write_field(1, key.encode()) + write_field(2, written))


def _read_parameter(message: bytes, begin: int, end: int, parameters: Parameters, where: str) -> None:
    entry = read(message, _ENTRY, begin, end)
    key, value = entry.get("key", ""), entry.get("value", {})
    if len(value) != 1:
        raise RequestError(f"{where}: parameter {shown(key)} has {'several values' if value else 'no value'}")
    (parameters[key],) = value.values()


def _read_output(message: bytes, begin: int, end: int, place: int) -> RequestedOutput:
    name = ""
    parameters: Parameters = {}
    for number, wire, start, stop in read_fields(message, begin, end):
        if number in (1, 2) and wire != BYTES:
            raise RequestError("the message is no valid protobuf: a field has a wrong type")
        if number == 1:
            name = text(message, start, stop)
        elif number == 2:
            _read_parameter(message, start, stop, parameters, f"output {place}")
    if not name:
        raise RequestError(f"output {place}: 'name' must not be empty")
    for key in NOT_OFFERED:
        if parameters.get(key):
            raise UnsupportedError(f"output {shown(name)}: parameter {key!r} is not offered")
    return RequestedOutput(name, True, parameters)


def _read_tensors(
    message: bytes,
    entries: Sequence[tuple[int, int]],
    raw: Sequence[tuple[int, int]],
    what: str,
    check: Callable[[TensorHead], object],
) -> list[Tensor]:
    assert len(entries) <= MAX_TENSORS
    if raw and len(raw) != len(entries):
        raise RequestError(
            f"raw_{what}_contents holds {len(raw)} tensors, but there are {len(entries)} {what}s; expected one for each"
        )
    found = []
    for place, (begin, end) in enumerate(entries):
        head, parameters, contents = _read_head(message, begin, end, f"{what} {place}")
        label = shown(head.name)
        shape, count = read_shape(list(head.shape), label)
        if parameters.get("shared_memory_region") is not None:
            raise UnsupportedError(f"tensor {label}: shared memory is not offered; send its values")
        check(head)
        if raw:
            if contents:
                raise RequestError(f"tensor {label}: has both contents and raw_{what}_contents; expected one of them")
            data = read_raw(message, *raw[place], head.datatype, shape, count, label)
        else:
            data = _read_contents(message, contents, head.datatype, shape, count, label)
        found.append(Tensor(head.name, head.datatype, shape, data, parameters))
    return found


def _read_head(
    message: bytes, begin: int, end: int, where: str
) -> tuple[TensorHead, Parameters, list[tuple[int, int, int, int]]]:
    """Reads what a tensor says of itself; gives also the fields of its contents."""
    name = datatype = ""
    shape: list[int] = []
    parameters: Parameters = {}
    contents: list[tuple[int, int, int, int]] = []
    for number, wire, start, stop in read_fields(message, begin, end):
        if number == 3 and wire == VARINT:
            shape.append(_signed(start))
            continue
        if number > 5:
            continue
        if wire != BYTES:
            raise RequestError("the message is no valid protobuf: a field has a wrong type")
        if number == 1:
            name = text(message, start, stop)
        elif number == 2:
            datatype = text(message, start, stop)
        elif number == 3:
            while start < stop:
                size, start = read_varint(message, start, stop)
                shape.append(_signed(size))
        elif number == 4:
            _read_parameter(message, start, stop, parameters, where)
        else:
            contents += read_fields(message, start, stop)
    if not name:
        raise RequestError(f"{where}: 'name' must not be empty")
    return TensorHead(name, datatype, tuple(shape)), parameters, contents


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_contents(
    message: bytes,
    contents: Sequence[tuple[int, int, int, int]],
    datatype: str,
    shape: tuple[int, ...],
    count: int,
    label: str,
) -> NDArray[Any] | list[bytes]:
    if datatype not in _CONTENTS:
        numpy_dtype(datatype)  # says what is wrong with it
        raise UnsupportedError(f"tensor {label}: {datatype} has no typed contents; send raw_input_contents")
    wanted, name = _CONTENTS[datatype]
    if any(number != wanted for number, *_ in contents if number <= 8):
        raise RequestError(f"tensor {label}: values of {datatype} belong in {name}; another field holds some")
    fields = [found for found in contents if found[0] == wanted]
    if datatype == "BYTES":
        if len(fields) != count:
            raise RequestError(f"tensor {label}: shape says {count} elements, but bytes_contents holds {len(fields)}")
        if any(wire != BYTES for _, wire, _, _ in fields):
            raise RequestError("the message is no valid protobuf: a field has a wrong type")
        return [message[begin:end] for _, _, begin, end in fields]
    dtype = numpy_dtype(datatype)
    found = sum(_count(message, dtype, *field[1:]) for field in fields)
    if found != count:
        raise RequestError(f"tensor {label}: shape {list(shape)} has {count} elements, but {name} holds {found}")
    values = np.empty(count, dtype)
    place = 0
    for _, wire, begin, end in fields:
        for piece in _pieces(message, dtype, wire, begin, end):
            if dtype.kind != "f" and (int(piece.max()) > _most(dtype) or int(piece.min()) < _least(dtype)):
                raise RequestError(f"tensor {label}: a value does not fit into {datatype}")
            values[place : place + len(piece)] = piece
            place += len(piece)
    return values.reshape(shape)


def _most(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind == "b" else int(np.iinfo(dtype).max)


def _least(dtype: np.dtype[Any]) -> int:
    return 0 if dtype.kind == "b" else int(np.iinfo(dtype).min)


def _count(message: bytes, dtype: np.dtype[Any], wire: int, begin: int, end: int) -> int:
    """Counts the values of one field, packed or alone."""
    own = VARINT if dtype.kind != "f" else FIXED64 if dtype.itemsize == 8 else FIXED32
    if wire == own:
        return 1
    if wire != BYTES:
        raise RequestError("the message is no valid protobuf: a field has a wrong type")
    if own == VARINT:
        return int((np.frombuffer(message, np.uint8, end - begin, begin) < 0x80).sum()) if end > begin else 0
    if (end - begin) % dtype.itemsize:
        raise RequestError("the message is no valid protobuf: packed values are cut off")
    return (end - begin) // dtype.itemsize


def _pieces(message: bytes, dtype: np.dtype[Any], wire: int, begin: int, end: int) -> Iterator[NDArray[Any]]:
    """Gives the values of one field, in pieces between which other threads get their turn."""
    if wire == VARINT:
        value = _signed(begin) if dtype.kind == "i" else begin
        yield np.array([value], np.int64 if dtype.kind == "i" else np.uint64)
    elif dtype.kind == "f":
        yield np.frombuffer(message[begin:end], dtype)
    else:
        yield from _unpacked(message, begin, end, signed=dtype.kind == "i")


def _unpacked(message: bytes, begin: int, end: int, signed: bool) -> Iterator[NDArray[Any]]:
    """Reads packed integers: at each step those that lie whole in the next piece of the message."""
    while begin < end:
        size = min(end - begin, _PIECE_BYTES)
        data = np.frombuffer(message, np.uint8, size, begin)
        ends = np.flatnonzero(data < 0x80)
        lengths = np.diff(ends, prepend=-1)
        if not len(ends) or lengths.max() > _MAX_VARINT_BYTES:
            raise RequestError("the message is no valid protobuf: a number is cut off or too long")
        size = int(ends[-1]) + 1
        begin += size
        starts = ends - lengths + 1
        shifts = 7 * (np.arange(size) - np.repeat(starts, lengths))
        values = (data[:size] & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
        numbers: NDArray[Any] = np.bitwise_or.reduceat(values, starts)
        yield numbers.view(np.int64) if signed else numbers
