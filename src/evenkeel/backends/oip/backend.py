"""Reaches replicas behind any Open Inference Protocol server: Triton, KServe, MLServer, another evenkeel."""

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial

from evenkeel.arrays import Array
from evenkeel.backends.backend import TRACEPARENT, Backend, OnReply, Reply
from evenkeel.backends.oip.contract import Contract, agree
from evenkeel.backends.oip.grpc_wire import GrpcWire
from evenkeel.backends.oip.wire import HttpWire, OipWire, WireAnswer, WireExchange
from evenkeel.errors import BackendBusyError, BackendError, BackendLostError, ConfigurationError, ProtocolError
from evenkeel.http_client.client import NotConnectedError
from evenkeel.models.cards import ModelCard
from evenkeel.models.digest import ModelDigests
from evenkeel.text_values import without_password
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls

__all__ = ["OipBackend"]

_log = logging.getLogger(__name__)

_READ_ASIDE_FROM_BYTES = 256 << 10  # reading this much JSON would hold up everything else
_MAX_DIGEST = 100  # characters


class _RemoteTask:
    """Holds one task on its way."""

    __slots__ = ("exchange", "inputs", "on_reply", "sent_s", "since_s", "ticket", "traceparent")

    def __init__(self, ticket: int, inputs: Array, on_reply: OnReply) -> None:
        self.ticket, self.inputs, self.on_reply = ticket, inputs, on_reply
        self.exchange: WireExchange | None = None  # until there is a reply, which may take a while to read
        self.since_s = self.sent_s = time.monotonic()
        self.traceparent = TRACEPARENT.get()


class OipBackend(Backend):
    """Sends tasks to one model of a remote server over HTTP or gRPC.

    Args:
        name: unique in a gateway.
        url: of the server, e.g. `http://10.0.0.7:8000` or `grpc://10.0.0.7:8001`.
        model: what the server calls the model.
        card: what the model expects and gives; checked against the server's own word when it is reached.
        version: of the model; empty for the server's choice.
        versions: shared by all servers of a gateway: replies of another version than theirs are refused.
        connections: requests that are open at the server at once; more tasks wait here.
        timeout_s: for one task, from the moment it is sent.
        poll_s: seconds between two checks of readiness.
        poll_timeout_s: a server that has not said by then that it is ready is not.
        start_timeout_s: how long `start` waits until the server is ready.
        credentials: sent with each request.
        tls: files for `https://` and `grpcs://`; None: the system's authorities.

    After `cancel` a task that was sent runs on, and its slot stays taken, unless the server says that it gives up
    requests whose connection is closed (evenkeel does).
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        card: ModelCard,
        *,
        version: str = "",
        versions: ModelDigests | None = None,
        connections: int = 8,
        timeout_s: float = 30.0,
        poll_s: float = 1.0,
        poll_timeout_s: float = 2.0,
        start_timeout_s: float = 30.0,
        credentials: Credentials | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        make: type[HttpWire | GrpcWire] = GrpcWire if url.startswith("grpc") else HttpWire
        try:
            self._wire: OipWire | None = make(
                url, model, version, timeout_s=timeout_s, credentials=credentials, tls=tls
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from None
        self.name = name
        self.address = without_password(url.rstrip("/"))
        self.serial = connections == 1
        self._card = card
        self._shown_url = self._wire.shown
        self._versions = (
            ModelDigests({card.name: f"version:{version}"} if version else {}) if versions is None else versions
        )
        self._connections = connections
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._poll_timeout_s = poll_timeout_s
        self._start_timeout_s = start_timeout_s
        self._poller: asyncio.Task[None] | None = None
        self._contract: Contract | None = None
        self._ready = False
        self._reason = "it was never reached"
        self._poll_now = asyncio.Event()
        self._became_ready = asyncio.Event()
        self._next_ticket = 0
        self._waiting: dict[int, _RemoteTask] = {}
        self._open: dict[int, _RemoteTask] = {}  # in the order in which they were sent
        self._timer: asyncio.TimerHandle | None = None  # one for all: nearly all tasks end before it

    @property
    def ready(self) -> bool:
        """True if the last readiness check succeeded, and no connection to the server was lost since."""
        return self._ready

    @property
    def why_not(self) -> str:
        """Says why the server is not ready."""
        return "" if self._ready else self._reason

    async def start(self) -> None:
        """Connects to the server and waits until its model is ready.

        Raises:
            BackendError: it was not within `start_timeout_s`; the backend goes on trying until it is closed.
        """
        self._poller = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._became_ready.wait()
        except TimeoutError:
            raise BackendError(
                f"{self.name}: {self._shown_url} was not ready within {self._start_timeout_s:g} s: {self._reason}"
            ) from None

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends one task; its inputs must stay unchanged until the reply."""
        ticket = self._next_ticket
        self._next_ticket += 1
        call = _RemoteTask(ticket, inputs, on_reply)
        if model != self._card.name:
            self._reply_soon(call, BackendError(f"{self.name} runs {self._card.name!r}, not {model!r}"))
        elif self._wire is None or self._contract is None:
            self._reply_soon(call, BackendLostError(f"{self.name}: not connected: {self._reason}"))
        else:
            self._waiting[ticket] = call
            self._send_waiting()
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives the task up; see the class for what that means once it was sent."""
        call = self._waiting.pop(ticket, None)
        if call is not None:
            self._reply_soon(call, BackendError(f"{self.name}: cancelled"), cancelled=True)
            return
        call = self._open.get(ticket)
        if call is not None and self._contract is not None and self._contract.gives_up:
            # How long it had taken is news: the live quantiles must not forget the stragglers that were stopped.
            seconds = time.monotonic() - call.since_s
            error = BackendError(f"{self.name}: cancelled")
            self._give_up(call)
            asyncio.get_running_loop().call_soon(
                self._finish, call, Reply(error=error, cancelled=True, service_s=seconds)
            )

    def suspect(self) -> None:
        """Asks for readiness now."""
        self._poll_now.set()

    async def close(self) -> None:
        """Closes all connections; open tasks get a BackendLostError."""
        wire, self._wire = self._wire, None
        self._reason = "it was closed"
        if self._timer is not None:
            self._timer.cancel()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
            self._poller = None
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            self._reply_soon(call, BackendLostError(f"{self.name} was closed"))
        for call in list(self._open.values()):
            self._give_up(call)
            self._finish(call, Reply(error=BackendLostError(f"{self.name} was closed")))
        if wire is not None:
            await wire.close()
        self._set_ready(False)

    def _reply_soon(self, call: _RemoteTask, error: BackendError, cancelled: bool = False) -> None:
        asyncio.get_running_loop().call_soon(call.on_reply, Reply(error=error, cancelled=cancelled, began=False))

    def _send_waiting(self) -> None:
        while self._waiting and len(self._open) < self._connections:
            call = self._waiting.pop(next(iter(self._waiting)))
            self._open[call.ticket] = call
            try:
                self._send(call)
            except Exception as error:
                _log.exception("%s: unexpected error while sending a task", self.name)
                problem = BackendError(f"{self.name}: {type(error).__name__}: {error}")
                asyncio.get_running_loop().call_soon(self._finish, call, Reply(error=problem, began=False))

    def _send(self, call: _RemoteTask) -> None:
        contract, wire = self._contract, self._wire
        assert contract is not None
        assert wire is not None
        call.sent_s = time.monotonic()
        call.exchange = wire.send(contract, call.inputs, call.traceparent, partial(self._on_answer, call))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._stop_late)

    def _stop_late(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for call in list(self._open.values()):
            if call.exchange is None:
                continue  # its reply is here, and is being read
            left_s = call.sent_s + self._timeout_s - now_s
            if left_s > 0:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._stop_late)
                break
            self._give_up(call)
            self._fail(call, BackendError(f"{self.name}: no reply within {self._timeout_s:g} s"))

    def _give_up(self, call: _RemoteTask) -> None:
        if call.exchange is not None:
            call.exchange.abort()
            call.exchange = None

    def _on_answer(self, call: _RemoteTask, answer: WireAnswer | BackendError) -> None:
        call.exchange = None
        if isinstance(answer, BackendError):
            self._fail(call, self._named(answer))
            return
        size, read = answer
        if size >= _READ_ASIDE_FROM_BYTES:
            reading = asyncio.get_running_loop().run_in_executor(None, read)
            reading.add_done_callback(partial(self._on_read, call))
            return
        try:
            outputs = read()
        except Exception as error:
            self._fail(call, self._named(error) if isinstance(error, BackendError) else error)
        else:
            self._finish(call, Reply(outputs=outputs))

    def _on_read(self, call: _RemoteTask, reading: "asyncio.Future[Array]") -> None:
        error = None if reading.cancelled() else reading.exception()
        if isinstance(error, Exception):
            self._fail(call, self._named(error) if isinstance(error, BackendError) else error)
        elif not reading.cancelled():
            self._finish(call, Reply(outputs=reading.result()))

    def _named(self, error: BackendError) -> BackendError:
        text = f"{self.name}: {error}"
        return BackendBusyError(text, error.retry_after_s) if isinstance(error, BackendBusyError) else type(error)(text)

    def _fail(self, call: _RemoteTask, error: Exception) -> None:
        if isinstance(error, BackendLostError) and call.ticket in self._open:
            self._reason = str(error)
            self._set_ready(False)
            self._poll_now.set()
        if not isinstance(error, BackendError):
            _log.error("%s: unexpected error", self.name, exc_info=error)
            error = BackendError(f"{self.name}: {type(error).__name__}: {error}")
        self._finish(call, Reply(error=error, began=not isinstance(error, NotConnectedError)))

    def _finish(self, call: _RemoteTask, reply: Reply) -> None:
        if self._open.pop(call.ticket, None) is None:
            return  # it was given up, or the backend was closed, meanwhile
        if self._wire is not None:
            self._send_waiting()
        call.on_reply(reply)

    async def _poll(self) -> None:
        while True:
            self._poll_now.clear()
            try:
                async with asyncio.timeout(self._poll_timeout_s):
                    await self._look()
            except BackendError as error:
                self._reason = str(self._named(error))
                self._set_ready(False)
            except TimeoutError:
                self._reason = f"{self.name}: no answer within {self._poll_timeout_s:g} s"
                self._set_ready(False)
            except Exception as error:
                # Whatever it is, the server may be well again the next time.
                _log.exception("%s: unexpected error while asking for readiness", self.name)
                self._reason = f"{self.name}: {type(error).__name__}"
                self._set_ready(False)
            else:
                self._set_ready(True)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._poll_now.wait()
                    # A check out of turn, because something went wrong; a server that is down is not hammered.
                    await asyncio.sleep(min(0.1, self._poll_s))

    async def _look(self) -> None:
        """Checks readiness; reads the metadata if the server was not ready before, as it may be another one now."""
        if self._wire is None:
            raise BackendLostError("it was closed")
        await self._wire.check_ready()
        if not self._ready:
            server, model = await self._wire.metadata()
            self._contract = agree(self._card, server, model, self._check_version)
            digest = model.get("digest")  # another evenkeel says it
            if isinstance(digest, str) and digest.startswith("onnx:"):
                self._check_digest(digest[:_MAX_DIGEST])

    def _check_version(self, version: str) -> None:
        self._check_digest(f"version:{version[:100]}")

    def _check_digest(self, digest: str) -> None:
        try:
            self._versions.check(self._card.name, digest, f"the server of {self.name}")
        except ConfigurationError as error:
            raise ProtocolError(str(error)) from None

    def _set_ready(self, ready: bool) -> None:
        if ready and self._wire is None:
            return
        if ready:
            self._became_ready.set()
        if ready != self._ready:
            self._ready = ready
            self.on_change()
