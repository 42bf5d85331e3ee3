"""Writes the outputs of a response: turns the gateway's outcomes into tensors."""

import struct
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from evenkeel.coding.code import Answer, Source, path_of
from evenkeel.errors import ProtocolError, RequestError
from evenkeel.oip import InferRequest, InferResponse, Tensor, shown, write_response
from evenkeel.serving.gateway.gateway import Outcome

__all__ = ["OUTPUTS", "PROMISED", "AnswerWriter"]

# name -> datatype; `scores` has one column for each class, the others are one value for each item.
OUTPUTS = {"scores": "FP32", "label": "BYTES", "source": "BYTES", "confidence": "FP32", "latency_ms": "FP32"}
# Besides, where a certificate says what is promised.
PROMISED = {"path": "BYTES", "certificate": "BYTES"}

_MAX_HEADS = 1024
_MAX_FP32 = float(np.finfo(np.float32).max)


class AnswerWriter:
    """Turns the outcomes of a request's items into its response.

    Outputs, row i for item i: `scores` FP32 [n, classes]; `label` BYTES [n], the class of the highest score; `source`
    BYTES [n], how the answer is known; `confidence` FP32 [n]; `latency_ms` FP32 [n], from the gateway's acceptance of
    the item to its answer.

    Args:
        name: of the model, as the response says it.
        version: of the model.
        classes: label names, in the order of the scores.
        promised: answers also say their `path`, BYTES [n] (edge, data centre or degraded), and the `certificate`, BYTES
            [n], of the promise that they are part of; empty for none.
    """

    def __init__(self, name: str, version: str, classes: Sequence[str], *, promised: bool = False) -> None:
        self._name = name
        self._version = version
        self._labels = [label.encode() for label in classes]
        self._writers: dict[str, Callable[[Sequence[Outcome]], Tensor]] = {
            "scores": self._scores,
            "label": self._label,
            "source": self._source,
            "confidence": self._confidence,
            "latency_ms": self._latency,
            "path": self._path,
            "certificate": self._certificate,
        }
        self._packed_labels = [_pack_bytes(label) for label in self._labels]
        self._packers: dict[str, Callable[[Answer, Outcome], bytes]] = {
            "scores": lambda answer, outcome: answer.value.astype("<f4", copy=False).tobytes(),
            "label": lambda answer, outcome: self._packed_labels[answer.value.argmax()],
            "source": lambda answer, outcome: _packed_sources[answer.source],
            "confidence": lambda answer, outcome: _pack_float(answer.confidence),
            "latency_ms": lambda answer, outcome: _pack_float(outcome.latency_s * 1e3),
            "path": lambda answer, outcome: _packed_paths[answer.source],
            "certificate": lambda answer, outcome: _pack_bytes(outcome.certificate.encode()),
        }
        self._heads: dict[tuple[tuple[str, ...], tuple[int, ...]], bytes] = {}
        self._all = (*OUTPUTS, *PROMISED) if promised else tuple(OUTPUTS)
        self._all_binary = (True,) * len(self._all)
        self._all_json = (False,) * len(self._all)

    def wanted(self, request: InferRequest) -> tuple[Sequence[str], Sequence[bool]]:
        """Gives the names of the requested outputs, and for each if it is sent as binary.

        Raises:
            RequestError: there is no such output.
        """
        if request.outputs is None:
            return self._all, self._all_binary if request.binary_output else self._all_json
        names = []
        binary = []
        for output in request.outputs:
            if output.name not in self._writers:
                raise RequestError(f"unknown output {shown(output.name)}; this model gives {', '.join(self._all)}")
            names.append(output.name)
            binary.append(request.binary_output if output.binary is None else output.binary)
        return names, binary

    def write(
        self, outcomes: Sequence[Outcome], names: Sequence[str], binary: Sequence[bool], request_id: str | None
    ) -> tuple[bytes, int | None]:
        """Writes the response: its body and Inference-Header-Content-Length; every outcome must hold an answer.

        Args:
            outcomes: of the items, in the order of the request.
            names: of the outputs wanted.
            binary: for each of them, whether as binary.
            request_id: echoed.

        Raises:
            ProtocolError: scores that FP32 cannot hold.
        """
        _check_scores(outcomes)
        if len(outcomes) == 1 and request_id is None and all(binary):
            return self._write_one(outcomes, tuple(names))
        return self.write_any(outcomes, names, binary, request_id)

    def write_any(
        self, outcomes: Sequence[Outcome], names: Sequence[str], binary: Sequence[bool], request_id: str | None
    ) -> tuple[bytes, int | None]:
        """Gives what `write` gives, by the plain way that serves every request."""
        outputs = [self._writers[name](outcomes) for name in names]
        return write_response(InferResponse(self._name, outputs, self._version, request_id), binary)

    def response(self, outcomes: Sequence[Outcome], names: Sequence[str], request_id: str | None) -> InferResponse:
        """Gives the response for a protocol with a wire form of its own; every outcome must hold an answer.

        Raises:
            ProtocolError: scores that FP32 cannot hold.
        """
        _check_scores(outcomes)
        return InferResponse(self._name, [self._writers[name](outcomes) for name in names], self._version, request_id)

    def packed(self, outcome: Outcome, names: Sequence[str]) -> list[bytes]:
        """Gives the binary form of each output of one item.

        Raises:
            ProtocolError: scores that FP32 cannot hold.
        """
        _check_scores((outcome,))
        answer = outcome.answer
        assert answer is not None
        return [self._packers[name](answer, outcome) for name in names]

    def _write_one(self, outcomes: Sequence[Outcome], names: tuple[str, ...]) -> tuple[bytes, int | None]:
        """Writes one item, all binary: the JSON depends on nothing but the outputs' names and sizes, so it is kept."""
        outcome = outcomes[0]
        answer = outcome.answer
        assert answer is not None
        parts = [self._packers[name](answer, outcome) for name in names]
        key = (names, tuple(map(len, parts)))
        head = self._heads.get(key)
        if head is None:
            body, head_bytes = self.write_any(outcomes, names, [True] * len(names), None)
            if len(self._heads) < _MAX_HEADS:
                self._heads[key] = body[:head_bytes]
            return body, head_bytes
        return b"".join([head, *parts]), len(head)

    def _scores(self, outcomes: Sequence[Outcome]) -> Tensor:
        data = np.array([outcome.answer.value for outcome in outcomes if outcome.answer], dtype=np.float32)
        return Tensor("scores", "FP32", data.shape, data)

    def _label(self, outcomes: Sequence[Outcome]) -> Tensor:
        labels = self._labels
        data = [labels[outcome.answer.value.argmax()] for outcome in outcomes if outcome.answer]
        return Tensor("label", "BYTES", (len(data),), data)

    def _source(self, outcomes: Sequence[Outcome]) -> Tensor:
        data = [outcome.answer.source.encode() for outcome in outcomes if outcome.answer]
        return Tensor("source", "BYTES", (len(data),), data)

    def _path(self, outcomes: Sequence[Outcome]) -> Tensor:
        sources = [outcome.answer.source for outcome in outcomes if outcome.answer]
        return Tensor("path", "BYTES", (len(sources),), [path_of(source).encode() for source in sources])

    def _certificate(self, outcomes: Sequence[Outcome]) -> Tensor:
        data = [outcome.certificate.encode() for outcome in outcomes]
        return Tensor("certificate", "BYTES", (len(data),), data)

    def _confidence(self, outcomes: Sequence[Outcome]) -> Tensor:
        return _column("confidence", [outcome.answer.confidence for outcome in outcomes if outcome.answer])

    def _latency(self, outcomes: Sequence[Outcome]) -> Tensor:
        return _column("latency_ms", [outcome.latency_s * 1e3 for outcome in outcomes])


def _check_scores(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        answer = outcome.answer
        if answer is not None and answer.value.dtype != np.float32 and np.abs(answer.value).max() > _MAX_FP32:
            raise ProtocolError(f"a score of {np.abs(answer.value).max():.6g}, which FP32 cannot hold")


def _pack_bytes(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value


_pack_float = struct.Struct("<f").pack
_packed_sources = {source: _pack_bytes(source.encode()) for source in get_args(Source)}
_packed_paths = {source: _pack_bytes(path_of(source).encode()) for source in get_args(Source)}


def _column(name: str, values: list[float]) -> Tensor:
    return Tensor(name, "FP32", (len(values),), np.array(values, dtype=np.float32))
