"""Reaches devices that are processes of their own: they connect to the coordinator over TCP (`device_process.py`)."""

import selectors
import socket
import time
from collections import deque
from typing import cast

from evenkeel.errors import ProtocolError
from evenkeel.training.coded.links import DeviceEvent, DeviceLink
from evenkeel.training.coded.messages import DeviceMessage, MessageReader, encode
from evenkeel.training.coded.sockets import UNPROVEN_BYTES, Listener, listen, prepare, tcp_address

__all__ = ["TcpDevices"]

_PROVE_S = 10.0  # for a connection to prove the key and introduce itself
_MAX_UNSENT_BYTES = 512 << 20  # for a device that does not read


class _DeviceConnection:
    """Holds one connection: its bytes on the way, and which device it is."""

    def __init__(self, plain: socket.socket, key: bytes) -> None:
        self.socket = plain
        self.listener = Listener(key)
        self.reader = MessageReader(UNPROVEN_BYTES)
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.name = ""
        self.since_s = time.monotonic()


class TcpDevices(DeviceLink):
    """Listens for devices, and drives them without a thread.

    Args:
        address: to listen on, `tcp://host:port`; port 0 takes a free one.
        key: shared with all devices; empty: none, on this machine alone.
        no_key: listen beyond this machine without a key.
        max_array_bytes: longest message from a device.
        max_devices: connections at once.

    Attributes:
        address: with its real port.

    Raises:
        ConfigurationError: the address cannot be listened on, or is open to anybody.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:0",
        key: bytes = b"",
        *,
        no_key: bool = False,
        max_array_bytes: int = 256 << 20,
        max_devices: int = 1024,
    ) -> None:
        self._key, self._max_array_bytes, self._max_devices = key, max_array_bytes, max_devices
        self._server, found = listen(tcp_address(address, key, no_key))
        self.address = str(found)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._connections: set[_DeviceConnection] = set()
        self._named: dict[str, _DeviceConnection] = {}
        self._events: deque[DeviceEvent] = deque()

    def time(self) -> float:
        """Gives monotonic seconds."""
        return time.monotonic()

    def send(self, device: str, message: DeviceMessage) -> None:
        """Sends a message, now as far as the connection takes it, the rest while polling."""
        connection = self._named.get(device)
        if connection is not None:
            self._send(connection, message)

    def poll(self, until_s: float) -> list[DeviceEvent]:
        """Waits for something to happen."""
        while not self._events:
            left_s = until_s - time.monotonic()
            for key, mask in self._selector.select(max(0.0, min(left_s, 1.0))):
                if key.data is None:
                    self._accept()
                    continue
                connection = cast(_DeviceConnection, key.data)
                if mask & selectors.EVENT_WRITE:
                    self._flush(connection)
                if mask & selectors.EVENT_READ and connection in self._connections:
                    self._read(connection)
            self._end_unnamed()
            if left_s <= 0:
                break
        events = list(self._events)
        self._events.clear()
        return events

    def drop(self, device: str, reason: str) -> None:
        """Ends the connection with a device."""
        connection = self._named.pop(device, None)
        if connection is not None:
            self._end(connection)

    def close(self) -> None:
        """Ends all connections."""
        for connection in list(self._connections):
            self._end(connection)
        self._named.clear()
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        try:
            plain, _ = self._server.accept()
        except OSError:  # it is gone again
            return
        if len(self._connections) >= self._max_devices:
            plain.close()
            return
        plain.setblocking(False)
        prepare(plain)
        connection = _DeviceConnection(plain, self._key)
        self._connections.add(connection)
        self._selector.register(plain, selectors.EVENT_READ, connection)
        self._send(connection, connection.listener.welcome())

    def _send(self, connection: _DeviceConnection, message: DeviceMessage) -> None:
        for piece in encode(message):
            # Arrays may change once this returns, so what is not sent at once is sent from a copy.
            connection.unsent.append(memoryview(piece).cast("B"))
            connection.unsent_bytes += len(piece)
            self.sent_bytes += len(piece)
        self._flush(connection)
        if connection.unsent:
            connection.unsent = deque(memoryview(bytes(piece)) for piece in connection.unsent)
        if connection.unsent_bytes > _MAX_UNSENT_BYTES:
            self._lose(connection, "it does not read what it is sent")

    def _flush(self, connection: _DeviceConnection) -> None:
        try:
            while connection.unsent:
                count = connection.socket.send(connection.unsent[0])
                connection.unsent_bytes -= count
                if count == len(connection.unsent[0]):
                    connection.unsent.popleft()
                else:
                    connection.unsent[0] = connection.unsent[0][count:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(connection, error.strerror or str(error))
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.modify(connection.socket, wanted, connection)

    def _read(self, connection: _DeviceConnection) -> None:
        try:
            count = connection.socket.recv_into(connection.reader.buffer())
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(connection, error.strerror or str(error))
            return
        if not count:
            self._lose(connection, "it ended the connection")
            return
        if connection.name:
            self.received_bytes += count
        try:
            for message in connection.reader.advance(count):
                self._take(connection, message)
                if connection not in self._connections:
                    return
            if connection.reader.error is not None:
                raise connection.reader.error
        except ProtocolError as error:
            self._send(connection, DeviceMessage("refused", {"text": str(error)}))
            if connection in self._connections:
                self._lose(connection, str(error))

    def _take(self, connection: _DeviceConnection, message: DeviceMessage) -> None:
        if not connection.listener.trusted:
            self._send(connection, connection.listener.take(message))
        elif not connection.name:
            if message.kind != "hello":
                raise ProtocolError(f"expected a hello, found a {message.kind} message")
            name = message.text("name")
            if not name or len(name) > 100 or not name.isprintable():
                raise ProtocolError("a device's name has 1 to 100 printable characters")
            before = self._named.pop(name, None)
            if before is not None:  # it came by another way before its old connection was known to be dead
                self._end(before)
                self._events.append(DeviceEvent("lost", name, DeviceMessage("lost", {"text": "it came again"})))
            connection.name = name
            connection.reader.max_array_bytes = self._max_array_bytes
            self._named[name] = connection
            self._events.append(DeviceEvent("joined", name, message))
        else:
            self._events.append(DeviceEvent("message", connection.name, message))

    def _lose(self, connection: _DeviceConnection, why: str) -> None:
        self._end(connection)
        if connection.name and self._named.get(connection.name) is connection:
            del self._named[connection.name]
            self._events.append(DeviceEvent("lost", connection.name, DeviceMessage("lost", {"text": why})))

    def _end(self, connection: _DeviceConnection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _end_unnamed(self) -> None:
        """Ends connections that did not introduce themselves in time."""
        now = time.monotonic()
        for connection in [each for each in self._connections if not each.name and now - each.since_s > _PROVE_S]:
            self._end(connection)
