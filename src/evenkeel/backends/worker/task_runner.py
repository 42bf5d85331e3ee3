"""Runs the worker's tasks first in first out, those of one model together where it gains by it. No sockets.

Tasks never wait for others to come: a pass takes those that wait at its beginning. So one alone takes as long as ever.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.worker.model import Model
from evenkeel.clock import Clock
from evenkeel.delays.laws import Delay
from evenkeel.errors import BackendError

__all__ = ["MAX_QUEUED_BYTES", "TaskOwner", "TaskRunner"]

MAX_QUEUED_BYTES = 1 << 30
_LOG_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class TaskOwner(Protocol):
    """Takes the reply to a task it sent; gets exactly one of the four calls for each task."""

    def done(self, ticket: int, outputs: Array, service_s: float) -> None:
        """Takes the outputs of a task that ran."""

    def failed(self, ticket: int, message: str) -> None:
        """Learns that the task could not be done."""

    def refused(self, ticket: int, message: str) -> None:
        """Learns that the task was not taken, for want of room; another worker may take it."""

    def cancelled(self, ticket: int) -> None:
        """Learns that the task was given up before it began."""


@dataclass(slots=True, eq=False)
class _WaitingTask:
    """Holds one task that has not begun, and its owner."""

    owner: TaskOwner
    ticket: int
    key: int
    model: Model
    inputs: Array


class TaskRunner:
    """Runs tasks inline on the clock's thread, and goes back to the clock between two passes.

    Inline, because a hand-over to a thread costs more than a small model's pass; back to the loop, so that cancels of
    waiting tasks and pings are read in between. With an injected delay the runner is busy, but not blocking, until
    the longer of the model's own time and the drawn time has passed since it began.

    Args:
        max_queued: a task beyond that many waiting ones is refused.
        max_queued_bytes: a task whose inputs would make the waiting ones hold more than that is refused.
        worker: this worker's number, given to the delay.
        delay_epoch_s: when the experiment began on the clock; draws depend on the time since then.
        delay_cost: multiplies every draw; None: each model's own `relative_cost` does.
    """

    def __init__(
        self,
        models: Sequence[Model],
        clock: Clock,
        *,
        max_queued: int = 1024,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        delay: Delay | None = None,
        delay_cost: float | None = None,
        worker: int = 0,
        delay_epoch_s: float | None = None,
    ) -> None:
        self._models, self._clock, self._max_queued = list(models), clock, max_queued
        self._max_queued_bytes, self._queued_bytes = max_queued_bytes, 0
        self._delay, self._delay_cost, self._worker = delay, delay_cost, worker
        self._delay_epoch_s = clock.time() if delay_epoch_s is None else delay_epoch_s
        # An OrderedDict, not a dict: taking the first of a dict again and again costs more each time.
        self._waiting: OrderedDict[tuple[int, int], _WaitingTask] = OrderedDict()
        self._busy = False
        self._next_log_at = float("-inf")
        self._stopping = False
        self._on_empty: Callable[[], object] = lambda: None

    @property
    def empty(self) -> bool:
        """True when nothing runs and nothing waits."""
        return not self._busy and not self._waiting

    def submit(self, owner: TaskOwner, ticket: int, key: int, model: int, inputs: Array) -> None:
        """Queues one task; never replies with its result from inside this call."""
        if self._stopping:
            owner.refused(ticket, "the worker is shutting down; send the task elsewhere")
        elif model >= len(self._models):
            owner.failed(ticket, f"no model number {model}; the worker holds {len(self._models)}")
        elif complaint := _complaint(self._models[model], inputs):
            owner.failed(ticket, complaint)
        elif len(self._waiting) >= self._max_queued:
            owner.refused(ticket, f"queue full: {self._max_queued} tasks wait; send the task elsewhere")
        elif self._waiting and self._queued_bytes + inputs.nbytes > self._max_queued_bytes:
            owner.refused(ticket, f"queue full: waiting tasks hold {self._queued_bytes} bytes; send the task elsewhere")
        else:
            self._queued_bytes += inputs.nbytes
            self._waiting[id(owner), ticket] = _WaitingTask(owner, ticket, key, self._models[model], inputs)
            if not self._busy:
                self._busy = True
                self._clock.call_soon(self._run_next)

    def cancel(self, owner: TaskOwner, ticket: int) -> None:
        """Gives a waiting task up; one that began goes on."""
        task = self._waiting.pop((id(owner), ticket), None)
        if task is not None:
            self._queued_bytes -= task.inputs.nbytes
            owner.cancelled(ticket)

    def forget(self, owner: TaskOwner) -> None:
        """Drops what waits for an owner that went away."""
        for place in [place for place, task in self._waiting.items() if task.owner is owner]:
            self._queued_bytes -= self._waiting.pop(place).inputs.nbytes

    def stop(self, on_empty: Callable[[], object]) -> None:
        """Takes nothing new; calls `on_empty` once the last task is done."""
        self._stopping = True
        self._on_empty = on_empty
        if self.empty:
            on_empty()

    def _run_next(self) -> None:
        if not self._waiting:  # cancelled or forgotten meanwhile
            self._rest()
            return
        tasks = self._take()
        if len(tasks) > 1:
            self._run_together(tasks)
            return
        task = tasks[0]
        began_s = self._clock.time()
        outputs, error = self._run(task.model, task.inputs)
        if self._delay is not None:
            drawn_s = self._delay.draw(task.key, self._worker, began_s - self._delay_epoch_s)
            cost = task.model.relative_cost if self._delay_cost is None else self._delay_cost
            due_s = began_s + drawn_s * cost
            if due_s > self._clock.time():
                self._clock.call_at(due_s, self._reply, task, began_s, outputs, error)
                return
        self._reply(task, began_s, outputs, error)

    def _take(self) -> list[_WaitingTask]:
        """Takes the first task that waits, and as many behind it as may share its pass."""
        _, first = self._waiting.popitem(last=False)
        tasks, rows = [first], len(first.inputs)
        most = 1 if self._delay is not None else first.model.batch
        while self._waiting and rows < most:
            place, task = next(iter(self._waiting.items()))
            rows += len(task.inputs)
            if task.model is not first.model or rows > most or not _alike(task.inputs, first.inputs):
                break
            del self._waiting[place]
            tasks.append(task)
        self._queued_bytes -= sum(task.inputs.nbytes for task in tasks)
        return tasks

    def _run_together(self, tasks: Sequence[_WaitingTask]) -> None:
        """Runs several tasks in one pass; each has its own reply, and its own pass where that of all fails."""
        began_s = self._clock.time()
        model = tasks[0].model
        outputs, error = self._run(model, np.concatenate([task.inputs for task in tasks]))
        ended_s = self._clock.time()
        end = 0
        for task in tasks:
            start, end = end, end + len(task.inputs)
            if outputs is not None:
                self._tell(task, ended_s - began_s, outputs[start:end], "")
            else:  # one of them may be the reason
                began_s = self._clock.time()
                alone, error = self._run(model, task.inputs)
                self._tell(task, self._clock.time() - began_s, alone, error)
        self._go_on()

    def _run(self, model: Model, inputs: Array) -> tuple[Array | None, str]:
        """Runs one pass; gives its outputs, or says what is wrong."""
        try:
            outputs = model.run(inputs)
            error = _complaint_of_outputs(model, inputs, outputs)
        except Exception as exception:
            error = f"model {model.name!r} raised {type(exception).__name__}: {exception}"
            self._log_failure(error)
        return (None, error) if error else (outputs, "")

    def _log_failure(self, error: str) -> None:
        """Logs where the model failed, but not each time for one that always fails."""
        now = self._clock.time()
        if now >= self._next_log_at:
            self._next_log_at = now + _LOG_EVERY_S
            _log.exception(error)

    def _reply(self, task: _WaitingTask, began_s: float, outputs: Array | None, error: str) -> None:
        self._tell(task, max(0.0, self._clock.time() - began_s), outputs, error)
        self._go_on()

    def _tell(self, task: _WaitingTask, service_s: float, outputs: Array | None, error: str) -> None:
        if error or outputs is None:
            task.owner.failed(task.ticket, error)
            return
        try:
            task.owner.done(task.ticket, outputs, service_s)
        except BackendError as refusal:
            task.owner.failed(task.ticket, f"model {task.model.name!r}: {refusal}")

    def _go_on(self) -> None:
        if self._waiting:
            self._clock.call_soon(self._run_next)
        else:
            self._rest()

    def _rest(self) -> None:
        self._busy = False
        if self._stopping:
            self._on_empty()


def _alike(one: Array, other: Array) -> bool:
    return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype


def _complaint(model: Model, inputs: Array) -> str:
    if model.input_shape is not None and inputs.shape[1:] != model.input_shape:
        return f"model {model.name!r} takes rows of shape {model.input_shape}, got {inputs.shape[1:]}"
    if model.dtype is not None and inputs.dtype.name != model.dtype:
        return f"model {model.name!r} takes {model.dtype}, got {inputs.dtype.name}"
    return ""


def _complaint_of_outputs(model: Model, inputs: Array, outputs: object) -> str:
    shape = getattr(outputs, "shape", None)
    if not isinstance(shape, tuple) or getattr(outputs, "dtype", None) is None:
        return f"model {model.name!r} gave a {type(outputs).__name__} instead of an array"
    if not shape or shape[0] != inputs.shape[0]:
        return f"model {model.name!r} gave shape {shape} for {inputs.shape[0]} rows"
    if model.output_shape is not None and shape[1:] != model.output_shape:
        return f"model {model.name!r} gave rows of shape {shape[1:]} instead of {model.output_shape}"
    return ""
