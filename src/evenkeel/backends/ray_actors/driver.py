"""Speaks to Ray, in a process of its own, on behalf of a gateway that it serves over a socket.

In a process of its own because Ray ends the process of a driver whose cluster has been gone for a minute, and calls to
it may block for as long; the gateway and its connections to workers go on meanwhile. Requests and answers are lines of
JSON. The process ends when the gateway closes the socket, and Ray then ends the actors that are this gateway's own.

Run as `python -m evenkeel.backends.ray_actors.driver FD ADDRESS`, by `engine.py`.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from evenkeel.backends.ray_actors.actor import WorkerActor
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.ray_actors.parcels import Parcel, pack
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, EvenkeelError, MissingExtraError

__all__ = ["RayCluster", "main"]

_NAMESPACE = "evenkeel"
_CONNECT_S = 20.0  # Ray itself tries for minutes
_RESERVE_S = 10.0  # before a group is said to have no place; it is waited for all the same
_PLACE_S = 20.0  # the same for one worker, whose process has to start, too
_ANSWER_S = 2.0  # for an actor that was well to say where it is; then it is frozen
_LEAVE_S = 3.0  # for Ray to be left, once the gateway is gone
_POLL_S = 0.05
_ATTEMPTS = 3  # a name may still be that of an actor that has just died
_MAX_SHOWN = 500  # characters of what Ray says
_AT_ONCE = 64  # requests
_NODE_LABEL = "ray.io/node-id"
_HOW = {
    "PACK": "on as few nodes as possible",
    "SPREAD": "over as many nodes as possible",
    "STRICT_PACK": "all on one node",
    "STRICT_SPREAD": "each on a node of its own",
}
_log = logging.getLogger(__name__)


@dataclass
class _RayActor:
    """Holds one actor: its handle, and the node on which it was met; "" before that."""

    actor: Any
    node: str = ""


class _ActorGroup:
    """Holds the workers of one kind: their placement group, their models in Ray's store, their actors."""

    def __init__(self, ray: Any, name: str, options: RayOptions, specs: list[str]) -> None:
        self._ray, self._name, self._options, self._specs = ray, name, options, specs
        self._lock = threading.Lock()  # of what follows
        self._growing = threading.Lock()  # held while a worker beyond the group looks for a node
        self._reserved: Any = None
        self._was_placed = False
        self._parcels: Any = None
        self._actors: dict[int, _RayActor] = {}
        self._released: set[int] = set()

    def reach(self, worker: int, number: int, settings: Mapping[str, Any], load_s: float) -> dict[str, Any]:
        """Gives the address and the key of a worker, which is placed first if there is none, or none that lives.

        Args:
            worker: names it; never used again for another one.
            number: its place in the group.
            settings: fields of `WorkerConfig`, for one that is placed now.
            load_s: for its models to be loaded.

        Raises:
            BackendLostError: it died, or is out of reach; it may be there later.
            BackendError: it has no place, or cannot serve its models. Who waits for it need not wait on.
        """
        loaded_by_s = time.monotonic() + load_s
        attempt, reason = 0, ""
        while attempt < _ATTEMPTS:
            placed = self._place(worker, number, settings)
            try:
                said = self._ask(placed, number)
            except self._ray.exceptions.ActorUnavailableError as error:  # Ray may still find it well, or dead
                raise BackendLostError(f"Ray cannot reach {self._called(number)}: {_words(error)}") from error
            except self._ray.exceptions.RayError as error:
                self._forget(worker, placed)
                attempt, reason = attempt + 1, _words(error)
                time.sleep(_POLL_S * attempt)
                continue
            if said["state"] == "ready":
                return said
            if said["state"] == "loading" and time.monotonic() < loaded_by_s:
                continue
            self._forget(worker, placed)
            self._ray.kill(placed.actor)
            if said["state"] == "failed":
                raise BackendError(f"{self._called(number)} cannot serve on its node: {said['reason']}")
            if said["state"] == "loading":
                raise BackendLostError(f"{self._called(number)} did not load its models in {load_s:g} s")
            attempt, reason = attempt + 1, f"it did not answer for {_ANSWER_S:g} s"
        raise BackendLostError(f"{self._called(number)} died on Ray: {reason}")

    def release(self, worker: int) -> None:
        """Ends a worker, also one that still waits for its place; those of a shared fleet go on."""
        with self._lock:
            self._released.add(worker)
            placed = self._actors.pop(worker, None)
        if placed is not None and not self._options.fleet:
            self._ray.kill(placed.actor)

    def _ask(self, placed: _RayActor, number: int) -> dict[str, Any]:
        """Asks an actor where it is and how it does."""
        call = placed.actor.reach.remote(_ANSWER_S)
        try:
            said: dict[str, Any] = self._ray.get(call, timeout=_ANSWER_S + 1.0 if placed.node else _PLACE_S)
        except self._ray.exceptions.GetTimeoutError:
            if placed.node:
                return {"state": "frozen"}
            raise BackendError(f"Ray has not placed {self._called(number)}: {self._room(number)}") from None
        placed.node = said["node"]
        return said

    def _called(self, number: int) -> str:
        return f"worker {number} of {self._name}"

    def _forget(self, worker: int, placed: _RayActor) -> None:
        with self._lock:
            if self._actors.get(worker) is placed:
                del self._actors[worker]

    def _place(self, worker: int, number: int, settings: Mapping[str, Any]) -> _RayActor:
        """Gives the actor of a worker; asks Ray for one if there is none.

        Raises:
            BackendLostError: it was released.
            BackendError: the cluster has no room for the group.
        """
        with self._lock:
            if worker in self._released:
                raise BackendLostError(f"{self._called(number)} was let go")
            if worker in self._actors:
                return self._actors[worker]
        reserved = self._reserve()
        # One at a time where nodes matter: each keeps away from those before it, or near them.
        alone = number >= reserved.bundle_count and self._options.strategy.startswith("STRICT")
        with self._growing if alone else nullcontext():
            with self._lock:
                if worker in self._released:
                    raise BackendLostError(f"{self._called(number)} was let go")
                actor = self._ray.remote(WorkerActor).options(**self._actor_options(reserved, number))
                placed = self._actors[worker] = _RayActor(actor.remote(dict(settings), self._parcels))
            if alone:
                with suppress(self._ray.exceptions.RayError):  # whoever asks it next sees the same
                    self._ask(placed, number)
        return placed

    def _actor_options(self, reserved: Any, number: int) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        given = self._options
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        options |= {named[name]: amount for name, amount in given.resources.items() if name in named}
        options["resources"] = {name: amount for name, amount in given.resources.items() if name not in named}
        if given.runtime_env:
            options["runtime_env"] = dict(given.runtime_env)
        if given.fleet:
            options |= {"name": f"{self._name}/{number}", "get_if_exists": True, "lifetime": "detached"}
        if number < reserved.bundle_count:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(reserved, number)
        elif given.strategy.startswith("STRICT"):
            nodes = sorted({placed.node for placed in self._actors.values() if placed.node})
            some = f"({','.join(nodes)})"
            options["label_selector"] = {_NODE_LABEL: f"in{some}" if given.strategy == "STRICT_PACK" else f"!in{some}"}
        elif given.strategy == "SPREAD":
            options["scheduling_strategy"] = "SPREAD"
        return options

    def _reserve(self) -> Any:
        """Gives the placement group once it has its place; makes it, and puts the models into Ray's store, if new.

        Raises:
            BackendError: the cluster has no room for it now; Ray goes on looking.
            ConfigurationError: a model's file cannot be read.
        """
        with self._lock:
            if self._parcels is None:
                parcels = [pack(spec) if self._options.ship else Parcel(spec) for spec in self._specs]
                self._parcels = self._ray.put([(parcel.spec, dict(parcel.files)) for parcel in parcels])
            if self._reserved is None:
                self._reserved = self._find_or_make()
        if not self._was_placed:  # one that was, and has lost a node, still has the others
            if not self._reserved.wait(_RESERVE_S):
                raise BackendError(f"Ray has not placed {self._name}: {self._room()}")
            self._was_placed = True
        return self._reserved

    def _find_or_make(self) -> Any:
        from ray.util.placement_group import placement_group

        given = self._options
        bundles = [dict(given.resources)] * given.count
        if not given.fleet:
            return placement_group(bundles, strategy=given.strategy)
        for _ in range(_ATTEMPTS):
            try:
                return self._ray.util.get_placement_group(self._name)
            except ValueError:  # there is none yet; another gateway may make it at the same time
                try:
                    return placement_group(bundles, given.strategy, name=self._name, lifetime="detached")
                except (ValueError, self._ray.exceptions.RayError) as error:
                    _log.info("placement group %s: %s", self._name, error)
                    time.sleep(_POLL_S)
        raise BackendLostError(f"Ray neither gives nor makes the placement group {self._name!r}")

    def _room(self, number: int = 0) -> str:
        """Says what was asked for, and what the cluster has."""
        given = self._options
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        free = self._ray.available_resources()
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in given.resources.items())
        has = ", ".join(
            f"{name} {sum(node['Resources'].get(name, 0) for node in nodes):g} with {free.get(name, 0):g} free"
            for name in given.resources
        )
        asked = (
            f"{given.count} workers with {wanted} each were asked for"
            if number < given.count
            else f"one more worker with {wanted} was asked for"
        )
        return (
            f"{asked}, {_HOW[given.strategy]}; the cluster has {len(nodes)} nodes and {has}. Add nodes, or ask for "
            "fewer workers or less for each"
        )


class RayCluster:
    """Holds the connection to a Ray cluster, and the workers that a gateway has there.

    Raises:
        MissingExtraError: Ray is not installed.
        BackendError: no cluster answers there.
    """

    def __init__(self, address: str) -> None:
        _knock(address)
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("Ray", "ray") from error
        self._ray = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
        try:
            ray.init(
                address=address,
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({"include_dashboard": False} if address == "local" else {}),
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise BackendError(f"no Ray cluster can be joined at {address!r}: {_words(error)}") from error
        self._lock = threading.Lock()
        self._groups: dict[str, _ActorGroup] = {}

    def do(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Does what a line from the gateway asks for.

        Raises:
            EvenkeelError: it cannot be done.
        """
        with self._lock:
            name = request["group"]
            if name not in self._groups:
                options = RayOptions(**request["options"])
                self._groups[name] = _ActorGroup(self._ray, name, options, request["models"])
        group = self._groups[name]
        if request["do"] == "release":
            group.release(request["worker"])
            return {}
        try:
            return group.reach(request["worker"], request["number"], request["settings"], request["load_s"])
        except self._ray.exceptions.RayError as error:
            raise BackendLostError(f"Ray: {_words(error)}") from error

    def close(self) -> None:
        """Leaves the cluster, which ends the workers that are not shared."""
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Refuses an address at which nothing listens: Ray would look for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, OverflowError) as error:
        raise BackendError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or correct the address"
        ) from error


def _words(error: BaseException) -> str:
    """Gives the part of what Ray says that tells most, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return " ".join(raised[-1:] or lines)[:_MAX_SHOWN] or type(error).__name__


def main(arguments: list[str]) -> int:
    """Serves the gateway on the socket that it handed over, until it closes that."""
    lines = socket.socket(fileno=int(arguments[0])).makefile("rwb")
    writing = threading.Lock()

    def say(**words: Any) -> None:
        with writing, suppress(OSError):  # the gateway may have closed it meanwhile
            lines.write(json.dumps(words).encode() + b"\n")
            lines.flush()

    def give_up() -> None:
        say(id=0, error=f"no Ray cluster could be joined at {arguments[1]!r} in {_CONNECT_S:g} s", kind="other")
        os._exit(1)

    too_long = threading.Timer(_CONNECT_S, give_up)
    too_long.daemon = True
    too_long.start()
    try:
        cluster = RayCluster(arguments[1])
    except EvenkeelError as error:
        say(id=0, error=str(error), kind=_kind(error))
        return 1
    finally:
        too_long.cancel()

    def answer(request: dict[str, Any]) -> None:
        try:
            say(id=request["id"], result=cluster.do(request))
        except EvenkeelError as error:
            say(id=request["id"], error=str(error), kind=_kind(error))
        except Exception as error:
            _log.exception("a request failed")
            say(id=request["id"], error=f"{type(error).__name__}: {_words(error)}", kind="other")

    threads = ThreadPoolExecutor(_AT_ONCE)
    for line in lines:
        threads.submit(answer, json.loads(line))
    # The gateway is gone. A cluster that is gone too must not keep this process.
    end = threading.Timer(_LEAVE_S, os._exit, [0])
    end.daemon = True
    end.start()
    cluster.close()
    os._exit(0)


def _kind(error: EvenkeelError) -> str:
    return next(
        (name for name, kind in (("lost", BackendLostError), ("wrong", ConfigurationError)) if isinstance(error, kind)),
        "other",
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(sys.argv[1:]))
