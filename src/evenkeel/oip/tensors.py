"""Reads and writes tensor data in two wire forms: JSON `data`, and raw little-endian bytes behind the JSON.

Readers raise RequestError with the tensor's name in the message; they check everything, so that what they return is
consistent: `data` has exactly `shape` and `datatype`.
"""

from array import array
from collections.abc import Callable
from itertools import chain
from math import prod
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import RequestError
from evenkeel.oip.message import LongArray
from evenkeel.oip.types import Parameter, Parameters, Tensor, TensorHead, kind, kind_name, numpy_dtype, shown

__all__ = [
    "BinarySection",
    "aligned",
    "json_fields",
    "pack",
    "read_parameters",
    "read_raw",
    "read_shape",
    "read_tensor",
]

_MAX_DIMENSIONS = 16  # far above any model's need, below numpy's own limit
_MAX_ELEMENTS = 1 << 40  # numpy counts bytes in 63 bits
_MAX_BYTES_ELEMENTS = 1 << 16
_length = Struct("<I")
_INTEGER_CODES = {"u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q", "i1": "b", "<i2": "h", "<i4": "i", "<i8": "q"}
_codes = {np.dtype(name): code for name, code in _INTEGER_CODES.items()}
_PARAMETER_TYPES = (str, int, float, bool)


class BinarySection:
    """Takes what follows the JSON of a body from the front, tensor by tensor."""

    __slots__ = ("body", "position")

    def __init__(self, body: bytes, position: int) -> None:
        self.body, self.position = body, position

    def take(self, size: int, label: str) -> int:
        """Gives the place in `body` where the next `size` bytes begin."""
        start = self.position
        if size > len(self.body) - start:
            raise RequestError(
                f"tensor {label}: binary_data_size is {size}, but only {len(self.body) - start} bytes of binary data "
                f"are left in the body"
            )
        self.position = start + size
        return start

    def finish(self) -> None:
        """Refuses what is left over."""
        left = len(self.body) - self.position
        if left:
            raise RequestError(f"{left} bytes of binary data follow the last tensor; expected none")


def aligned(body: bytes, dtype: np.dtype[Any], count: int, start: int) -> NDArray[Any]:
    """Gives `count` > 0 values from `start`, read-only: a view of `body`, or a copy where that would be unaligned."""
    if start % dtype.itemsize:
        # Plain bytes are copied several times faster than values that do not lie on their own boundaries.
        return np.frombuffer(body[start : start + count * dtype.itemsize], dtype)
    return np.frombuffer(body, dtype, count, start)


def read_parameters(value: object, where: str) -> Parameters:
    """Reads the `parameters` object of a request, tensor or response; empty when absent."""
    if value is None:
        return {}
    if type(value) is not dict:
        raise RequestError(f"{where}: 'parameters' must be an object, found {kind(value)}")
    absent = False
    for key, entry in value.items():
        if entry is None:
            absent = True  # how clients with typed fields write what they do not set
        elif type(entry) not in _PARAMETER_TYPES:
            raise RequestError(f"{where}: parameter {shown(key)} must be a string, number or bool, found {kind(entry)}")
    return {key: entry for key, entry in value.items() if entry is not None} if absent else value


def read_tensor(
    raw: object,
    where: str,
    section: BinarySection | None,
    check: Callable[[TensorHead], object] = lambda head: None,
) -> Tensor:
    """Reads one entry of `inputs` or `outputs`.

    Args:
        raw: the parsed JSON entry.
        where: what to call it in messages until its name is known.
        section: the binary data behind the JSON; None when the body holds JSON only.
        check: is given the tensor before a long array of values is read, and may refuse it by an error.

    Raises:
        RequestError: a field is missing or wrong, or data and shape do not agree.
        UnsupportedError: a datatype or a form that is not offered.
    """
    if type(raw) is not dict:
        raise RequestError(f"{where} must be an object, found {kind(raw)}")
    name = raw.get("name")
    if type(name) is not str or not name:
        raise RequestError(f"{where}: 'name' must be a non-empty string, found {kind(name)}")
    label = shown(name)
    datatype = raw.get("datatype")
    if type(datatype) is not str:
        raise RequestError(f"tensor {label}: 'datatype' must be a string, found {kind(datatype)}")
    shape, count = read_shape(raw.get("shape"), label)
    given = raw.get("parameters")
    parameters = read_parameters(given, f"tensor {label}") if given is not None else {}
    size = parameters.get("binary_data_size")
    data: NDArray[Any] | list[bytes]
    if size is None:
        if raw.get("data") is None:
            raise RequestError(f"tensor {label}: expected 'data', or 'binary_data_size' among its parameters")
        if isinstance(raw["data"], LongArray):
            check(TensorHead(name, datatype, shape))
        data = _read_json(raw["data"], datatype, shape, count, label)
    else:
        if raw.get("data") is not None:
            raise RequestError(f"tensor {label}: has both 'data' and 'binary_data_size'; expected one of them")
        data = _read_binary(size, datatype, shape, count, label, section)
    return Tensor(name, datatype, shape, data, parameters)


def pack(tensor: Tensor) -> bytes:
    """Gives the binary form of a tensor's data."""
    data = tensor.data
    if isinstance(data, list):
        return b"".join([part for element in data for part in (_length.pack(len(element)), element)])
    return data.astype(numpy_dtype(tensor.datatype), copy=False).tobytes()


def json_fields(tensor: Tensor, binary_size: int | None) -> dict[str, Any]:
    """Gives the JSON entry of a tensor: with `data`, or with `binary_data_size` when its data travels as binary.

    Raises:
        RequestError: a BYTES element that is not UTF-8, which JSON cannot hold.
    """
    entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if binary_size is not None:
        entry["parameters"] = {**tensor.parameters, "binary_data_size": binary_size}
        return entry
    if tensor.parameters:
        entry["parameters"] = tensor.parameters
    data = tensor.data
    if isinstance(data, list):
        try:
            entry["data"] = [element.decode() for element in data]
        except UnicodeDecodeError:
            raise RequestError(f"tensor {tensor.name!r} holds bytes that are not text; ask for binary data") from None
    else:
        flat = data.reshape(-1).astype(numpy_dtype(tensor.datatype), copy=False)
        entry["data"] = flat if flat.flags.c_contiguous and flat.flags.aligned else flat.copy()
    return entry


def read_shape(value: object, label: str) -> tuple[tuple[int, ...], int]:
    """Reads a shape and counts its elements.

    Raises:
        RequestError: it is none that a tensor can have.
    """
    if type(value) is not list:
        raise RequestError(f"tensor {label}: 'shape' must be a list of integers, found {kind(value)}")
    if len(value) > _MAX_DIMENSIONS:
        raise RequestError(f"tensor {label}: shape has {len(value)} dimensions; at most {_MAX_DIMENSIONS} are taken")
    for size in value:
        if type(size) is not int or size < 0:
            raise RequestError(f"tensor {label}: 'shape' must hold integers >= 0, found {shown(size)}")
    # A side of zero hides the others from the count, but not from numpy.
    if prod(size or 1 for size in value) > _MAX_ELEMENTS and 0 in value:
        raise RequestError(f"tensor {label}: no tensor can have the shape {value}")
    return tuple(value), prod(value)


def _read_binary(
    size: Parameter, datatype: str, shape: tuple[int, ...], count: int, label: str, section: BinarySection | None
) -> NDArray[Any] | list[bytes]:
    if type(size) is not int or size < 0:
        raise RequestError(f"tensor {label}: 'binary_data_size' must be an integer >= 0, found {shown(size)}")
    if section is None:
        raise RequestError(
            f"tensor {label}: has 'binary_data_size', but the message has no Inference-Header-Content-Length header; "
            f"set it to the length of the JSON"
        )
    if datatype == "BYTES":
        start = section.take(size, label)
        return _read_elements(section.body, start, start + size, count, label)
    expected = count * numpy_dtype(datatype).itemsize
    if size != expected:
        raise RequestError(
            f"tensor {label}: shape {list(shape)} of {datatype} takes {expected} bytes, but binary_data_size is {size}"
        )
    start = section.take(size, label)
    return read_raw(section.body, start, start + size, datatype, shape, count, label)


def read_raw(
    body: bytes, start: int, end: int, datatype: str, shape: tuple[int, ...], count: int, label: str
) -> NDArray[Any] | list[bytes]:
    """Reads a tensor's data in its binary form, from `start` to `end`, a view of `body` where that is aligned.

    Raises:
        RequestError: it has another size than `shape` of `count` elements takes, or holds what is no value.
        UnsupportedError: the datatype is not offered.
    """
    if datatype == "BYTES":
        return _read_elements(body, start, end, count, label)
    dtype = numpy_dtype(datatype)
    if end - start != count * dtype.itemsize:
        raise RequestError(
            f"tensor {label}: shape {list(shape)} of {datatype} takes {count * dtype.itemsize} bytes, "
            f"found {end - start}"
        )
    data = aligned(body, dtype, count, start) if count else np.empty(0, dtype)
    if datatype == "BOOL" and count and data.view(np.uint8).max() > 1:
        raise RequestError(f"tensor {label}: a BOOL is one byte, 0 or 1; found another value")
    return data.reshape(shape)


def _read_elements(body: bytes, position: int, end: int, count: int, label: str) -> list[bytes]:
    if count > _MAX_BYTES_ELEMENTS:
        raise RequestError(
            f"tensor {label}: a BYTES tensor of {count} elements; at most {_MAX_BYTES_ELEMENTS} are taken"
        )
    elements: list[bytes] = []
    while position < end and len(elements) <= count:
        begin = position + 4
        if begin > end:
            raise RequestError(f"tensor {label}: the length of element {len(elements)} is cut off")
        position = begin + _length.unpack_from(body, begin - 4)[0]
        if position > end:
            raise RequestError(
                f"tensor {label}: element {len(elements)} says {position - begin} bytes, but {end - begin} are left"
            )
        elements.append(body[begin:position])
    if len(elements) != count:
        more = "more" if len(elements) > count else str(len(elements))
        raise RequestError(f"tensor {label}: shape says {count} elements, but the binary data holds {more}")
    return elements


def _read_json(
    data: object, datatype: str, shape: tuple[int, ...], count: int, label: str
) -> NDArray[Any] | list[bytes]:
    if isinstance(data, LongArray):
        return _read_long(data, datatype, shape, count, label)
    flat = _flatten(data, shape, count, label)
    if datatype == "BYTES":
        kinds = set(map(type, flat)) - {str}
        if kinds:
            raise RequestError(f"tensor {label}: BYTES elements must be strings, found {_names(kinds)}")
        return [element.encode() for element in flat]
    return _convert(flat, datatype, numpy_dtype(datatype), label).reshape(shape)


def _read_long(data: LongArray, datatype: str, shape: tuple[int, ...], count: int, label: str) -> NDArray[Any]:
    if datatype == "BYTES":
        raise RequestError(f"tensor {label}: BYTES elements must be strings, found a number")
    dtype = numpy_dtype(datatype)
    pieces = data.pieces(shape, count, label)
    first = next(pieces)  # which sees that there are as many values as the shape says, before they get their memory
    values = np.empty(count, dtype)
    done = 0
    for piece in chain((first,), pieces):
        values[done : done + len(piece)] = _convert(piece, datatype, dtype, label)
        done += len(piece)
    return values.reshape(shape)


def _convert(flat: list[Any], datatype: str, dtype: np.dtype[Any], label: str) -> NDArray[Any]:
    kinds = set(map(type, flat))
    allowed: set[type] = {bool} if dtype.kind == "b" else {int} if dtype.kind in "iu" else {int, float}
    if kinds - allowed:
        raise RequestError(
            f"tensor {label}: {datatype} elements must be {_names(allowed)}, found {_names(kinds - allowed)}"
        )
    try:
        if dtype in _codes:
            values: NDArray[Any] = np.frombuffer(array(_codes[dtype], flat), dtype) if flat else np.empty(0, dtype)
        else:
            with np.errstate(over="ignore"):
                values = np.array(flat, dtype)
    except OverflowError:
        raise RequestError(f"tensor {label}: a value does not fit into {datatype}") from None
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise RequestError(f"tensor {label}: a value does not fit into {datatype}")
    return values


def _flatten(data: object, shape: tuple[int, ...], count: int, label: str) -> list[Any]:
    """Gives the elements of `data` row-major; it is flat already or nested exactly as `shape` says."""
    if type(data) is not list:
        if not shape and type(data) is not dict:
            return [data]  # a scalar, written without brackets
        raise RequestError(f"tensor {label}: 'data' must be a list, found {kind(data)}")
    flat: list[Any] = data
    if len(shape) > 1 and flat and type(flat[0]) is list:
        if len(flat) != shape[0]:
            raise _does_not_fit(label, shape)
        for size in shape[1:]:
            if set(map(type, flat)) - {list} or set(map(len, flat)) - {size}:
                raise _does_not_fit(label, shape)
            flat = list(chain.from_iterable(flat))
    if len(flat) != count and not (count == 0 and not any(flat)):
        raise RequestError(f"tensor {label}: shape {list(shape)} has {count} elements, but 'data' holds {len(flat)}")
    return flat if count else []


def _does_not_fit(label: str, shape: tuple[int, ...]) -> RequestError:
    return RequestError(f"tensor {label}: 'data' must be flat, or nested as shape {list(shape)} says")


def _names(kinds: set[type]) -> str:
    return " or ".join(sorted(map(kind_name, kinds)))
