"""Speaks the Open Inference Protocol (KServe v2): types and REST wire forms, for the gateway and for backends.

Both directions stand here: a server parses requests and writes responses, a client writes requests and parses
responses. Source: the open-inference-protocol specification (inference_rest.md) and Triton's binary tensor data
extension. Nothing here does I/O.
"""

from evenkeel.oip.message import read_message
from evenkeel.oip.repeated import RepeatedRequests
from evenkeel.oip.requests import parse_request, write_request
from evenkeel.oip.responses import parse_response, write_response
from evenkeel.oip.types import (
    HEADER_LENGTH,
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    Tensor,
    TensorHead,
    numpy_dtype,
    oip_datatype,
    shown,
)

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "InferResponse",
    "Parameter",
    "RepeatedRequests",
    "RequestedOutput",
    "Tensor",
    "TensorHead",
    "numpy_dtype",
    "oip_datatype",
    "parse_request",
    "parse_response",
    "read_message",
    "shown",
    "write_request",
    "write_response",
]
