"""Defines how a backend speaks to a server of the protocol, and how it does so over HTTP."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from evenkeel.arrays import Array
from evenkeel.backends.oip.contract import Contract
from evenkeel.errors import BackendBusyError, BackendError, ProtocolError, RequestError, TaskRefusedError
from evenkeel.http_client.client import HttpClient
from evenkeel.http_client.reply import HttpReply
from evenkeel.oip import HEADER_LENGTH, read_message, shown
from evenkeel.text_values import without_password
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls

__all__ = ["MAX_WORD_BYTES", "HttpWire", "OipWire", "OnWire", "WireAnswer", "WireExchange"]

MAX_WORD_BYTES = 1 << 20  # of metadata, of readiness
_MAX_ERROR_BYTES = 64 << 10  # of an error that is looked into for its words
_MAX_DIGITS = 18  # of a length
_HEADERS = (HEADER_LENGTH.lower().encode(), b"content-encoding", b"retry-after")
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\n%b: %%d\r\n" % HEADER_LENGTH.lower().encode()

# The size of an answer, and what reads it to outputs, or raises a ProtocolError.
WireAnswer = tuple[int, Callable[[], Array]]
OnWire = Callable[[WireAnswer | BackendError], object]


class WireExchange(Protocol):
    """Holds one task on its way."""

    def abort(self) -> None:
        """Gives the task up; nothing is called any more."""


class OipWire(ABC):
    """Speaks to one model of one server.

    Attributes:
        shown: the model's URL, for messages.
    """

    shown: str

    @abstractmethod
    async def check_ready(self) -> None:
        """Returns when the server has said that the model is ready; raises BackendError otherwise."""

    @abstractmethod
    async def metadata(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Gives the metadata of the server and of the model, as JSON has them; raises BackendError."""

    @abstractmethod
    def send(self, contract: Contract, inputs: Array, traceparent: str, on_done: OnWire) -> WireExchange:
        """Sends one task; `on_done` is called once, later, unless the exchange is aborted.

        Args:
            contract: writes the request, and reads the answer.
            inputs: of the task.
            traceparent: the header that says which trace it is part of; empty for none.
            on_done: called with the answer or an error.
        """

    @abstractmethod
    async def close(self) -> None:
        """Closes all connections."""


class HttpWire(OipWire):
    """Speaks the protocol's REST form.

    Args:
        url: of the server: http:// or https://.
        model: what the server calls the model.
        version: of the model; empty for the server's choice.
        timeout_s: not said to the server.
        credentials: sent with each request.
        tls: files for `https://`; None: the system's authorities.

    Raises:
        ConfigurationError: as `HttpClient`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        version: str,
        *,
        timeout_s: float,
        credentials: Credentials | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._client = HttpClient(url, _HEADERS, credentials=credentials, tls=tls)
        self._path = f"/v2/models/{quote(model, safe='')}"
        if version:
            self._path += f"/versions/{quote(version, safe='')}"
        self.shown = without_password(url.rstrip("/") + self._path)
        self._infer = self._client.start_of("POST", f"{self._path}/infer")

    async def check_ready(self) -> None:
        """Asks whether the model is ready."""
        await self._get(f"{self._path}/ready")

    async def metadata(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Asks for the metadata of the server and of the model."""
        return await self._read("/v2"), await self._read(self._path)

    def send(self, contract: Contract, inputs: Array, traceparent: str, on_done: OnWire) -> WireExchange:
        """Sends one task."""
        body, header_length = contract.write(inputs)
        head = self._infer + (_JSON if header_length is None else _BINARY % header_length)
        if traceparent:
            head += b"traceparent: %b\r\n" % traceparent.encode()
        limit = contract.max_reply_bytes(len(inputs))
        return self._client.send(head, body, limit, partial(_on_reply, contract, len(inputs), on_done))

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def _get(self, path: str) -> bytes:
        return _checked(await self._client.request("GET", path, max_bytes=MAX_WORD_BYTES)).body

    async def _read(self, path: str) -> Mapping[str, Any]:
        try:
            return read_message(await self._get(path), False)
        except RequestError as error:
            raise ProtocolError(f"{path}: {error}") from None


def _on_reply(contract: Contract, rows: int, on_done: OnWire, reply: HttpReply | BackendError) -> None:
    try:
        if isinstance(reply, BackendError):
            raise reply
        given = _checked(reply).header(_HEADERS[0])
        if given is not None and not (given.isascii() and given.isdigit() and len(given) < _MAX_DIGITS):
            raise ProtocolError(f"{HEADER_LENGTH} is {shown(given)}")
    except BackendError as error:
        on_done(error)
        return
    body = reply.body
    on_done((len(body), partial(contract.read, body, None if given is None else int(given), rows)))


def _checked(response: HttpReply) -> HttpReply:
    """Gives a 200 response back.

    Raises:
        BackendError: it is another one, or encoded.
    """
    packed = response.header(b"content-encoding") or "identity"
    if packed.lower() != "identity":
        raise ProtocolError(f"a reply is encoded as {packed[:20]!r}, which was not requested")
    if response.status != 200:
        raise _refusal(response, _explain(response))
    return response


# By these a server says that the request is wrong, so that any other server would say the same.
_THE_REQUESTS_FAULT = frozenset({400, 413, 415, 422})
_NO_ROOM = frozenset({429, 503})


def _refusal(response: HttpReply, message: str) -> BackendError:
    if response.status in _THE_REQUESTS_FAULT:
        return TaskRefusedError(message)
    if response.status in _NO_ROOM:
        return BackendBusyError(message, _retry_after_s(response.header(b"retry-after") or ""))
    return BackendError(message)


def _retry_after_s(text: str) -> float | None:
    """Reads the seconds of a `Retry-After` header, a number or a date; None where it is neither."""
    if text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text[:40]).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _explain(response: HttpReply) -> str:
    body = response.body
    text = body[:300].decode("utf-8", "replace")
    with suppress(orjson.JSONDecodeError):
        message = orjson.loads(body) if len(body) <= _MAX_ERROR_BYTES else None
        if isinstance(message, dict):
            said = [message.get(key) for key in ("error", "detail")]
            text = next((word[:300] for word in said if isinstance(word, str) and word), text)
    after = response.header(b"retry-after")
    later = f" (retry after {after[:20]} s)" if response.status in (429, 503) and after else ""
    return f"the server answered {response.status}: {text or response.reason.decode('latin-1')}{later}"
