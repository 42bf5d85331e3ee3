"""Reads and writes inference requests: what a server reads, what a client writes."""

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from evenkeel.errors import RequestError, UnsupportedError
from evenkeel.oip.message import MAX_TENSORS, read_message
from evenkeel.oip.tensors import BinarySection, json_fields, pack, read_parameters, read_tensor
from evenkeel.oip.types import InferRequest, Parameter, Parameters, RequestedOutput, Tensor, TensorHead, shown

__all__ = ["MAX_ID", "NOT_OFFERED", "check_count", "json_part", "parse_request", "refuse_twins", "write_request"]

MAX_ID = 4096  # it is sent back
NOT_OFFERED = ("shared_memory_region", "classification")  # parameters of an output


def json_part(body: bytes, header_length: int | None) -> tuple[dict[str, Any], BinarySection | None]:
    """Reads the JSON object a message begins with; gives it and the binary data behind it (None without such a header).

    Raises:
        RequestError: the header does not fit the body, or its part is not a JSON object that can be taken.
    """
    if header_length is None:
        return read_message(body, False), None
    if not 0 <= header_length <= len(body):
        raise RequestError(f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes")
    return read_message(body[:header_length], True), BinarySection(body, header_length)


def check_count(entries: list[object], what: str) -> None:
    """Refuses a message that holds too many tensors.

    Raises:
        RequestError: it does.
    """
    if len(entries) > MAX_TENSORS:
        raise RequestError(f"{what!r} holds {len(entries)} entries; at most {MAX_TENSORS} are taken")


def parse_request(
    body: bytes, header_length: int | None = None, check: Callable[[TensorHead], object] = lambda head: None
) -> InferRequest:
    """Reads the request in `body`, and checks it.

    Args:
        body: the whole body, decompressed.
        header_length: value of the Inference-Header-Content-Length header; None when absent; 0 means that the whole
            body is one raw tensor.
        check: is given each input before a long array of its values is read, and may refuse it by an error.

    Raises:
        RequestError: anything malformed; the message names the tensor and says what is expected.
        UnsupportedError: a datatype or an extension that is not offered.
    """
    if header_length == 0:
        return InferRequest([], raw=body)
    message, section = json_part(body, header_length)
    inputs_given = message.get("inputs")
    if type(inputs_given) is not list or not inputs_given:
        raise RequestError("'inputs' must be a list with at least one tensor")
    check_count(inputs_given, "inputs")
    inputs = [read_tensor(entry, f"input {number}", section, check) for number, entry in enumerate(inputs_given)]
    if section is not None:
        section.finish()
    if len(inputs) > 1:
        refuse_twins([tensor.name for tensor in inputs], "input")
    given = message.get("parameters")
    parameters = read_parameters(given, "request") if given is not None else {}
    binary_output = parameters.get("binary_data_output", False)
    if type(binary_output) is not bool:
        raise RequestError(f"request: parameter 'binary_data_output' must be a bool, found {shown(binary_output)}")
    identity = message.get("id")
    if identity is not None and type(identity) is not str:
        raise RequestError(f"'id' must be a string, found {shown(identity)}")
    if identity is not None and len(identity) > MAX_ID:
        raise RequestError(f"'id' has {len(identity)} characters; at most {MAX_ID} are taken")
    outputs_given = message.get("outputs")
    outputs = None
    if outputs_given is not None:
        if type(outputs_given) is not list:
            raise RequestError("'outputs' must be a list")
        check_count(outputs_given, "outputs")
        # An empty list means the same as none at all: clients write it when they want everything.
        outputs = [_read_output(entry, number) for number, entry in enumerate(outputs_given)] or None
        if outputs is not None and len(outputs) > 1:
            refuse_twins([output.name for output in outputs], "output")
    return InferRequest(inputs, outputs, identity, parameters, binary_output)


def write_request(
    inputs: Sequence[Tensor],
    outputs: Sequence[RequestedOutput] = (),
    *,
    binary: bool,
    request_id: str | None = None,
    parameters: Parameters | None = None,
) -> tuple[bytes, int | None]:
    """Writes body and Inference-Header-Content-Length (None: do not send one) of a request.

    Args:
        inputs: at least one tensor.
        outputs: outputs wanted; none means all.
        binary: send tensor data as binary sections rather than as JSON.
        request_id: echoed by the server.
        parameters: of the request.

    Raises:
        RequestError: `binary` is false and a BYTES element is not text.
    """
    sections = [pack(tensor) for tensor in inputs] if binary else []
    sizes: Sequence[int | None] = [len(section) for section in sections] if binary else [None] * len(inputs)
    message: dict[str, Any] = {}
    if request_id is not None:
        message["id"] = request_id
    if parameters:
        message["parameters"] = parameters
    message["inputs"] = [json_fields(tensor, size) for tensor, size in zip(inputs, sizes, strict=True)]
    if outputs:
        message["outputs"] = [_output_fields(output) for output in outputs]
    text = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return text, None
    return b"".join([text, *sections]), len(text)


def _read_output(raw: object, number: int) -> RequestedOutput:
    if type(raw) is not dict:
        raise RequestError(f"output {number} must be an object with a 'name'")
    name = raw.get("name")
    if type(name) is not str or not name:
        raise RequestError(f"output {number}: 'name' must be a non-empty string")
    label = f"output {shown(name)}"
    parameters = read_parameters(raw.get("parameters"), label)
    for key in NOT_OFFERED:
        if parameters.get(key):
            raise UnsupportedError(f"{label}: parameter {key!r} is not offered")
    binary: Parameter | None = parameters.get("binary_data")
    if binary is not None and type(binary) is not bool:
        raise RequestError(f"{label}: parameter 'binary_data' must be a bool, found {shown(binary)}")
    return RequestedOutput(name, binary, parameters)


def _output_fields(output: RequestedOutput) -> dict[str, Any]:
    parameters = dict(output.parameters)
    if output.binary is not None:
        parameters["binary_data"] = output.binary
    return {"name": output.name, "parameters": parameters} if parameters else {"name": output.name}


def refuse_twins(names: list[str], what: str) -> None:
    """Refuses a name that is given twice.

    Raises:
        RequestError: one is.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RequestError(f"{what} {shown(name)} is given more than once")
        seen.add(name)
