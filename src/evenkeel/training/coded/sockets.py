"""Sends and receives device messages over a TCP connection whose two sides prove to each other that they hold a key.

The side that listens begins: `welcome`, with a random challenge where it asks for a key. The other side answers with
`proof`, its own challenge in it, and gets the listener's `proof`. What follows is neither encrypted nor signed: a key
keeps strangers out, not somebody who can change packets on their way.
"""

import contextlib
import socket
from collections.abc import Iterator

from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.backends.worker.key import challenge, check_proof, is_open, proof
from evenkeel.errors import ConfigurationError, EvenkeelError, ProtocolError
from evenkeel.training.coded.messages import MAX_ARRAY_BYTES, DeviceMessage, MessageReader, encode

__all__ = ["KEY_VARIABLE", "UNPROVEN_BYTES", "Listener", "MessageSocket", "call", "listen", "prepare", "tcp_address"]

KEY_VARIABLE = "EVENKEEL_DEVICE_KEY"
UNPROVEN_BYTES = 4096  # the longest arrays before the proof
_CONNECT_S = 5.0
_LISTENER, _CALLER = "device listener", "device caller"  # roles, so that no proof can be sent back to its sender


class Listener:
    """Proves and checks on the side that listens; knows no socket.

    Args:
        key: shared by all; empty: none is asked for.

    Attributes:
        trusted: the other side has proved that it holds the key, or need not.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._challenge = key, challenge() if key else ""
        self.trusted = not key

    def welcome(self) -> DeviceMessage:
        """Gives the first message of a connection."""
        return DeviceMessage("welcome", {"challenge": self._challenge})

    def take(self, message: DeviceMessage) -> DeviceMessage:
        """Takes the other side's proof and gives this side's.

        Raises:
            ProtocolError: it is none.
        """
        if message.kind != "proof":
            raise ProtocolError("this side asks for a key; give the other side the same one (--key-file)")
        theirs = message.fields.get("challenge")
        _check(message, self._key, _CALLER, self._challenge, theirs)
        self.trusted = True
        return DeviceMessage("proof", {"proof": proof(self._key, _LISTENER, self._challenge, str(theirs))})


class MessageSocket:
    """Sends and receives messages over a connected socket, waiting as long as its timeout says."""

    def __init__(self, plain: socket.socket, max_array_bytes: int = MAX_ARRAY_BYTES) -> None:
        self._socket = plain
        self.reader = MessageReader(max_array_bytes)
        self._ready: list[DeviceMessage] = []
        prepare(plain)

    def fileno(self) -> int:
        """Gives the number by which the system knows it."""
        return self._socket.fileno()

    def settimeout(self, timeout_s: float | None) -> None:
        """Says how long the other side may be silent; None: for ever."""
        self._socket.settimeout(timeout_s)

    def send(self, message: DeviceMessage) -> None:
        """Sends a message.

        Raises:
            EvenkeelError: the connection ended.
        """
        try:
            for piece in encode(message):
                self._socket.sendall(piece)
        except OSError as error:
            raise EvenkeelError(f"the connection ended: {error.strerror or error}") from error

    def receive(self) -> DeviceMessage:
        """Waits for the next message.

        Raises:
            EvenkeelError: the connection ended, or was silent for too long.
            ProtocolError: what came is no message.
        """
        while not self._ready:
            self._read()
        return self._ready.pop(0)

    def waiting(self) -> bool:
        """Tells whether a whole message is there already; reads what has come."""
        while not self._ready:
            before = self._socket.gettimeout()
            self._socket.settimeout(0.0)
            try:
                self._read()
            except BlockingIOError:
                return False
            finally:
                self._socket.settimeout(before)
        return True

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            count = self._socket.recv_into(self.reader.buffer())
        except BlockingIOError:
            raise
        except OSError as error:
            raise EvenkeelError(f"the connection ended: {error.strerror or error}") from error
        if not count:
            raise EvenkeelError("the other side ended the connection")
        self._ready += self.reader.advance(count)
        if self.reader.error is not None and not self._ready:
            raise self.reader.error


def tcp_address(text: str, key: bytes, no_key: bool = False) -> Address:
    """Reads the address to listen on; beyond this machine a key is needed, unless `no_key` says that this is meant.

    Raises:
        ConfigurationError: it is none, or open to anybody.
    """
    address = parse_address(text)
    if address.kind != "tcp":
        raise ConfigurationError(f"address {text!r}: devices are reached by tcp://host:port")
    if is_open(address) and not key and not no_key:
        raise ConfigurationError(
            f"{address} can be reached from other machines, so that anybody there could read data or send wrong "
            f"results: give all sides the same key (--key-file, or the variable {KEY_VARIABLE}), or say --no-key"
        )
    return address


def listen(address: Address) -> tuple[socket.socket, Address]:
    """Listens on an address, and gives it with its real port.

    Raises:
        ConfigurationError: that is not possible.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        plain = socket.socket(found[0], found[1], found[2])
        try:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind(found[4])
            plain.listen(128)
        except OSError:
            plain.close()
            raise
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror or error}") from error
    return plain, Address("tcp", host=address.host, port=plain.getsockname()[1])


@contextlib.contextmanager
def call(
    address: Address, key: bytes, silence_s: float | None, max_array_bytes: int = MAX_ARRAY_BYTES
) -> Iterator[MessageSocket]:
    """Connects to a listener and proves the key, both ways; ends the connection when the block is left.

    Args:
        address: of the listener.
        key: shared with it; empty: none.
        silence_s: how long it may be silent afterwards; None: for ever.
        max_array_bytes: of a message from it.

    Raises:
        EvenkeelError: it cannot be reached.
        ProtocolError: it does not hold the key, or asks for one that this side does not have.
    """
    try:
        plain = socket.create_connection((address.host, address.port), _CONNECT_S)
    except OSError as error:
        raise EvenkeelError(f"{address} cannot be reached: {error.strerror or error}") from error
    connected = MessageSocket(plain, UNPROVEN_BYTES)
    try:
        welcome = connected.receive()
        if welcome.kind != "welcome":
            raise ProtocolError(f"{address} begins with a {welcome.kind} message; check the address")
        theirs = welcome.text("challenge")
        if bool(theirs) != bool(key):
            raise ProtocolError(
                f"{address} asks for a key; give this side the same one (--key-file)"
                if theirs
                else f"{address} asks for no key, although this side has one; give both the same key"
            )
        if key:
            mine = challenge()
            fields = {"challenge": mine, "proof": proof(key, _CALLER, theirs, mine)}
            connected.send(DeviceMessage("proof", fields))
            answer = connected.receive()
            if answer.kind == "refused":
                raise ProtocolError(f"{address} refuses this side: {answer.fields.get('text')}")
            _check(answer, key, _LISTENER, theirs, mine)
        connected.reader.max_array_bytes = max_array_bytes
        connected.settimeout(silence_s)
        yield connected
    finally:
        connected.close()


def _check(message: DeviceMessage, key: bytes, role: str, of_listener: object, of_caller: object) -> None:
    """Accepts the other side's proof, or refuses it.

    Raises:
        ProtocolError: it does not hold the key.
    """
    try:
        check_proof(message.fields.get("proof"), key, role, of_listener, of_caller)
    except ProtocolError as error:
        raise ProtocolError(
            "the two sides do not hold the same key; give both the same one "
            f"(--key-file, or the variable {KEY_VARIABLE})"
        ) from error


def prepare(plain: socket.socket) -> None:
    """Has small messages sent at once, and the kernel notice a peer that vanished silently, within about 15 s."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, name):
            plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
