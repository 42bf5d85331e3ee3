"""Reaches replicas behind any Open Inference Protocol server: Triton, KServe, MLServer, another evenkeel."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply, Reply
from evenkeel.backends.oip.contract import Contract, agree
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    ProtocolError,
    RequestError,
    TaskRefusedError,
)
from evenkeel.models.cards import ModelCard
from evenkeel.models.digest import ModelDigests
from evenkeel.oip import HEADER_LENGTH, read_message, shown
from evenkeel.text_values import without_password

__all__ = ["OipBackend"]

_log = logging.getLogger(__name__)

_MAX_WORD_BYTES = 1 << 20  # of metadata, of readiness
_READ_ASIDE_FROM_BYTES = 256 << 10  # reading this much JSON would hold up everything else
_MAX_ERROR_BYTES = 64 << 10  # of an error that is looked into for its words
_MAX_DIGITS = 18  # of a length
# Below the two to five seconds after which common servers close idle connections: what is sent as they do so is lost.
_IDLE_S = 1.0


class _NeverSentError(BackendLostError):
    """No connection could be made, so that the server cannot have seen the task."""


class _RequestTrace:
    """Notes whether a request went over a connection that had been used before."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept = False


async def _on_kept(session: object, context: Any, parameters: object) -> None:
    if isinstance(context.trace_request_ctx, _RequestTrace):
        context.trace_request_ctx.kept = True


class _RemoteTask:
    """Holds one task on its way."""

    __slots__ = ("given_up", "inputs", "on_reply", "since_s", "task", "ticket")

    def __init__(self, ticket: int, inputs: Array, on_reply: OnReply) -> None:
        self.ticket, self.inputs, self.on_reply = ticket, inputs, on_reply
        self.task: asyncio.Task[Array] | None = None
        self.given_up = False
        self.since_s = time.monotonic()


class OipBackend(Backend):
    """Sends tasks to one model of a remote server over HTTP.

    Args:
        name: unique in a gateway.
        url: of the server, e.g. `http://10.0.0.7:8000`.
        model: what the server calls the model.
        card: what the model expects and gives; checked against the server's own word when it is reached.
        version: of the model; empty for the server's choice.
        versions: shared by all servers of a gateway: replies of another version than theirs are refused.
        connections: requests that are open at the server at once; more tasks wait here.
        timeout_s: for one task, from the moment it is sent.
        poll_s: seconds between two checks of readiness.
        poll_timeout_s: a server that has not said by then that it is ready is not.
        start_timeout_s: how long `start` waits until the server is ready.

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
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"{name}: url must begin with http:// or https://, found {without_password(url)!r}"
            )
        self.name = name
        self.serial = connections == 1
        self._card = card
        self._server_url = url.rstrip("/") + "/v2"
        self._model_url = f"{self._server_url}/models/{quote(model, safe='')}"
        if version:
            self._model_url += f"/versions/{quote(version, safe='')}"
        self._shown_url = without_password(self._model_url)
        self._versions = (
            ModelDigests({card.name: f"version:{version}"} if version else {}) if versions is None else versions
        )
        self._connections = connections
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._poll_timeout_s = poll_timeout_s
        self._start_timeout_s = start_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None  # each of its requests has a connection of its own
        self._poller: asyncio.Task[None] | None = None
        self._contract: Contract | None = None
        self._ready = False
        self._reason = "it was never reached"
        self._poll_now = asyncio.Event()
        self._became_ready = asyncio.Event()
        self._next_ticket = 0
        self._waiting: dict[int, _RemoteTask] = {}
        self._open: dict[int, _RemoteTask] = {}

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
        self._session = self._make_session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S))
        self._fresh = self._make_session(aiohttp.TCPConnector(limit=0, force_close=True))
        self._poller = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._became_ready.wait()
        except TimeoutError:
            raise BackendError(
                f"{self.name}: {self._shown_url} was not ready within {self._start_timeout_s:g} s: {self._reason}"
            ) from None

    def _make_session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_on_kept)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers={"accept-encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a short reply could become a long one
            trace_configs=[trace],
        )

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends one task; its inputs must stay unchanged until the reply."""
        ticket = self._next_ticket
        self._next_ticket += 1
        call = _RemoteTask(ticket, inputs, on_reply)
        if model != self._card.name:
            self._reply_soon(call, BackendError(f"{self.name} runs {self._card.name!r}, not {model!r}"))
        elif self._session is None or self._contract is None:
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
        if call is not None and call.task is not None and self._contract is not None and self._contract.gives_up:
            call.given_up = True
            call.task.cancel()

    def suspect(self) -> None:
        """Asks for readiness now."""
        self._poll_now.set()

    async def close(self) -> None:
        """Closes all connections; open tasks get a BackendLostError."""
        sessions = [session for session in (self._session, self._fresh) if session is not None]
        self._session = self._fresh = None
        self._reason = "it was closed"
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            self._reply_soon(call, BackendLostError(f"{self.name} was closed"))
        tasks = [call.task for call in self._open.values() if call.task is not None]
        if self._poller is not None:
            tasks.append(self._poller)  # type: ignore[arg-type]
            self._poller = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in sessions:
            await session.close()
        self._set_ready(False)

    def _reply_soon(self, call: _RemoteTask, error: BackendError, cancelled: bool = False) -> None:
        asyncio.get_running_loop().call_soon(call.on_reply, Reply(error=error, cancelled=cancelled, began=False))

    def _send_waiting(self) -> None:
        while self._waiting and len(self._open) < self._connections:
            ticket = next(iter(self._waiting))
            call = self._open[ticket] = self._waiting.pop(ticket)
            call.task = asyncio.get_running_loop().create_task(self._ask(call.inputs))
            call.task.add_done_callback(partial(self._finish, call))

    def _finish(self, call: _RemoteTask, task: "asyncio.Task[Array]") -> None:
        # A callback rather than the task itself: a task that is cancelled before its first step never runs.
        del self._open[call.ticket]
        if task.cancelled():
            if call.given_up:
                # How long it had taken is news: the live quantiles must not forget the stragglers that were stopped.
                seconds = time.monotonic() - call.since_s
                reply = Reply(error=BackendError(f"{self.name}: cancelled"), cancelled=True, service_s=seconds)
            else:
                reply = Reply(error=BackendLostError(f"{self.name} was closed"))
        else:
            error = task.exception()
            if error is None:
                reply = Reply(outputs=task.result())
            elif isinstance(error, BackendError):
                reply = Reply(error=error, began=not isinstance(error, _NeverSentError))
            else:
                _log.error("%s: unexpected error", self.name, exc_info=error)
                reply = Reply(error=BackendError(f"{self.name}: {type(error).__name__}: {error}"))
            if isinstance(error, BackendLostError):
                self._reason = str(error)
                self._set_ready(False)
                self._poll_now.set()
        if self._session is not None:
            self._send_waiting()
        call.on_reply(reply)

    async def _ask(self, inputs: Array) -> Array:
        contract = self._contract
        assert contract is not None
        body, header_length = contract.write(inputs)
        url, max_bytes = self._model_url + "/infer", contract.max_reply_bytes(len(inputs))
        headers = {"content-type": "application/json"}
        if header_length is not None:
            headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(header_length)}
        try:
            reply, given = await self._request("POST", url, body, headers, max_bytes)
        except TimeoutError:
            raise BackendError(f"{self.name}: no reply within {self._timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise _NeverSentError(f"{self.name}: cannot connect: {error}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise BackendLostError(f"{self.name}: connection lost: {error or type(error).__name__}") from error
        except aiohttp.ClientError as error:
            raise ProtocolError(f"{self.name}: {without_password(str(error))}") from error
        try:
            if given is not None and not (given.isascii() and given.isdigit() and len(given) < _MAX_DIGITS):
                raise ProtocolError(f"{HEADER_LENGTH} is {shown(given)}")
            read = partial(contract.read, reply, None if given is None else int(given), len(inputs))
            if len(reply) < _READ_ASIDE_FROM_BYTES:
                return read()
            return await asyncio.get_running_loop().run_in_executor(None, read)
        except ProtocolError as error:
            raise ProtocolError(f"{self.name}: {error}") from error

    async def _request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = _MAX_WORD_BYTES,
    ) -> tuple[bytes, str | None]:
        """Sends one request, and gives body and header length of its 200 response."""
        async with await self._begin(method, url, body, headers) as response:
            packed = response.headers.get("content-encoding", "identity")
            if packed.lower() != "identity":
                raise ProtocolError(f"{self.name}: a reply is encoded as {packed[:20]!r}, which was not requested")
            parts = []
            size = 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > max_bytes:
                    raise ProtocolError(f"{self.name}: a reply has more than {max_bytes} bytes")
                parts.append(part)
            reply = b"".join(parts)
            if response.status != 200:
                raise _refusal(response, f"{self.name}: {_explain(response, reply)}")
            return reply, response.headers.get(HEADER_LENGTH)

    async def _begin(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> aiohttp.ClientResponse:
        """Sends one request, and gives its response as soon as its head is there.

        A server may close a connection that it has kept at any moment, and what was sent as it did so is lost. So a
        request that loses a kept connection before any byte of a reply is sent once more, over a fresh one.
        """
        if self._session is None or self._fresh is None:
            raise BackendLostError(f"{self.name} was closed")
        attempt = _RequestTrace()
        try:
            return await self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=attempt
            )
        except aiohttp.ServerDisconnectedError as error:
            if not attempt.kept or not isinstance(error.message, str):  # else it is a part of a head
                raise
        except aiohttp.ClientOSError as error:
            if not attempt.kept or isinstance(error, aiohttp.ClientConnectorError):
                raise
        return await self._fresh.request(method, url, data=body, headers=headers, allow_redirects=False)

    async def _poll(self) -> None:
        while True:
            self._poll_now.clear()
            try:
                async with asyncio.timeout(self._poll_timeout_s):
                    await self._look()
            except BackendError as error:
                self._reason = str(error)
                self._set_ready(False)
            except TimeoutError:
                self._reason = f"{self.name}: no answer within {self._poll_timeout_s:g} s"
                self._set_ready(False)
            except (aiohttp.ClientError, OSError) as error:
                self._reason = f"{self.name}: {without_password(str(error)) or type(error).__name__}"
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
        await self._request("GET", self._model_url + "/ready")
        if not self._ready:
            server = await self._metadata(self._server_url)
            model = await self._metadata(self._model_url)
            self._contract = agree(self._card, server, model, self._check_version)

    def _check_version(self, version: str) -> None:
        try:
            self._versions.check(self._card.name, f"version:{version[:100]}", f"the server of {self.name}")
        except ConfigurationError as error:
            raise ProtocolError(str(error)) from None

    async def _metadata(self, url: str) -> Mapping[str, Any]:
        body, _ = await self._request("GET", url)
        try:
            return read_message(body, False)
        except RequestError as error:
            raise ProtocolError(f"{self.name}: {without_password(url)}: {error}") from None

    def _set_ready(self, ready: bool) -> None:
        if ready and self._session is None:
            return
        if ready:
            self._became_ready.set()
        if ready != self._ready:
            self._ready = ready
            self.on_change()


# By these a server says that the request is wrong, so that any other server would say the same.
_THE_REQUESTS_FAULT = frozenset({400, 413, 415, 422})
_NO_ROOM = frozenset({429, 503})


def _refusal(response: aiohttp.ClientResponse, message: str) -> BackendError:
    if response.status in _THE_REQUESTS_FAULT:
        return TaskRefusedError(message)
    if response.status in _NO_ROOM:
        return BackendBusyError(message, _retry_after_s(response.headers.get("retry-after", "")))
    return BackendError(message)


def _retry_after_s(text: str) -> float | None:
    """Reads the seconds of a `Retry-After` header, a number or a date; None where it is neither."""
    if text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text[:40]).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _explain(response: aiohttp.ClientResponse, body: bytes) -> str:
    text = body[:300].decode("utf-8", "replace")
    with suppress(orjson.JSONDecodeError):
        message = orjson.loads(body) if len(body) <= _MAX_ERROR_BYTES else None
        if isinstance(message, dict):
            said = [message.get(key) for key in ("error", "detail")]
            text = next((word[:300] for word in said if isinstance(word, str) and word), text)
    after = response.headers.get("retry-after")
    later = f" (retry after {after[:20]} s)" if response.status in (429, 503) and after else ""
    return f"the server answered {response.status}: {text or (response.reason or '')[:100]}{later}"
