"""Describes a remote model, and turns tasks and replies for it into the wire's form and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.errors import BackendError, ProtocolError
from evenkeel.models.cards import ModelCard
from evenkeel.oip import (
    InferResponse,
    RequestedOutput,
    Tensor,
    TensorHead,
    numpy_dtype,
    parse_response,
    shown,
    write_request,
)
from evenkeel.oip.grpc import parse_infer_response, write_infer_request
from evenkeel.oip.protobuf import write_field
from evenkeel.oip.tensors import aligned, pack
from evenkeel.oip.types import Parameters

__all__ = ["Contract", "agree"]

_FP32 = np.dtype(np.float32)
_MAX_NAMES = 5  # in a message
_MAX_REPLY_BYTES = 16 << 20  # where the card does not say how many values there are
_OTHER_BYTES = 1 << 20  # of a reply, besides the requested values
_VALUE_BYTES = 64  # of one value as JSON, with room for blanks
_MAX_KNOWN = 64  # heads of messages that are remembered
_MAX_KNOWN_BYTES = 4 << 10  # of one of them


@dataclass(frozen=True, slots=True)
class Contract:
    """Writes the requests for one model of one server, and reads its replies.

    Attributes:
        binary: tensor data travels as binary sections.
        gives_up: the server stops working on a request whose connection is closed.
        check_version: is given the model's version as the server says it; raises where it is not the right one.
        says_exact: the server may answer by other models than the one that is asked, unless it is told not to.
    """

    card: ModelCard
    input_name: str
    output_name: str
    binary: bool
    gives_up: bool
    check_version: Callable[[str], object] = str
    says_range: bool = False  # its metadata says that pixels are 0..255, so that it understands who says the same
    says_exact: bool = False
    # The JSON before binary values is nearly always what it was before: it is neither written nor read again.
    _written: dict[tuple[int, ...], bytes] = field(default_factory=dict, repr=False, compare=False)  # by shape
    _agreed: dict[tuple[bytes, int, int], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    def write(self, inputs: Array) -> tuple[bytes, int | None]:
        """Writes the request for a task: its body and header length."""
        # Of an image that is nearly black one cannot see which range it has.
        said: Parameters = {"maximum": 255} if self.says_range else {}
        tensor = Tensor(self.input_name, self.card.datatype, inputs.shape, inputs, said)
        known = self._written.get(inputs.shape)
        if known is not None:
            return known + pack(tensor), len(known)
        output = RequestedOutput(self.output_name, True if self.binary else None)
        exact: Parameters = {"exact": True} if self.says_exact else {}
        body, header_length = write_request([tensor], [output], binary=self.binary, parameters=exact)
        if header_length is not None and len(self._written) < _MAX_KNOWN:
            self._written[inputs.shape] = body[:header_length]
        return body, header_length

    def write_call(self, model: str, version: str, inputs: Array) -> bytes:
        """Writes the gRPC message for a task."""
        known = self._written.get(inputs.shape)
        if known is None:
            head = TensorHead(self.input_name, self.card.datatype, inputs.shape)
            exact: Parameters = {"exact": True} if self.says_exact else {}
            # Of an image that is nearly black one cannot see which range it has.
            said: Parameters = {"maximum": 255} if self.says_exact else {}
            known = write_infer_request(model, version, head, [self.output_name], exact, said)
            if len(self._written) < _MAX_KNOWN:
                self._written[inputs.shape] = known
        values = inputs.astype(numpy_dtype(self.card.datatype), copy=False)
        return known + write_field(7, values.tobytes())

    def max_reply_bytes(self, rows: int) -> int:
        """Gives the size beyond which a reply to `rows` items is not read."""
        row = self.card.output_shape
        return _MAX_REPLY_BYTES if row is None else _OTHER_BYTES + rows * prod(row) * _VALUE_BYTES

    def read(self, body: bytes, header_length: int | None, rows: int) -> Array:
        """Reads the outputs `[rows, ...]`, float32, of a 200 response.

        Raises:
            ProtocolError: malformed, or not the requested output, or of the wrong shape, or not finite.
        """
        known = (b"", 0, rows)
        if header_length is not None and header_length <= _MAX_KNOWN_BYTES:
            known = (body[:header_length], len(body), rows)
            shape = self._agreed.get(known)
            if shape is not None:
                return _finite(aligned(body, _FP32, prod(shape), header_length).reshape(shape), self.output_name)
        response = parse_response(body, header_length)
        tensor = self._wanted(response)
        outputs, data = self._outputs(tensor, rows), tensor.data
        # Nothing but the values of this one tensor follows the JSON, so that the same JSON means the same again.
        behind = len(body) - len(known[0]) if known[0] else 0
        same = isinstance(data, np.ndarray) and data.dtype == _FP32 and data.nbytes == behind
        if behind and len(response.outputs) == 1 and same:
            if len(self._agreed) >= _MAX_KNOWN:
                self._agreed.clear()
            self._agreed[known] = outputs.shape
        return _finite(outputs, tensor.name)

    def read_answer(self, message: bytes, rows: int) -> Array:
        """Reads the outputs `[rows, ...]`, float32, of a gRPC message.

        Raises:
            ProtocolError: as `read`.
        """
        tensor = self._wanted(parse_infer_response(message))
        return _finite(self._outputs(tensor, rows), tensor.name)

    def _wanted(self, response: InferResponse) -> Tensor:
        if response.model_version:
            self.check_version(response.model_version)
        tensor = next((output for output in response.outputs if output.name == self.output_name), None)
        if tensor is None:
            names = ", ".join(shown(output.name) for output in response.outputs[:_MAX_NAMES])
            raise ProtocolError(f"expected output {self.output_name!r}, found {names or 'none'}")
        return tensor

    def _outputs(self, tensor: Tensor, rows: int) -> Array:
        data, row = tensor.data, self.card.output_shape
        if row is not None and tensor.shape != (rows, *row):
            raise ProtocolError(f"output {shown(tensor.name)} has shape {list(tensor.shape)}, expected {[rows, *row]}")
        if not isinstance(data, np.ndarray) or data.dtype.kind != "f":
            raise ProtocolError(f"output {shown(tensor.name)} has datatype {tensor.datatype}, expected FP32")
        with np.errstate(over="ignore"):  # what FP32 cannot hold becomes infinite
            return np.require(data, np.float32, ("C", "A"))


def _finite(outputs: Array, name: str) -> Array:
    if not np.isfinite(outputs).all():
        raise ProtocolError(f"output {shown(name)} holds values that are not finite")
    return outputs


def agree(
    card: ModelCard,
    server: Mapping[str, Any],
    model: Mapping[str, Any],
    check_version: Callable[[str], object] = str,
) -> Contract:
    """Makes the contract that follows from the server's and the model's metadata.

    Servers may leave inputs and outputs out; then the card's word is taken. A single input or output may have any name.

    Raises:
        BackendError: the model does not take what the card says, or is of another version.
    """
    versions = model.get("versions")
    if isinstance(versions, list) and len(versions) == 1 and isinstance(versions[0], str):
        check_version(versions[0])
    extensions = server.get("extensions")
    extensions = extensions if isinstance(extensions, list) else []
    wanted = _pick(model, "inputs", card.input_name)
    given = _pick(model, "outputs", card.output_name)
    datatype = wanted.get("datatype", card.datatype)
    if datatype != card.datatype:
        raise BackendError(
            f"input {shown(wanted['name'])} takes {shown(datatype)}, but the model card says {card.datatype}"
        )
    shape = wanted.get("shape")
    if isinstance(shape, list) and len(shape) == 4:
        for size, expected in zip(shape[1:], card.input_shape, strict=True):
            if size not in (-1, expected):
                raise BackendError(
                    f"input {shown(wanted['name'])} has shape [{', '.join(map(shown, shape))}], "
                    f"but the model card says {[-1, *card.input_shape]}"
                )
    return Contract(
        card,
        wanted["name"],
        given["name"],
        "binary_tensor_data" in extensions,
        "cancel_on_disconnect" in extensions,
        check_version,
        isinstance(limits := wanted.get("parameters"), dict) and limits.get("maximum") == 255,
        server.get("name") == "evenkeel",
    )


def _pick(model: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    listed = model.get(key)
    entries = [e for e in listed if isinstance(e, dict) and _is_name(e.get("name"))] if isinstance(listed, list) else []
    if not entries:
        return {"name": name}
    found = entries[0] if len(entries) == 1 else next((entry for entry in entries if entry["name"] == name), None)
    if found is None:
        names = ", ".join(shown(entry["name"]) for entry in entries[:_MAX_NAMES])
        raise BackendError(f"the model has {key} {names}, but none is called {name!r} as the model card says")
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)
