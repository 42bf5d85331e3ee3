"""Learns from Kubernetes where the pods of a service are: lists its EndpointSlices, and then watches them.

It asks the API server with the pod's own service account, which needs `get`, `list` and `watch` on `endpointslices`
(`discovery.k8s.io`).
"""

import asyncio
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from evenkeel.errors import BackendError, BackendLostError, ConfigurationError
from evenkeel.serving.discovery.discovery import MAX_NODES, Discovery, OnFound

__all__ = ["ApiServer", "KubernetesService"]

_log = logging.getLogger(__name__)
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_GROUP = "/apis/discovery.k8s.io/v1"
_MAX_LINE = 4 << 20  # a slice has at most 1,000 endpoints
_MAX_SLICES = 128
_PAGE = 100
_WATCH_S = 240  # after which the server ends a watch
_TIMEOUT_S = 10.0
_SHORT_S = 1.0  # a watch that ends sooner is not asked for again at once
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 30.0


@dataclass(frozen=True)
class ApiServer:
    """Says where the API server is and how to show who asks; files are read for each request, since they are renewed.

    Attributes:
        url: https://host:port; http:// for tests alone.
        token: file with the bearer token; None: none is shown.
        authorities: file with the certificates that sign the server's; None: those of the system.
    """

    url: str
    token: Path | None = None
    authorities: Path | None = None

    @staticmethod
    def of_this_pod() -> "ApiServer":
        """Gives the one that every pod finds in its environment.

        Raises:
            ConfigurationError: this is no pod, or it has no service account.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (_ACCOUNT / "token").is_file():
            raise ConfigurationError("kubernetes: this is no pod of a cluster, or its service account is not mounted")
        host = f"[{host}]" if ":" in host else host
        return ApiServer(f"https://{host}:{port}", _ACCOUNT / "token", _ACCOUNT / "ca.crt")

    @asynccontextmanager
    async def get(self, target: str) -> AsyncIterator["_Body"]:
        """Asks for a target; gives the body of the answer.

        Raises:
            BackendLostError: the server cannot be reached, or its answer ends early.
            BackendError: it refuses, or its answer is not understood.
        """
        parts = urlsplit(self.url)
        try:
            context = ssl.create_default_context(cafile=self.authorities) if parts.scheme == "https" else None
            token = None if self.token is None else self.token.read_text(encoding="ascii").strip()
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context, limit=_MAX_LINE)
        except (OSError, TimeoutError, ValueError) as error:
            raise BackendLostError(f"the API server at {self.url} cannot be reached: {error}") from error
        try:
            lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc}", "Accept: application/json", "Connection: close"]
            if token is not None:
                if not token.isprintable():
                    raise BackendError(f"{self.token} holds no token")
                lines.append(f"Authorization: Bearer {token}")
            writer.write("\r\n".join([*lines, "", ""]).encode("ascii"))
            async with asyncio.timeout(_TIMEOUT_S):
                body = await _Body.begin(reader)
            yield body
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            raise BackendLostError(f"the API server at {self.url}: {error or type(error).__name__}") from error
        finally:
            writer.close()


class _Body:
    """Reads the body of an answer by lines, each of bounded length."""

    def __init__(self, reader: asyncio.StreamReader, chunked: bool, size: int | None) -> None:
        self._reader, self._chunked, self._left = reader, chunked, size
        self._held = b""

    @classmethod
    async def begin(cls, reader: asyncio.StreamReader) -> "_Body":
        """Reads the head of an answer.

        Raises:
            BackendError: the server refuses.
        """
        status = (await reader.readline()).split(None, 2)
        headers: dict[bytes, bytes] = {}
        while (line := await reader.readline()) not in (b"\r\n", b"\n"):
            if not line or len(headers) > 100:
                raise BackendLostError("the head of an answer has no end")
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or not status[1].isdigit():
            raise BackendError("what answers is no API server")
        if status[1] != b"200":
            said = status[1].decode()
            raise BackendError(f"the API server answers with status {said}: see the service account's rights")
        size = headers.get(b"content-length")
        return cls(reader, headers.get(b"transfer-encoding") == b"chunked", None if size is None else int(size))

    async def line(self) -> bytes:
        """Gives the next line of the body; empty at its end."""
        while b"\n" not in self._held:
            if len(self._held) > _MAX_LINE:
                raise BackendError(f"a line of the answer has more than {_MAX_LINE >> 20} MiB")
            part = await self._part()
            if not part:
                line, self._held = self._held, b""
                return line
            self._held += part
        line, _, self._held = self._held.partition(b"\n")
        return line + b"\n"

    async def whole(self) -> Any:
        """Gives the body as JSON."""
        parts, size = [], 0
        while line := await self.line():
            parts.append(line)
            size += len(line)
            if size > _MAX_LINE * 4:
                raise BackendError("the answer is too long")
        return json.loads(b"".join(parts))

    async def _part(self) -> bytes:
        if not self._chunked:
            if self._left is None:
                return await self._reader.read(1 << 16)
            part = await self._reader.read(min(self._left, 1 << 16))
            self._left -= len(part)
            return part
        head = (await self._reader.readline()).partition(b";")[0].strip()
        size = int(head, 16)
        if not 0 <= size <= _MAX_LINE:
            raise BackendError(f"a chunk of the answer has {size} bytes")
        part = await self._reader.readexactly(size)
        await self._reader.readline()
        return part


class KubernetesService(Discovery):
    """Watches the pods of a service that are ready and do not end.

    Args:
        service: its name.
        namespace: its namespace; empty: that of this pod.
        port: the name of the port, or its number; empty: the first one.
        api: the API server; None: that of this pod.
    """

    def __init__(self, service: str, namespace: str = "", port: str = "", api: ApiServer | None = None) -> None:
        self._service, self._namespace, self._port, self._api = service, namespace, port, api

    async def watch(self, found: OnFound) -> None:
        """Calls `found` with the addresses of all slices, from list to watch and, if that ends or fails, again."""
        pause_s, silent = _FIRST_PAUSE_S, False
        said: set[str] = set()

        def changed(slices: dict[str, Any]) -> None:
            nonlocal said, pause_s, silent
            pause_s, silent = _FIRST_PAUSE_S, False
            now = {address for each in slices.values() for address in self._addresses(each)}
            if now != said:
                said = now
                if len(now) > MAX_NODES:
                    _log.warning("kubernetes: %d pods of %s; %d are used", len(now), self._service, MAX_NODES)
                found(sorted(now)[:MAX_NODES])

        while True:
            try:
                await self._list_and_watch(changed)
            except (BackendError, ConfigurationError) as error:
                if not silent:
                    _log.warning("kubernetes: %s; nodes stay as they are", error)
                    silent = True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _list_and_watch(self, changed: Any) -> None:
        api = self._api or ApiServer.of_this_pod()
        namespace = self._namespace or _own_namespace()
        root = f"{_GROUP}/namespaces/{quote(namespace, safe='')}/endpointslices"
        selector = {"labelSelector": f"kubernetes.io/service-name={self._service}"}
        slices: dict[str, Any] = {}
        version, more = "", ""
        while True:
            query = {**selector, "limit": str(_PAGE), **({"continue": more} if more else {})}
            async with asyncio.timeout(_TIMEOUT_S * 3), api.get(f"{root}?{urlencode(query)}") as body:
                page = await body.whole()
            if not isinstance(_get(page, "items"), list):
                raise BackendError("what the API server answers is no list of slices")
            for each in page["items"]:
                slices[_name(each)] = each
            if len(slices) > _MAX_SLICES:
                raise BackendError(f"the service {self._service} has more than {_MAX_SLICES} slices")
            metadata = _dict(page, "metadata")
            version, more = str(metadata.get("resourceVersion", "")), str(metadata.get("continue") or "")
            if not more:
                break
        changed(slices)
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            query = {
                **selector, "watch": "1", "resourceVersion": version,
                "allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCH_S),
            }  # fmt: skip
            async with api.get(f"{root}?{urlencode(query)}") as body:
                while True:
                    async with asyncio.timeout(_WATCH_S + 2 * _TIMEOUT_S):
                        line = await body.line()
                    if not line.strip():
                        break  # the server ends every watch now and then
                    event = json.loads(line)
                    kind, one = _get(event, "type"), _get(event, "object")
                    if not isinstance(kind, str) or not isinstance(one, dict):
                        raise BackendError("what the API server says of a change is not understood")
                    if kind == "ERROR":
                        return  # what was watched from is too old: begin with a list
                    version = str(_dict(one, "metadata").get("resourceVersion", version))
                    if kind == "DELETED":
                        slices.pop(_name(one), None)
                    elif kind in ("ADDED", "MODIFIED") and (len(slices) < _MAX_SLICES or _name(one) in slices):
                        slices[_name(one)] = one
                    if kind != "BOOKMARK":
                        changed(slices)
            await asyncio.sleep(max(0.0, began_s + _SHORT_S - loop.time()))

    def _addresses(self, one: Any) -> list[str]:
        """Gives the addresses in a slice; what is not understood is left out."""
        if _get(one, "addressType") not in ("IPv4", "IPv6"):
            return []
        ports = [port for port in _list(one, "ports") if isinstance(_get(port, "port"), int)]
        wanted = [port for port in ports if not self._port or self._port in (_get(port, "name"), str(port["port"]))]
        if not wanted:
            return []
        number, found = wanted[0]["port"], []
        for endpoint in _list(one, "endpoints"):
            conditions = _get(endpoint, "conditions") or {}
            ready = _get(conditions, "ready") is not False and _get(conditions, "terminating") is not True
            for address in _list(endpoint, "addresses")[:1] if ready else ():  # all of them are one pod
                if isinstance(address, str):
                    found.append(f"tcp://[{address}]:{number}" if ":" in address else f"tcp://{address}:{number}")
        return found


def _own_namespace() -> str:
    try:
        return (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"the namespace of this pod is not known: {error.strerror or error}") from error


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _dict(value: Any, name: str) -> dict[str, Any]:
    found = _get(value, name)
    return found if isinstance(found, dict) else {}


def _list(value: Any, name: str) -> list[Any]:
    found = _get(value, name)
    return found if isinstance(found, list) else []


def _name(one: Any) -> str:
    return str(_dict(one, "metadata").get("name", ""))
