"""Reaches devices that are actors on a Ray cluster. Their blocks go from actor to actor, not through the coordinator.

Ray is optional: `pip install 'evenkeel[ray]'`. An actor's blocks are in its memory: one that Ray has lost comes as a
new device with the same data, and its coded blocks are made again.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from evenkeel.errors import ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.links import DeviceEvent, DeviceLink
from evenkeel.training.coded.messages import DeviceMessage, size_bytes

__all__ = ["RayDevices"]

_FETCH_S = 60.0


class RayDevices(DeviceLink):
    """Starts one actor for each device, and drives them.

    Args:
        loaders: of each device by its name, what gives its examples and labels; it is called in the actor. None: the
            device only helps out.
        options: for all actors, as Ray's `options` takes them, such as `{"num_cpus": 1}`.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigurationError: an actor could not be made, such as because its data is of no use.
    """

    def __init__(
        self, loaders: dict[str, Callable[[], tuple[Any, Any]] | None], options: dict[str, Any] | None = None
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("Ray", "ray") from error
        self._ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        # Peers are served beside the one thing that an actor is at, for else two would wait for each other for ever.
        actor = ray.remote(concurrency_groups={"peers": 4})(_RayDevice)
        self._actors = {
            name: actor.options(**(options or {}), name=f"{id(self)}-{name}", namespace="evenkeel").remote(
                name, load, id(self)
            )
            for name, load in loaders.items()
        }
        self._open: dict[Any, str] = {}
        self._events: deque[DeviceEvent] = deque()
        for name, made in self._actors.items():
            try:
                hello = DeviceMessage(*ray.get(made.hello.remote()))
            except ray.exceptions.RayError as error:
                raise ConfigurationError(f"device {name} could not be made: {error}") from error
            self._events.append(DeviceEvent("joined", name, hello))

    def time(self) -> float:
        """Gives monotonic seconds."""
        return time.monotonic()

    def send(self, device: str, message: DeviceMessage) -> None:
        """Has an actor answer."""
        actor = self._actors.get(device)
        if actor is not None:
            self.sent_bytes += size_bytes(message)
            request = (message.kind, dict(message.fields), dict(message.arrays))
            self._open[actor.answer.remote(request)] = device

    def poll(self, until_s: float) -> list[DeviceEvent]:
        """Waits for replies."""
        left_s = max(0.0, until_s - time.monotonic())
        if not self._events and not self._open:
            time.sleep(min(left_s, 0.05))
        elif not self._events:
            ready, _ = self._ray.wait(list(self._open), num_returns=1, timeout=left_s)
            for reference in ready:
                name = self._open.pop(reference)
                try:
                    reply = DeviceMessage(*self._ray.get(reference))
                except self._ray.exceptions.RayError as error:
                    self._lose(name, str(error))
                    continue
                self.received_bytes += size_bytes(reply)
                if name in self._actors:
                    self._events.append(DeviceEvent("message", name, reply))
        events = list(self._events)
        self._events.clear()
        return events

    def drop(self, device: str, reason: str) -> None:
        """Ends an actor."""
        actor = self._actors.pop(device, None)
        self._open = {reference: name for reference, name in self._open.items() if name != device}
        if actor is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        """Ends all actors; Ray itself goes on."""
        for name in list(self._actors):
            self.drop(name, "the training has ended")

    def _lose(self, name: str, why: str) -> None:
        if name in self._actors:
            self.drop(name, why)
            self._events.append(DeviceEvent("lost", name, DeviceMessage("lost", {"text": why})))


class _RayDevice:
    """Is the device within an actor. Messages travel as tuples, so that both sides may have other versions of ours."""

    def __init__(self, name: str, load: Callable[[], tuple[Any, Any]] | None, link: int) -> None:
        self._device = Device(name, None if load is None else load(), address=name, fetch=self._fetch)
        self._link = link

    def hello(self) -> tuple[str, Any, Any]:
        message = self._device.hello()
        return message.kind, dict(message.fields), {}

    def answer(self, request: tuple[str, Any, Any]) -> tuple[str, Any, Any]:
        message = self._device.answer(DeviceMessage(*request))
        return message.kind, dict(message.fields), dict(message.arrays)

    def _fetch(self, address: str, request: DeviceMessage) -> DeviceMessage:
        import ray

        try:
            peer = ray.get_actor(f"{self._link}-{address}", namespace="evenkeel")
            given = peer.answer.options(concurrency_group="peers").remote((request.kind, dict(request.fields), {}))
            return DeviceMessage(*ray.get(given, timeout=_FETCH_S))
        except (ValueError, ray.exceptions.RayError) as error:
            raise EvenkeelError(f"device {address} cannot be reached: {error}") from error
