"""Runs a worker's server inside a Ray actor: on a thread, with an event loop of its own.

Inside the actor's process, because a process that it started would outlive `ray.kill`. Ray's own calls are used to find
the worker only; tasks come over TCP, from whoever holds the key, which the actor makes itself and gives to those who
reach it through Ray. So each life of an actor has a key of its own.
"""

import asyncio
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvloop

from evenkeel.backends.ray_actors.parcels import Parcel, unpack
from evenkeel.backends.worker.address import Address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.key import CHALLENGE_BYTES
from evenkeel.backends.worker.main import load_models, serve_models
from evenkeel.errors import BackendError, EvenkeelError

__all__ = ["WorkerActor"]

_log = logging.getLogger(__name__)
_LOOK_S = 1.0  # that `reach` waits for models to be loaded before it says that they are not


class WorkerActor:
    """Loads models and serves them on the node's address, from the moment that Ray has placed it.

    Args:
        settings: fields of `WorkerConfig`.
        parcels: the models; see `parcels`.
        host: to listen on; "": the address by which Ray knows the node.
    """

    def __init__(
        self, settings: Mapping[str, Any], parcels: Sequence[tuple[str, dict[str, bytes]]], host: str = ""
    ) -> None:
        self._settings, self._parcels = settings, [Parcel(*parcel) for parcel in parcels]
        self._host, self._node = (host, "") if host else _node()
        self._key = secrets.token_bytes(CHALLENGE_BYTES)
        self._listening: Future[tuple[asyncio.AbstractEventLoop, str]] = Future()
        threading.Thread(target=self._run, name="evenkeel-worker", daemon=True).start()

    def reach(self, patience_s: float) -> dict[str, Any]:
        """Says where the worker listens and gives its key, once its event loop has answered.

        Gives the node, and a state: ready, with address and key; loading; failed, with the reason why the models
        cannot be served; or frozen, if the loop did not answer within `patience_s`.
        """
        try:
            loop, address = self._listening.result(_LOOK_S)
        except TimeoutError:
            return {"state": "loading", "node": self._node}
        except BackendError as error:
            return {"state": "failed", "reason": str(error), "node": self._node}
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(patience_s)
        except TimeoutError:
            return {"state": "frozen", "node": self._node}
        return {"state": "ready", "address": address, "key": self._key.hex(), "node": self._node}

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            if not self._listening.done():
                reason = str(error) if isinstance(error, EvenkeelError) else f"{type(error).__name__}: {error}"
                self._listening.set_exception(BackendError(reason))
                return
            _log.exception("the worker's server ended")
        os._exit(1)  # an actor without a server is of no use: its end is seen at once, and mended

    def _serve(self) -> None:
        with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
            specs = [unpack(parcel, Path(folder, str(place))) for place, parcel in enumerate(self._parcels)]
            listen = str(Address("tcp", host=self._host))
            config = WorkerConfig(models=tuple(specs), listen=listen, **self._settings)
            models = load_models(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            loop = runner.get_loop()
            listening = lambda address: self._listening.set_result((loop, address))
            runner.run(serve_models(models, config, lambda: self._key, asyncio.Event(), listening))


def _node() -> tuple[str, str]:
    """Gives the node's address and id."""
    import ray

    return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
