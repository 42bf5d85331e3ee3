"""Defines how a coordinator reaches its devices, and reaches those in this process.

A link is the one thing that differs between devices in this process, behind TCP (`tcp_link.py`) and on a Ray cluster
(`ray_link.py`). It tells what happens as events, in order: a device is there, one said something, one is gone.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from evenkeel.delays.laws import Delay
from evenkeel.errors import EvenkeelError
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.messages import DeviceMessage, size_bytes

__all__ = ["DeviceEvent", "DeviceLink", "LocalDevices"]


@dataclass(frozen=True)
class DeviceEvent:
    """Says what happened: `joined` (with the device's hello), `message`, or `lost`."""

    kind: Literal["joined", "message", "lost"]
    device: str
    message: DeviceMessage


class DeviceLink(ABC):
    """Carries messages to devices and events from them.

    Law: of each device, events are joined, then messages, then lost, and so on; to each request that arrives there is
    at most one reply, with its ticket; a device that is lost may be sent things, to no effect.

    Attributes:
        sent_bytes: of all messages to devices so far.
        received_bytes: of all messages from devices so far.
    """

    sent_bytes: int = 0
    received_bytes: int = 0

    @abstractmethod
    def time(self) -> float:
        """Gives the seconds since some fixed moment."""

    @abstractmethod
    def send(self, device: str, message: DeviceMessage) -> None:
        """Sends a request."""

    @abstractmethod
    def poll(self, until_s: float) -> list[DeviceEvent]:
        """Waits for something to happen, until `until_s` at the latest, and gives what did."""

    @abstractmethod
    def drop(self, device: str, reason: str) -> None:
        """Ends the connection with a device; it may come again. Gives no event."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of all devices."""


class LocalDevices(DeviceLink):
    """Drives devices in this process, on a clock of its own that only moves when replies take time.

    Args:
        devices: all of them; they reach each other by name.
        delay: draws how long an ordinary request takes, a product of the device's partition and one of its transpose;
            others take time by how much they multiply. None: no time at all.
    """

    def __init__(self, devices: Iterable[Device], delay: Delay | None = None) -> None:
        self._devices: dict[str, Device] = {}
        self._away: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._delay = delay
        self._now = 0.0
        self._number = 0
        self._free_at: dict[str, float] = {}
        self._queue: list[tuple[float, int, DeviceEvent]] = []
        for device in devices:
            self.add(device)

    def add(self, device: Device) -> None:
        """Lets a device join."""
        device.address = device.name
        device.connect(self._fetch)
        self._devices[device.name] = device
        self._numbers.setdefault(device.name, len(self._numbers))
        self.bring_back(device.name)

    def take_away(self, name: str) -> None:
        """Lets a device vanish, with what it is at; it keeps its blocks."""
        self._away.add(name)
        self._queue = [entry for entry in self._queue if entry[2].device != name]
        heapq.heapify(self._queue)
        self._push(self._now, DeviceEvent("lost", name, DeviceMessage("lost", {"text": "it was taken away"})))

    def bring_back(self, name: str) -> None:
        """Lets a device come back."""
        self._away.discard(name)
        self._free_at[name] = self._now
        self._push(self._now, DeviceEvent("joined", name, self._devices[name].hello()))

    def time(self) -> float:
        """Gives the clock's seconds."""
        return self._now

    def send(self, device: str, message: DeviceMessage) -> None:
        """Has the device answer, after the time that is drawn for it; it does one thing at a time."""
        if device in self._away or device not in self._devices:
            return
        self.sent_bytes += size_bytes(message)
        self._forget_outdated(device, message.fields.get("round"))
        number, began_s = self._numbers[device], max(self._now, self._free_at[device])
        took_s = 0.0
        if self._delay is not None:
            took_s = self._delay.draw((self._number << 16) + number, number, began_s) * self._devices[device].work(
                message
            )
        self._free_at[device] = began_s + took_s
        self._push(self._free_at[device], DeviceEvent("message", device, message))

    def poll(self, until_s: float) -> list[DeviceEvent]:
        """Moves the clock to the next event, or to `until_s`."""
        if not self._queue or self._queue[0][0] > until_s:
            if until_s != float("inf"):
                self._now = max(self._now, until_s)
            return []
        self._now, _, event = heapq.heappop(self._queue)
        if event.kind != "message":
            return [event]
        reply = self._devices[event.device].answer(event.message)  # when it is due: not at all if it was lost before
        self.received_bytes += size_bytes(reply)
        return [DeviceEvent("message", event.device, reply)]

    def drop(self, device: str, reason: str) -> None:
        """Takes the device away without an event."""
        self._away.add(device)
        self._queue = [entry for entry in self._queue if entry[2].device != device]
        heapq.heapify(self._queue)

    def close(self) -> None:
        """Forgets all devices."""
        self._devices.clear()
        self._queue.clear()

    def _forget_outdated(self, device: str, number: object) -> None:
        """Drops requests of earlier rounds, as a device does itself: also one that it is at."""
        if not isinstance(number, int):
            return
        kept = []
        for entry in self._queue:
            event = entry[2]
            own = event.message.fields.get("round") if event.kind == "message" and event.device == device else None
            if not (isinstance(own, int) and own < number):
                kept.append(entry)
        if len(kept) < len(self._queue):
            self._queue = kept
            heapq.heapify(self._queue)
            due = [when_s for when_s, _, event in kept if event.device == device and event.kind == "message"]
            self._free_at[device] = max(due, default=self._now)

    def _push(self, when_s: float, event: DeviceEvent) -> None:
        self._number += 1
        heapq.heappush(self._queue, (when_s, self._number, event))

    def _fetch(self, address: str, request: DeviceMessage) -> DeviceMessage:
        if address in self._away or address not in self._devices:
            raise EvenkeelError(f"device {address} is away")
        return self._devices[address].answer(request)
