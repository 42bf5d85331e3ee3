"""Takes requests from what a front end has read to their outcomes: the same for every protocol.

An ordinary request is checked, submitted and answered in plain callbacks; only what takes long takes a task, and its
work a thread. Whoever asked is known by an object of the front end's own, which has a `client`.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from evenkeel.arrays import Array
from evenkeel.errors import (
    BackendError,
    BackendLostError,
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    PoisonItemError,
    ProtocolError,
    TaskRefusedError,
    TooLargeError,
)
from evenkeel.oip import InferRequest, TensorHead
from evenkeel.serving.front.flight import Flight
from evenkeel.serving.front.items import read_key, read_options
from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.front.shares import Client
from evenkeel.serving.gateway.gateway import Options, Outcome

__all__ = ["Inference", "Wanted", "check_tensor"]

_log = logging.getLogger(__name__)

_ASIDE_THREADS = 2
_LARGE_BYTES = 4 << 20
_MAX_SHOWN = 500  # characters of an error

# The words for clients about a model that could not answer.
_REASONS: dict[type[BackendError], str] = {
    BackendLostError: "its worker was lost",
    ProtocolError: "its worker gave no proper reply",
}

Wanted = tuple[Sequence[str], Sequence[bool]]  # names of outputs, and for each whether as binary


class _Asks(Protocol):
    @property
    def client(self) -> Client:
        """Gives the client that asked."""


AskT = TypeVar("AskT", bound=_Asks)


class _WorkUnderWay(Protocol):
    """Stands for the work on a request: a flight or a task."""

    def cancel(self) -> object:
        """Gives the work up."""


class Inference(Generic[AskT]):
    """Holds the requests of one front end that are not answered.

    Args:
        landed: is given the outcomes of all items of a request, to write the answer.
        failed: is given an error instead: in words for the client, or one that nobody expected.
        parent: gives the header `traceparent` of a request, where items are traced; None where they are not.
    """

    def __init__(
        self,
        landed: Callable[[AskT, ServedModel, Wanted, str | None, Sequence[Outcome]], object],
        failed: Callable[[AskT, Exception], object],
        parent: Callable[[AskT], str] | None = None,
    ) -> None:
        self._parent = parent
        self._on_landed = landed
        self._on_failed = failed
        self._executor = ThreadPoolExecutor(_ASIDE_THREADS, thread_name_prefix="evenkeel-aside")
        # Large bodies take seconds, one behind the other; those of ordinary size need not wait for them.
        self._large_executor = ThreadPoolExecutor(1, thread_name_prefix="evenkeel-large")
        self._open: dict[AskT, _WorkUnderWay | None] = {}

    @property
    def in_flight(self) -> int:
        """Counts the requests that are being answered."""
        return len(self._open)

    def close(self) -> None:
        """Lets go of the threads."""
        for executor in (self._executor, self._large_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    # ---- what is open ----

    def begin(self, ask: AskT) -> None:
        """Notes that an answer is owed."""
        self._open[ask] = None

    def end(self, ask: AskT) -> bool:
        """Notes that the answer is given now; false if it is owed no more."""
        if ask not in self._open:
            return False
        del self._open[ask]
        return True

    def gone(self, ask: AskT) -> None:
        """Gives up a request whose client went away."""
        work = self._open.pop(ask, None)
        if work is not None:
            work.cancel()

    def give_up(self) -> list[AskT]:
        """Stops all work; gives the requests, of which each is still to be answered."""
        for work in self._open.values():
            if work is not None:
                work.cancel()
        return list(self._open)

    def fail(self, ask: AskT, error: Exception) -> None:
        """Hands on an error, in words for the client."""
        if isinstance(error, BackendError):
            # What a model or a server said of itself is for those who run it.
            _log.warning("a request failed: %s", " ".join(str(error).split())[:_MAX_SHOWN])
            error = _for_the_client(error)
        self._on_failed(ask, error)

    # ---- the way of a request ----

    def check(self, ask: AskT, model: ServedModel, request: InferRequest) -> Wanted:
        """Finds the wanted outputs and makes sure that there is room for the items, before anything is converted.

        Raises:
            RequestError: the request does not fit the model.
            OverloadedError: there is no room.
        """
        wanted = model.answers.wanted(request)
        count = model.items.check(request)
        model.shares.admit(ask.client, count)
        if count > 1:
            try:
                model.gateway.check_room(count)
            except OverloadedError:
                model.shares.refused(ask.client, count)
                raise
        return wanted

    def serve(
        self,
        ask: AskT,
        model: ServedModel,
        request: InferRequest,
        wanted: Wanted,
        items: Array | list[bytes],
        limit_s: float | None = None,
    ) -> None:
        """Answers a request later, by `landed` or `failed`.

        Args:
            ask: whose answer is owed.
            model: answers it.
            request: that `check` found right.
            wanted: as `check` said.
            items: of the request, or image files.
            limit_s: seconds that the client waits, where it said so otherwise than in the request.

        Raises:
            EvenkeelError: it cannot be taken; nothing is called then.
        """
        parameters = request.parameters
        options, key = read_options(parameters), read_key(parameters)
        if limit_s is not None and (options.timeout_s is None or limit_s < options.timeout_s):
            options = replace(options, timeout_s=limit_s)
        if self._parent is not None:
            options = replace(options, parent=self._parent(ask))
        if isinstance(items, list):
            self.aside(ask, model, self._decode, items, options, key, wanted, request.id)
        else:
            self._fly(ask, model, items, options, key, wanted, request.id)

    def _fly(
        self,
        ask: AskT,
        model: ServedModel,
        items: Array,
        options: Options,
        key: int | None,
        wanted: Wanted,
        request_id: str | None,
    ) -> None:
        landed = partial(self._landed, ask, model, wanted, request_id)
        flight = Flight(model.gateway, landed, partial(self.fail, ask))
        self._open[ask] = flight
        try:
            flight.start(items, options, key)
        except OverloadedError:
            model.shares.refused(ask.client, len(items))
            raise
        model.shares.took(ask.client, len(items))

    def _landed(
        self, ask: AskT, model: ServedModel, wanted: Wanted, request_id: str | None, outcomes: Sequence[Outcome]
    ) -> None:
        try:
            self._on_landed(ask, model, wanted, request_id, outcomes)
        except Exception as error:
            self.fail(ask, error)

    # ---- what takes long: in tasks, with the work in threads ----

    def aside(
        self, ask: AskT, model: ServedModel | None, steps: Callable[..., Coroutine[Any, Any, None]], *args: Any
    ) -> None:
        """Goes on with a request in a task; the model's gateway, where it is known yet, stays open meanwhile."""

        async def guarded() -> None:
            try:
                await steps(ask, model, *args)
            except Exception as error:
                self.fail(ask, error)

        task = self._open[ask] = asyncio.get_running_loop().create_task(guarded())
        if model is not None:
            model.hold()
            task.add_done_callback(model.release)

    async def run(self, size: int, work: Callable[..., Any], *args: Any) -> Any:
        """Runs `work` in a thread for bodies of that size, and gives its result."""
        executor = self._executor if size < _LARGE_BYTES else self._large_executor
        return await asyncio.get_running_loop().run_in_executor(executor, partial(work, *args))

    async def _decode(
        self,
        ask: AskT,
        model: ServedModel,
        files: list[bytes],
        options: Options,
        key: int | None,
        wanted: Wanted,
        request_id: str | None,
    ) -> None:
        limit_s = model.gateway.deadline_s
        if options.timeout_s is not None:
            limit_s = min(limit_s, options.timeout_s)
        until_s = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(until_s):
                items = await model.decoder.decode_all(files, until_s)
        except TimeoutError:
            raise _late(limit_s) from None
        left_s = until_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise _late(limit_s)
        self._fly(ask, model, items, replace(options, timeout_s=left_s), key, wanted, request_id)


def check_tensor(model: ServedModel, tensor: TensorHead) -> None:
    """Refuses a tensor before its values are read: one of a wrong kind, or of more items than are ever taken.

    Raises:
        RequestError: it is such a tensor.
    """
    count, limit = model.items.check_head(tensor), model.gateway.max_items
    if count > limit:
        raise TooLargeError(f"a request may hold at most {limit} items, found {count}")


def _late(limit_s: float) -> DeadlineError:
    return DeadlineError(f"the timeout of {limit_s:g} s passed while images were decoded")


def _for_the_client(error: BackendError) -> EvenkeelError:
    """Puts an error into words that are ours, and not a model's or a server's."""
    if isinstance(error, PoisonItemError):
        return error
    if isinstance(error, TaskRefusedError):
        return TaskRefusedError(
            "the model refuses this item as it is: look at its shape and values; the server's log has the reason"
        )
    reason = _REASONS.get(type(error), "it failed")
    return BackendError(f"the model could not answer ({reason}); the server's log has the details")
