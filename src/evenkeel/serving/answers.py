"""The outputs of a response: what the gateway's outcomes look like as tensors."""

from collections.abc import Callable, Sequence

import numpy as np

from evenkeel.errors import RequestError
from evenkeel.oip import InferRequest, Tensor
from evenkeel.serving.gateway import Outcome

__all__ = ["OUTPUTS", "AnswerWriter"]

# name -> datatype; `scores` has one column for each class, the others are one value for each item.
OUTPUTS = {"scores": "FP32", "label": "BYTES", "source": "BYTES", "confidence": "FP32", "latency_ms": "FP32"}


class AnswerWriter:
    """Turns the outcomes of a request's items into the outputs that it asked for.

    Outputs, row i for item i: `scores` FP32 [n, classes]; `label` BYTES [n], the class of the highest score; `source`
    BYTES [n], how the answer is known; `confidence` FP32 [n]; `latency_ms` FP32 [n], from the gateway's acceptance of
    the item to its answer.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._labels = [label.encode() for label in classes]
        self._writers: dict[str, Callable[[Sequence[Outcome]], Tensor]] = {
            "scores": self._scores,
            "label": self._label,
            "source": self._source,
            "confidence": self._confidence,
            "latency_ms": self._latency,
        }
        self._all = tuple(OUTPUTS)
        self._all_binary = (True,) * len(OUTPUTS)
        self._all_json = (False,) * len(OUTPUTS)

    def wanted(self, request: InferRequest) -> tuple[Sequence[str], Sequence[bool]]:
        """Names of the outputs wanted, and for each whether as binary.

        Raises:
            RequestError: there is no such output.
        """
        if request.outputs is None:
            return self._all, self._all_binary if request.binary_output else self._all_json
        names = []
        binary = []
        for output in request.outputs:
            if output.name not in self._writers:
                raise RequestError(f"unknown output {output.name!r}; this model gives {', '.join(self._all)}")
            names.append(output.name)
            binary.append(request.binary_output if output.binary is None else output.binary)
        return names, binary

    def write(self, outcomes: Sequence[Outcome], names: Sequence[str]) -> list[Tensor]:
        """The outputs `names`; every outcome must hold an answer."""
        return [self._writers[name](outcomes) for name in names]

    def _scores(self, outcomes: Sequence[Outcome]) -> Tensor:
        data = np.array([outcome.answer.scores for outcome in outcomes if outcome.answer], dtype=np.float32)
        return Tensor("scores", "FP32", data.shape, data)

    def _label(self, outcomes: Sequence[Outcome]) -> Tensor:
        labels = self._labels
        data = [labels[outcome.answer.scores.argmax()] for outcome in outcomes if outcome.answer]
        return Tensor("label", "BYTES", (len(data),), data)

    def _source(self, outcomes: Sequence[Outcome]) -> Tensor:
        data = [outcome.answer.source.encode() for outcome in outcomes if outcome.answer]
        return Tensor("source", "BYTES", (len(data),), data)

    def _confidence(self, outcomes: Sequence[Outcome]) -> Tensor:
        return _column("confidence", [outcome.answer.confidence for outcome in outcomes if outcome.answer])

    def _latency(self, outcomes: Sequence[Outcome]) -> Tensor:
        return _column("latency_ms", [outcome.latency_s * 1e3 for outcome in outcomes])


def _column(name: str, values: list[float]) -> Tensor:
    return Tensor(name, "FP32", (len(values),), np.array(values, dtype=np.float32))
