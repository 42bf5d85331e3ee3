"""Defines what the protocol speaks of: tensors, requests, responses, datatypes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import RequestError, UnsupportedError

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "InferResponse",
    "Parameter",
    "Parameters",
    "RequestedOutput",
    "Tensor",
    "TensorHead",
    "kind",
    "kind_name",
    "numpy_dtype",
    "oip_datatype",
    "shown",
]

HEADER_LENGTH = "Inference-Header-Content-Length"

Parameter = str | int | float | bool
Parameters = dict[str, Parameter]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


_JSON_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "a bool",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "a list",
    str: "a string",
}
_MAX_SHOWN = 60  # characters of what a sender wrote


def kind(value: object) -> str:
    """Names the type of a parsed value as JSON does; of None, says that nothing was found."""
    return "nothing" if value is None else kind_name(type(value))


def kind_name(wanted: type) -> str:
    """Names a type as JSON does."""
    return _JSON_NAMES.get(wanted, wanted.__name__)


def shown(value: object) -> str:
    """Shows a parsed JSON value in a message: texts are cut, and of lists and objects only the kind is shown."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]!r}..."
    return kind(value) if value is None or isinstance(value, list | dict) else repr(value)[:_MAX_SHOWN]


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """Gives the little-endian numpy dtype of a numeric OIP datatype.

    Raises:
        UnsupportedError: BF16, which numpy does not have.
        RequestError: BYTES, which has no fixed size, or no datatype of the protocol.
    """
    try:
        return _DTYPES[datatype]
    except KeyError:
        if datatype == "BF16":
            raise UnsupportedError("datatype BF16 is not offered; send FP32 or FP16") from None
        raise RequestError(f"unknown datatype {shown(datatype)}; expected one of {', '.join(_DTYPES)}, BYTES") from None


def oip_datatype(dtype: np.dtype[Any]) -> str:
    """Gives the OIP name of a numeric numpy dtype.

    Raises:
        UnsupportedError: the protocol has no such datatype.
    """
    try:
        return _NAMES[dtype.newbyteorder("<")]
    except KeyError:
        raise UnsupportedError(f"numpy dtype {dtype} has no datatype in the Open Inference Protocol") from None


@dataclass(slots=True)
class TensorHead:
    """Describes a tensor before its data is read.

    Attributes:
        name: as the model calls it.
        datatype: OIP name, e.g. UINT8 or BYTES.
        shape: row-major.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Tensor(TensorHead):
    """Holds one named tensor.

    Attributes:
        data: of that shape for numeric datatypes (parsed from a binary section it is read-only, and a view of the body
            where that is aligned); for BYTES a flat list, row-major.
        parameters: what the sender said about it.
    """

    data: NDArray[Any] | list[bytes]
    parameters: Parameters = field(default_factory=dict)


@dataclass(slots=True)
class RequestedOutput:
    """Names an output that the request wants. `binary` is None where the request leaves the form to its own default."""

    name: str
    binary: bool | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    """Holds one inference request.

    Attributes:
        inputs: at least one tensor, or none when `raw` is set.
        outputs: the outputs wanted, or None for all of them.
        id: echoed in the response when given.
        parameters: of the request; `binary_data_output` is in `binary_output`.
        binary_output: outputs travel as binary unless they say otherwise themselves.
        raw: the whole body as one unnamed tensor of batch 1 (`Inference-Header-Content-Length: 0`).
        raw_is_file: whoever sent it says that it is an image file.
    """

    inputs: list[Tensor]
    outputs: list[RequestedOutput] | None = None
    id: str | None = None
    parameters: Parameters = field(default_factory=dict)
    binary_output: bool = False
    raw: bytes | None = None
    raw_is_file: bool = False


@dataclass(slots=True)
class InferResponse:
    """Holds one inference response."""

    model_name: str
    outputs: list[Tensor]
    model_version: str | None = None
    id: str | None = None
    parameters: Parameters = field(default_factory=dict)
