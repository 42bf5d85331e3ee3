"""Does jobs in one thread, in the order they were given."""

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from evenkeel.errors import ReducerError

__all__ = ["OrderedThread"]

_CUDA: Any = torch.cuda
_END_S = 5.0
Jobs = queue.SimpleQueue[Callable[[], None] | None]
_RUNNING: "weakref.WeakKeyDictionary[threading.Thread, Jobs]" = weakref.WeakKeyDictionary()


class OrderedThread:
    """Runs jobs one after the other, so that all ranks that submit alike exchange alike.

    Gloo runs the callbacks of its futures in several threads, whose order differs between ranks; a job of several
    exchanges therefore runs here, from its first to its last. After a job has failed no further one is begun: the
    ranks' exchanges no longer match, and a later one would be paired with a wrong one.

    A process that was forked from the one that made this gets a thread of its own with its first job.

    Args:
        name: of the thread.
        on_failure: called once, in the thread, after the first job that failed.
        at_end: called once when the thread has ended: with `close`, with this object, or with the interpreter.
    """

    def __init__(self, name: str, on_failure: Callable[[], None], at_end: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._failure: BaseException | None = None
        self._on_failure = on_failure
        self._at_end = at_end
        self._streams: dict[torch.device, Any] = {}
        self._start()

    def submit(self, job: Callable[[], Tensor], device: torch.device) -> "Future[Tensor]":
        """Gives what `job` will give; its error, if it raises one.

        Args:
            job: runs in the thread. On a GPU it runs on a stream of its own, behind what the caller's stream does now.
            device: where the tensors are.

        Raises:
            ReducerError: the thread was closed.
        """
        if not self._end.alive:
            raise ReducerError("gradients are not exchanged any more: the state was closed")
        if self._process != os.getpid():  # a fork takes no threads along
            self._end.detach()
            self._start()
        if device.type == "cuda":
            future: Future[Tensor] = Future(devices=[device])
            ready = _CUDA.Event()
            ready.record(_CUDA.current_stream(device))
            self._jobs.put(lambda: self._on_stream(job, future, device, ready))
        else:
            future = Future()
            self._jobs.put(lambda: self._do(job, future))
        return future

    def close(self) -> None:
        """Ends the thread once the jobs so far are done; waits for them a few seconds."""
        self._end()

    def _start(self) -> None:
        self._process = os.getpid()
        self._jobs: Jobs = queue.SimpleQueue()
        thread = threading.Thread(target=_run, args=(self._jobs,), name=self._name, daemon=True)
        thread.start()
        _RUNNING[thread] = self._jobs
        # Also at the interpreter's end: a thread that is still within torch then would take the process down.
        self._end = weakref.finalize(self, _end, self._jobs, thread, self._at_end)

    def _on_stream(self, job: Callable[[], Tensor], future: "Future[Tensor]", device: torch.device, ready: Any) -> None:
        if device not in self._streams:
            self._streams[device] = _CUDA.Stream(device)
        stream = self._streams[device]
        with _CUDA.stream(stream):
            stream.wait_event(ready)
            self._do(job, future)

    def _do(self, job: Callable[[], Tensor], future: "Future[Tensor]") -> None:
        if self._failure is not None:
            error = ReducerError(f"gradients are not exchanged any more since an earlier failure: {self._failure}")
            error.__cause__ = self._failure
            _fail(future, error)
            return
        try:
            result = job()
        except BaseException as error:
            self._failure = error
            _fail(future, error)
            self._on_failure()
        else:
            future.set_result(result)


def _fail(future: "Future[Tensor]", error: Any) -> None:
    future.set_exception(error)


def _end(jobs: Jobs, thread: threading.Thread, at_end: Callable[[], None]) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(_END_S)
    at_end()


@atexit.register
def _end_all() -> None:
    """Waits for every thread at the interpreter's end.

    Those too whose object is gone: a job may have held the last reference to it, so that the end came in the thread
    itself, which nobody waited for.
    """
    for thread, jobs in list(_RUNNING.items()):
        jobs.put(None)
        thread.join(_END_S)


def _run(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # its tensors need not live until the next one comes
