"""Speaks to a server of the protocol over gRPC."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from evenkeel.arrays import Array
from evenkeel.backends.oip.contract import Contract
from evenkeel.backends.oip.wire import MAX_WORD_BYTES, OipWire, OnWire, WireExchange
from evenkeel.errors import BackendBusyError, BackendError, ProtocolError, RequestError
from evenkeel.http2.client import GrpcClient
from evenkeel.oip.protobuf import MessageTable, read, write
from evenkeel.oip.service import MODEL_METADATA, MODEL_REQUEST, READY, SERVER_METADATA, SERVICE
from evenkeel.text_values import without_password
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls

__all__ = ["GrpcWire"]


class GrpcWire(OipWire):
    """Speaks the protocol's gRPC form.

    Args:
        url: of the server: grpc:// or grpcs://.
        model: what the server calls the model.
        version: of the model; empty for the server's choice.
        timeout_s: said to the server with each call.
        credentials: sent with each call.
        tls: files for `grpcs://`; None: the system's authorities.

    Raises:
        ConfigurationError: as `GrpcClient`.
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
        self._client = GrpcClient(url, timeout_s=timeout_s, credentials=credentials, tls=tls)
        self._model, self._version = model, version
        self._named = write({"name": model, "version": version}, MODEL_REQUEST)
        self.shown = f"{without_password(url.rstrip('/'))} model {model!r}"

    async def check_ready(self) -> None:
        """Asks whether the model is ready."""
        if not (await self._ask("ModelReady", self._named, READY)).get("ready"):
            raise BackendBusyError("the server says that the model is not ready")

    async def metadata(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Asks for the metadata of the server and of the model."""
        server = await self._ask("ServerMetadata", b"", SERVER_METADATA)
        return server, await self._ask("ModelMetadata", self._named, MODEL_METADATA)

    def send(self, contract: Contract, inputs: Array, traceparent: str, on_done: OnWire) -> WireExchange:
        """Sends one task."""
        message = contract.write_call(self._model, self._version, inputs)
        limit = contract.max_reply_bytes(len(inputs))
        answered = partial(_on_answer, contract, len(inputs), on_done)
        return self._client.call(f"/{SERVICE}/ModelInfer", message, limit, answered, traceparent)

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def _ask(self, method: str, message: bytes, table: MessageTable) -> dict[str, Any]:
        answer = await self._client.ask(f"/{SERVICE}/{method}", message, MAX_WORD_BYTES)
        try:
            return read(answer, table)
        except RequestError as error:
            raise ProtocolError(f"{method}: {error}") from None


def _on_answer(contract: Contract, rows: int, on_done: OnWire, answer: bytes | BackendError) -> None:
    if isinstance(answer, BackendError):
        on_done(answer)
    else:
        on_done((len(answer), partial(contract.read_answer, answer, rows)))
