"""Tells a tracer what becomes of each item: where it was sent, what came back, what answered it, what was cancelled.

A gateway that is not traced is a plain `Gateway`, which knows nothing of this: tracing that is off costs nothing.
"""

from typing import Any, Protocol

from evenkeel.arrays import Array
from evenkeel.backends.backend import TRACEPARENT, Reply
from evenkeel.coding.code import Answer, Source
from evenkeel.errors import EvenkeelError
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.item import NO_OPTIONS, Item, OnOutcome, Options
from evenkeel.serving.gateway.node import Attempt
from evenkeel.serving.gateway.replicas import Replica

__all__ = ["ItemTrace", "TracedGateway", "Tracer"]

_TracedValue = str | int | float | bool


class ItemTrace(Protocol):
    """Records what happens to one item.

    Attributes:
        traceparent: as those are told who do its tasks.
    """

    traceparent: str

    def event(self, name: str, **fields: _TracedValue) -> None:
        """Records something that happens now."""

    def end(self, error: BaseException | None = None, **fields: _TracedValue) -> None:
        """Ends it now; nothing is recorded afterwards."""


class Tracer(Protocol):
    """Begins traces."""

    def begin(self, model: str, parent: str) -> ItemTrace:
        """Begins the trace of an item whose caller sent the header `traceparent`, or none."""


class TracedGateway(Gateway):
    """Does what a `Gateway` does, and traces it.

    Args:
        tracer: begins a trace for each item.
        given: what a `Gateway` is given.
    """

    def __init__(self, tracer: Tracer, *given: Any, **named: Any) -> None:
        self._tracer = tracer
        self._traces: dict[int, ItemTrace] = {}  # of items without an answer
        super().__init__(*given, **named)

    def submit(self, array: Array, on_outcome: OnOutcome, options: Options = NO_OPTIONS, key: int | None = None) -> int:
        """Begins the item's trace, which ends with its outcome."""
        number = self._next_number
        trace = self._traces[number] = self._tracer.begin(self._model, options.parent)
        try:
            return super().submit(array, on_outcome, options, key)
        except EvenkeelError as error:
            self._end(number, trace, error)
            raise

    def cancel(self, ticket: int) -> None:
        """Ends the trace with the item."""
        super().cancel(ticket)
        self._end(ticket, outcome="abandoned")

    def _send(self, item: Item, replica: Replica, source: Source, now: float) -> None:
        trace = self._traces.get(item.number)
        if trace is None:  # it has its answer, and a replica is asked for comparison
            super()._send(item, replica, source, now)
            return
        name = "hedge" if source == "hedge" else "attempt"
        trace.event(name, replica=replica.backend.name, number=item.attempts, waiting=replica.outstanding)
        token = TRACEPARENT.set(trace.traceparent)
        try:
            super()._send(item, replica, source, now)
        finally:
            TRACEPARENT.reset(token)

    def _on_replica_reply(self, item: Item, source: Source, attempt: Attempt, reply: Reply) -> None:
        trace = self._traces.get(item.number)
        if trace is not None:
            name = attempt.node.backend.name
            if reply.outputs is None:
                trace.event("lost", replica=name, error=str(reply.error or ""))
            else:
                trace.event("reply", replica=name, **({} if reply.service_s is None else {"pass_s": reply.service_s}))
        super()._on_replica_reply(item, source, attempt, reply)

    def _on_fill(self, item: Item, answer: Answer, code: str) -> None:
        trace = self._traces.get(item.number)
        if trace is not None:
            trace.event("fill", code=code, source=answer.source, confidence=float(answer.confidence))
        super()._on_fill(item, answer, code)

    def _on_unsure(self, item: Item, now: float) -> None:
        trace = self._traces.get(item.number)
        if trace is not None:
            trace.event("unsure", threshold=float(item.min_confidence))
        super()._on_unsure(item, now)

    def _close(self, item: Item) -> None:
        trace = self._traces.get(item.number)
        if trace is not None:
            for attempt in item.open_attempts:
                trace.event("cancel", replica=attempt.node.backend.name)
        super()._close(item)

    def _answer(self, item: Item, answer: Answer, now: float) -> None:
        super()._answer(item, answer, now)
        self._end(item.number, source=answer.source, confidence=float(answer.confidence), attempts=item.attempts)

    def _fail(self, item: Item, error: EvenkeelError) -> None:
        super()._fail(item, error)
        self._end(item.number, None, error, attempts=item.attempts)  # unless an answer was found in its place

    def _end(
        self, number: int, trace: ItemTrace | None = None, error: EvenkeelError | None = None, **fields: _TracedValue
    ) -> None:
        trace = self._traces.pop(number, trace)
        if trace is not None:
            trace.end(error, **fields)
