"""Reads and writes inference responses: what a server writes, what a client reads."""

from collections.abc import Sequence
from typing import Any

import orjson

from evenkeel.errors import ProtocolError, RequestError
from evenkeel.oip.requests import check_count, json_part
from evenkeel.oip.tensors import json_fields, pack, read_tensor
from evenkeel.oip.types import InferResponse, shown

__all__ = ["parse_response", "write_response"]


def write_response(response: InferResponse, binary: Sequence[bool]) -> tuple[bytes, int | None]:
    """Writes body and Inference-Header-Content-Length (None: do not send one) of a response.

    Args:
        response: what to say.
        binary: for each output, whether its data travels as binary.

    Raises:
        RequestError: a BYTES output holds bytes that are not text and is not binary.
    """
    message: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version is not None:
        message["model_version"] = response.model_version
    if response.id is not None:
        message["id"] = response.id
    if response.parameters:
        message["parameters"] = response.parameters
    parts = [b""]
    entries = []
    for tensor, as_binary in zip(response.outputs, binary, strict=True):
        if as_binary:
            section = pack(tensor)
            parts.append(section)
            entries.append(json_fields(tensor, len(section)))
        else:
            entries.append(json_fields(tensor, None))
    message["outputs"] = entries
    text = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    if len(parts) == 1:
        return text, None
    parts[0] = text
    return b"".join(parts), len(text)


def parse_response(body: bytes, header_length: int | None = None) -> InferResponse:
    """Reads the response in `body`, and checks it.

    Args:
        body: the whole body, decompressed.
        header_length: value of the Inference-Header-Content-Length header; None when absent.

    Raises:
        ProtocolError: anything malformed.
    """
    try:
        message, section = json_part(body, header_length)
        entries = message.get("outputs")
        if type(entries) is not list:
            raise RequestError("'outputs' must be a list")
        check_count(entries, "outputs")
        outputs = [read_tensor(entry, f"output {number}", section) for number, entry in enumerate(entries)]
        if section is not None:
            section.finish()
        texts = {key: message.get(key) for key in ("model_name", "model_version", "id")}
        for key, value in texts.items():
            if value is not None and type(value) is not str:
                raise RequestError(f"{key!r} must be a string, found {shown(value)}")
        # Some servers put objects among the parameters; a client has no use for them, but need not fail either.
        given = message.get("parameters")
        parameters = {k: v for k, v in given.items() if isinstance(v, str | int | float)} if type(given) is dict else {}
    except RequestError as error:
        raise ProtocolError(f"the server's response is malformed: {error}") from error
    return InferResponse(texts["model_name"] or "", outputs, texts["model_version"], texts["id"], parameters)
