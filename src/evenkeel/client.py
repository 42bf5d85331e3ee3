"""Asks an evenkeel gateway or edge node for classes, and says what is needed: an accuracy, a deadline, a cost.

    from evenkeel.client import InferenceClient

    with InferenceClient("http://127.0.0.1:8000", "cifar10-base") as client:
        answer = client.classify("frog.png", min_accuracy=0.93, timeout=0.3, on_miss="degrade")
        print(answer.label, answer.confidence, answer.path, answer.certificate)

With `bearer=` it sends a key, with `tls=ClientTls(ca=Path("ca.pem"))` it believes an authority of your own.
It speaks the Open Inference Protocol over connections that are kept. `AsyncInferenceClient` is the same for asyncio.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from os import PathLike
from pathlib import Path
from time import monotonic, time
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import numpy as np
import orjson

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.code import path_of
from evenkeel.errors import (
    BackendError,
    BackendLostError,
    ConfigurationError,
    DeadlineError,
    ForbiddenError,
    OverloadedError,
    ProtocolError,
    RequestError,
    SlowRequestError,
    TooLargeError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedError,
)
from evenkeel.http_client.client import HttpClient
from evenkeel.http_client.reply import HttpReply
from evenkeel.oip import HEADER_LENGTH, InferResponse, Tensor, parse_response, read_message, write_request
from evenkeel.oip.types import Parameters, oip_datatype
from evenkeel.promises.promise import KINDS, Promise
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls

__all__ = ["AsyncInferenceClient", "Classification", "ClientTls", "Image", "InferenceClient", "Needs"]

Image = Array | str | PathLike[str] | bytes
Result = TypeVar("Result")

_TIMEOUT_S = 30.0  # of a request that names none
_MAX_WORD_BYTES = 1 << 20  # of metadata and of errors
_MAX_FILE_BYTES = 64 << 20  # what a gateway takes in one request, by default
_VALUE_BYTES = 64  # of one value in a reply, with room for a long label
_OUTPUTS = ("scores", "label", "source", "confidence")
_FURTHER = ("path", "certificate", "latency_ms")
_MAX_SHOWN = 500  # characters of what a server said
_LEAST_RETRY_S = 0.01
_ERRORS: dict[int, type[RequestError]] = {
    400: RequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: UnknownModelError,
    408: SlowRequestError,
    413: TooLargeError,
    501: UnsupportedError,
}


class Needs(TypedDict, total=False):
    """Says what a request needs of its answers; all may be left out.

    Attributes:
        min_accuracy: of all answers of this kind, at least so many are right.
        max_accuracy_drop: at most so many fewer are right than if the accurate model answered all of them.
        min_agreement: at least so many are what the accurate model would say.
        guarantee: how surely the promise is kept; .95 by default.
        timeout: seconds, in all; 30 by default.
        max_cost: most that an answer may cost on average, in passes of the accurate model.
        on_miss: at the deadline, `degrade` to the light model's answer, or `reject`: an error.
        packet_loss: share of the image's packets that were lost before it came here.
        exact: the accurate model's answer, and no other.
    """

    min_accuracy: float
    max_accuracy_drop: float
    min_agreement: float
    guarantee: float
    timeout: float
    max_cost: float
    on_miss: Literal["degrade", "reject"]
    packet_loss: float
    exact: bool


@dataclass(frozen=True)
class Classification:
    """Holds the answer to one image.

    Attributes:
        label: name of the best class.
        scores: of all classes, float32 [classes].
        confidence: 0..1, how sure whoever answered is.
        source: how it is known: `exact`, `hedge`, `collage`, `edge`, `degraded`, ...; see docs/how-to/serve.md.
        path: `edge`, `data centre` or `degraded`; where neither a light model nor a replica answered, the source.
        certificate: of the promise that the answer is part of; empty for none.
        promise: that the request named, if the answer is part of it.
        latency_ms: spent in the gateway; None where it does not say so.
    """

    label: str
    scores: FloatArray
    confidence: float
    source: str
    path: str
    certificate: str = ""
    promise: Promise | None = None
    latency_ms: float | None = None


class AsyncInferenceClient:
    """Asks one model of one server, on asyncio; many requests may be under way at once.

    Args:
        url: of the server, as `http://127.0.0.1:8000`.
        model: as the server calls it.
        headers: sent with each request.
        bearer: the key that the server wants.
        bearer_file: holds that key; it is read again when it changes.
        tls: files for `https://`: the server's authority, a certificate of one's own.

    Raises:
        ConfigurationError: the URL is none, or a header, key or file cannot be used. No message shows a key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        headers: Mapping[str, str] | None = None,
        bearer: str = "",
        bearer_file: Path | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        kept = (HEADER_LENGTH.lower().encode(), b"content-encoding", b"retry-after")
        self._http = HttpClient(url, kept, credentials=Credentials(headers, bearer, bearer_file), tls=tls)
        self._model = model
        self._path = f"/v2/models/{quote(model, safe='')}"
        self._input = ""  # not known yet
        self._classes = 0
        self._overhead_s = 0.0  # of a request, beside its time in the gateway; smoothed

    async def __aenter__(self) -> Self:
        """Gives the client, which is closed at the end."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the client."""
        await self.close()

    async def close(self) -> None:
        """Closes all connections; requests that are under way fail."""
        await self._http.close()

    async def classify(self, image: Image, **needs: Unpack[Needs]) -> Classification:
        """Gives the class of one image: pixels [height, width, 3] or [3, height, width], a file's path, or its bytes.

        Raises:
            RequestError: the request is wrong, or asks for what the server cannot promise; the message is the server's.
            OverloadedError: the server had no room, also after it was asked again as often as the timeout allowed.
            DeadlineError: no answer came in time.
            BackendError: the server cannot be reached, failed, or said what is no answer.
        """
        return (await self.classify_all([image], **needs))[0]

    async def classify_all(self, images: Sequence[Image] | Array, **needs: Unpack[Needs]) -> list[Classification]:
        """Gives the classes of several images in one request: all are files, or all are pixels of one shape.

        Raises:
            EvenkeelError: as `classify`.
        """
        promise, timeout_s, parameters = _read_needs(needs)
        until_s = monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if not self._input:
                    await self._describe()
                if isinstance(images, np.ndarray) or not any(isinstance(one, (str, PathLike)) for one in images):
                    tensor = _tensor(self._input, images)
                else:  # reading files may take a while
                    tensor = await asyncio.get_running_loop().run_in_executor(None, _tensor, self._input, images)
                return await self._ask(tensor, parameters, promise, until_s)
        except TimeoutError:
            raise DeadlineError(
                f"no answer of {self._model!r} within {timeout_s:g} s; allow more time, or ask for on_miss='degrade'"
            ) from None

    async def ready(self) -> bool:
        """Tells whether the server can answer now.

        Raises:
            BackendError: it cannot be reached.
        """
        return (await self._http.request("GET", f"{self._path}/ready", max_bytes=_MAX_WORD_BYTES)).status == 200

    async def _describe(self) -> None:
        reply = _checked(await self._http.request("GET", self._path, max_bytes=_MAX_WORD_BYTES))
        try:
            message = read_message(reply.body, False)
        except RequestError as error:
            raise ProtocolError(f"{self._path} says what is no metadata: {error}") from None
        inputs, outputs = message.get("inputs"), message.get("outputs")
        try:
            names = [one["name"] for one in inputs]  # type: ignore[union-attr]  # what is wrong raises
            shapes = {one["name"]: one["shape"] for one in outputs}  # type: ignore[union-attr]
            classes = int(shapes["scores"][-1])
        except (TypeError, KeyError, IndexError, ValueError):
            raise ProtocolError(
                f"{self._model!r} is no classifier behind evenkeel: it has no output 'scores'"
            ) from None
        if len(names) != 1 or not isinstance(names[0], str) or not 1 <= classes <= 1 << 20:
            raise ProtocolError(f"{self._model!r} takes {len(names)} inputs and gives {classes} classes")
        self._input, self._classes = names[0], classes

    async def _ask(
        self, tensor: Tensor, parameters: Parameters, promise: Promise | None, until_s: float
    ) -> list[Classification]:
        rows = tensor.shape[0]
        max_bytes = _MAX_WORD_BYTES + rows * (self._classes + 8) * _VALUE_BYTES
        while True:
            began_s = monotonic()
            left_s = until_s - began_s
            # The server ends in time for its answer, degraded if need be, to be back here before the timeout.
            theirs_s = left_s - min(0.5 * left_s, max(0.1 * left_s, 1.5 * self._overhead_s))
            given = {**parameters, "binary_data_output": True, "timeout": max(1, int(theirs_s * 1e6))}
            body, header_length = write_request([tensor], binary=True, parameters=given)
            headers = b"content-type: application/octet-stream\r\n%b: %d\r\n" % (
                HEADER_LENGTH.lower().encode(),
                header_length or 0,
            )
            reply = await self._http.request("POST", f"{self._path}/infer", body, headers, max_bytes)
            if reply.status == 503:
                wait_s = max(_LEAST_RETRY_S, _retry_after_s(reply))
                if monotonic() + wait_s < until_s:
                    await asyncio.sleep(wait_s)
                    continue
            answers = _read_answers(_checked(reply), rows, promise)
            slowest_ms = max((one.latency_ms or 0.0 for one in answers), default=0.0)
            beside_s = max(0.0, monotonic() - began_s - 1e-3 * slowest_ms)
            self._overhead_s += 0.25 * (beside_s - self._overhead_s)
            return answers


class InferenceClient:
    """Asks one model of one server; may be used by several threads at once.

    It runs an `AsyncInferenceClient` on an event loop of its own, in a thread.

    Args:
        url: of the server, as `http://127.0.0.1:8000`.
        model: as the server calls it.
        headers: as for `AsyncInferenceClient`, and so is what follows.
        bearer: the key that the server wants.
        bearer_file: holds that key.
        tls: files for `https://`.

    Raises:
        ConfigurationError: as `AsyncInferenceClient`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        headers: Mapping[str, str] | None = None,
        bearer: str = "",
        bearer_file: Path | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._asking = AsyncInferenceClient(
            url, model, headers=headers, bearer=bearer, bearer_file=bearer_file, tls=tls
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="evenkeel-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Gives the client, which is closed at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the client."""
        self.close()

    def close(self) -> None:
        """Closes all connections and ends the thread; requests that are under way fail."""
        if self._loop.is_closed():
            return
        self._run(self._asking.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def classify(self, image: Image, **needs: Unpack[Needs]) -> Classification:
        """Gives the class of one image: pixels [height, width, 3] or [3, height, width], a file's path, or its bytes.

        Raises:
            EvenkeelError: as `AsyncInferenceClient.classify`.
        """
        return self._run(self._asking.classify(image, **needs))

    def classify_all(self, images: Sequence[Image] | Array, **needs: Unpack[Needs]) -> list[Classification]:
        """Gives the classes of several images in one request: all are files, or all are pixels of one shape.

        Raises:
            EvenkeelError: as `AsyncInferenceClient.classify`.
        """
        return self._run(self._asking.classify_all(images, **needs))

    def ready(self) -> bool:
        """Tells whether the server can answer now.

        Raises:
            BackendError: it cannot be reached.
        """
        return self._run(self._asking.ready())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._loop.is_closed():
            work.close()
            raise BackendLostError("the client was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # of an interrupted wait; a request that is over is not touched


def _read_needs(needs: Mapping[str, Any]) -> tuple[Promise | None, float, Parameters]:
    """Gives the promise, the timeout in seconds, and the parameters of a request.

    Raises:
        RequestError: a need is not known, or out of range, or needs contradict each other.
    """
    known = Needs.__annotations__
    given = {name: value for name, value in needs.items() if value is not None}
    for name in given:
        if name not in known:
            raise RequestError(f"{name}: is no need; known are {', '.join(known)}")
    timeout_s = given.pop("timeout", _TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 1e-3 <= timeout_s <= 86400:
        raise RequestError(f"timeout: must be from 0.001 to 86400 seconds, found {timeout_s!r}")
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) > 1:
        raise RequestError(f"{' and '.join(kinds)} contradict each other: a request has one promise")
    promise = None
    try:
        if kinds:
            promise = Promise(kinds[0], given[kinds[0]], given.get("guarantee", 0.95))
    except ConfigurationError as error:
        raise RequestError(str(error)) from None
    return promise, float(timeout_s), given


def _tensor(name: str, images: Sequence[Image] | Array) -> Tensor:
    """Makes the input of a request.

    Raises:
        RequestError: there are no images, or they do not go together, or a file cannot be read.
    """
    if isinstance(images, (str, bytes, PathLike)):
        raise RequestError("several images are expected; give one alone to classify()")
    if not len(images):
        raise RequestError("there are no images")
    if not isinstance(images, np.ndarray):
        files = [isinstance(one, (str, bytes, PathLike)) for one in images]
        if all(files):
            data = [_file(one) for one in images]  # type: ignore[arg-type]  # as was just seen
            return Tensor(name, "BYTES", (len(data),), data)
        if any(files):
            raise RequestError("give files, or pixels, not both in one request")
    try:
        pixels = np.stack([np.asarray(one) for one in images])
        datatype = oip_datatype(pixels.dtype)
    except (ValueError, TypeError, UnsupportedError) as error:
        raise RequestError(f"the images are no arrays of numbers of one shape: {error}") from None
    if pixels.ndim != 4:
        raise RequestError(f"an image must be [height, width, 3] or [3, height, width], found {list(pixels.shape[1:])}")
    return Tensor(name, datatype, pixels.shape, np.ascontiguousarray(pixels))


def _file(image: str | bytes | PathLike[str]) -> bytes:
    if isinstance(image, bytes):
        return image
    path = Path(image)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RequestError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes; shrink it first")
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None


def _checked(reply: HttpReply) -> HttpReply:
    """Gives a reply with status 200.

    Raises:
        EvenkeelError: it has another one; the message is the server's.
    """
    if reply.header(b"content-encoding") not in (None, "identity"):
        raise ProtocolError("the reply is encoded, which was not requested")
    if reply.status == 200:
        return reply
    said = _said(reply)
    if reply.status in _ERRORS:
        raise _ERRORS[reply.status](said)
    if reply.status == 503:
        raise OverloadedError(said, _retry_after_s(reply))
    if reply.status == 504:
        raise DeadlineError(said)
    raise BackendError(f"status {reply.status}: {said}")


def _said(reply: HttpReply) -> str:
    try:
        message = orjson.loads(reply.body)
        text = message["error"] if isinstance(message["error"], str) else str(message["error"])
    except (orjson.JSONDecodeError, TypeError, KeyError):
        text = reply.body[:_MAX_SHOWN].decode("utf-8", "replace") or reply.reason.decode("latin-1")
    return text[:_MAX_SHOWN]


def _retry_after_s(reply: HttpReply) -> float:
    text = reply.header(b"retry-after") or ""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text[:40]).timestamp() - time())
    except (ValueError, OverflowError):
        return 1.0


def _read_answers(reply: HttpReply, rows: int, promise: Promise | None) -> list[Classification]:
    """Reads the answers out of a response.

    Raises:
        ProtocolError: it holds something else.
    """
    given = reply.header(HEADER_LENGTH.lower().encode())
    if given is not None and not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ProtocolError(f"{HEADER_LENGTH} is {given[:20]!r}")
    columns = _columns(parse_response(reply.body, None if given is None else int(given)), rows)
    answers = []
    for row in range(rows):
        source = columns["source"][row]
        certificate = columns["certificate"][row] if "certificate" in columns else ""
        path = columns["path"][row] if "path" in columns else path_of(source)
        answers.append(
            Classification(
                columns["label"][row],
                columns["scores"][row],
                float(columns["confidence"][row]),
                source,
                path,
                certificate,
                promise if certificate else None,
                float(columns["latency_ms"][row]) if "latency_ms" in columns else None,
            )
        )
    return answers


def _columns(response: InferResponse, rows: int) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for output in response.outputs:
        if output.name not in _OUTPUTS + _FURTHER:
            continue
        numbers = output.name in ("scores", "confidence", "latency_ms")
        row_shape = output.shape[1:]
        fits = output.shape[:1] == (rows,) and len(row_shape) == (output.name == "scores") and 0 not in row_shape
        data = output.data
        if not fits or isinstance(data, list) is numbers:
            raise ProtocolError(f"output {output.name!r} is {output.datatype} {list(output.shape)} for {rows} images")
        if isinstance(data, list):
            columns[output.name] = [one.decode("utf-8", "replace") for one in data]
        elif data.dtype.kind != "f" or not np.isfinite(data).all():
            raise ProtocolError(f"output {output.name!r} holds what are no finite numbers")
        else:
            columns[output.name] = data
    missing = [name for name in _OUTPUTS if name not in columns]
    if missing:
        raise ProtocolError(f"the response lacks {', '.join(missing)}; the server is no evenkeel")
    return columns
