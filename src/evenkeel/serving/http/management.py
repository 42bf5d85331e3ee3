"""Answers requests that change what is served: the repository extension of the protocol, and the fleet.

    POST /v2/repository/index                    the models of the configuration; {"ready": true}: those that are
    POST /v2/repository/models/{m}/load          loads a model, or its present version
    POST /v2/repository/models/{m}/unload        serves it no longer; what is under way is answered
    GET  /v2/fleet                               the nodes of every model
    POST /v2/fleet/reload                        reads the configuration again, and loads what it changed
    POST /v2/fleet/restart                       replaces all workers; {"at_once": 1}
    POST /v2/fleet/resize                        {"model": "m", "replicas": 9, "backups": 1}

An answer comes when the change is done.
"""

from dataclasses import asdict
from typing import Any

import orjson

from evenkeel.errors import ForbiddenError, RequestError, TooLargeError
from evenkeel.oip import shown
from evenkeel.serving.front.management import Management

__all__ = ["MANAGED", "answer", "check_allowed"]

_MAX_BYTES = 64 << 10  # of a body
MANAGED = ("/v2/repository/", "/v2/fleet")
_INDEX = "/v2/repository/index"
_MAX_NODES = 1024


def check_allowed(path: str, may_manage: bool, body_bytes: int) -> None:
    """Refuses changes, and a look at nodes, to those who may not manage the server, and long bodies to all.

    Raises:
        ForbiddenError: they may not.
        TooLargeError: the body is too long.
    """
    if body_bytes > _MAX_BYTES:
        raise TooLargeError(f"such a request has a body of at most {_MAX_BYTES >> 10} KiB, found {body_bytes} bytes")
    if path != _INDEX and not may_manage:
        raise ForbiddenError(
            "this server is managed over its control socket (`evenkeel reload`), or with a key that has the right to "
            "manage"
        )


async def answer(management: Management, method: str, path: str, body: bytes) -> Any:
    """Does what a request asks for, and gives what to answer as JSON; None: nothing is served at the path.

    Raises:
        EvenkeelError: it cannot be done; all is as it was.
    """
    parts = path.split("/")[2:]
    if path == _INDEX and method == "POST":
        only_ready = _field(_object(body), "ready", bool, False)
        return [asdict(model) for model in management.index() if model.state == "READY" or not only_ready]
    if parts[:2] == ["repository", "models"] and len(parts) == 4 and method == "POST":
        _refuse_files(_object(body))
        if parts[3] == "load":
            await management.load(parts[2])
            return {}
        if parts[3] == "unload":
            await management.unload(parts[2])
            return {}
    if path == "/v2/fleet" and method == "GET":
        return {name: [asdict(node) for node in nodes] for name, nodes in management.nodes().items()}
    if path == "/v2/fleet/reload" and method == "POST":
        return asdict(await management.reload())
    if path == "/v2/fleet/restart" and method == "POST":
        await management.restart(_count(_object(body), "at_once", 1, 1))
        return {}
    if path == "/v2/fleet/resize" and method == "POST":
        await _resize(management, _object(body))
        return {}
    return None


async def _resize(management: Management, fields: dict[str, Any]) -> None:
    names = list(management.nodes())
    name = _field(fields, "model", str, names[0] if len(names) == 1 else "")
    wanted = {kind: _count(fields, f"{kind}s", None, 0) for kind in ("replica", "backup") if f"{kind}s" in fields}
    if not name or not wanted or set(fields) - {"model", "replicas", "backups"}:
        raise RequestError(
            f"give replicas, backups or both, and the model if there are several; found {_shown(fields)}"
        )
    for kind in ("replica", "backup"):
        if kind in wanted:
            await management.resize(name, "replica" if kind == "replica" else "backup", wanted[kind])


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object")
    return found


def _refuse_files(fields: dict[str, Any]) -> None:
    parameters = fields.get("parameters") or {}
    if not isinstance(parameters, dict) or any(name != "unload_dependents" for name in parameters):
        raise RequestError(
            "parameters: this server loads what its configuration says, and takes no configuration or files by request"
        )


def _field(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name, default)
    if type(value) is not kind:
        raise RequestError(f"{name} must be a {kind.__name__}, found {shown(value)}")
    return value


def _count(fields: dict[str, Any], name: str, default: int | None, low: int) -> int:
    value: int = _field(fields, name, int, default)
    if not low <= value <= _MAX_NODES:
        raise RequestError(f"{name} must be from {low} to {_MAX_NODES}, found {value}")
    return value


def _shown(fields: dict[str, Any]) -> str:
    return ", ".join(map(shown, list(fields)[:5])) or "nothing"
