"""Sends and receives over TCP, in two hosts, to see what their link really carries.

Standard library only, and run by its path: a host needs nothing installed. Both sides first bounce single bytes for the
round trip, then send at the same time, as the workers of a ring do, so each direction carries the other's
acknowledgements too.
"""

import json
import select
import socket
import statistics
import struct
import sys
import threading
import time

__all__ = ["exchange", "meet"]

_TIMEOUT_S = 10.0  # of any one wait; a dead link ends the probe
_BOUNCES = 30
_CHUNK = bytes(65_536)
_MARGIN_S = 0.3  # the sides do not begin together to the millisecond, and each must find the link full to its own end


def meet(role: str, address: str, port: int) -> socket.socket:
    """Connects: `listen` takes a connection, `connect` tries until there is somebody or the time is over."""
    if role == "listen":
        with socket.create_server((address, port)) as server:
            server.settimeout(_TIMEOUT_S)
            return server.accept()[0]
    give_up = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((address, port), timeout=1)
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def exchange(connection: socket.socket, bounces_first: bool, warm_s: float, seconds: float) -> dict[str, float | None]:
    """Gives what one side saw.

    Args:
        connection: to the other side.
        bounces_first: True on one side, False on the other.
        warm_s: how long the link fills before anything is counted.
        seconds: how long bytes are counted.

    Returns:
        `received_bps`, bits of payload a second; and `round_trip_s`, None on the side that only answered.
    """
    connection.settimeout(_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips = []
    for _ in range(_BOUNCES):
        began = time.perf_counter()
        if bounces_first:
            connection.sendall(b"?")
        if not connection.recv(1):
            raise ConnectionError("the other side left")
        if not bounces_first:
            connection.sendall(b"!")
        trips.append(time.perf_counter() - began)
    connection.setblocking(False)
    stop = time.perf_counter() + warm_s + seconds + _MARGIN_S
    sender = threading.Thread(target=_send_until, args=(connection, stop), daemon=True)
    sender.start()
    received_bps = _count(connection, stop - _MARGIN_S - seconds, stop - _MARGIN_S, stop)
    sender.join()
    # What is still under way is of no use: reset, do not drain.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return {"received_bps": received_bps, "round_trip_s": statistics.median(trips) if bounces_first else None}


def _send_until(connection: socket.socket, stop: float) -> None:
    try:
        while (left := stop - time.perf_counter()) > 0:
            if select.select((), (connection,), (), left)[1]:
                connection.send(_CHUNK)
    except OSError:
        return  # the other side was done a moment earlier; what came in before is enough


def _count(connection: socket.socket, begin: float, end: float, stop: float) -> float:
    """Counts bits a second that came between two moments; reads on until `stop`, so that the other side can send."""
    buffer = bytearray(1 << 20)
    first = last = None
    received = 0
    while (left := stop - time.perf_counter()) > 0:
        # Not a plain wait for bytes or the end: the packet that says the end can get lost, too.
        if not select.select((connection,), (), (), left)[0]:
            break
        try:
            size = connection.recv_into(buffer)
        except ConnectionError:
            break
        if not size:
            break
        now = time.perf_counter()
        if first is None:
            first = last = now if now >= begin else None
        elif now <= end:
            received += size
            last = now
    return 8 * received / (last - first) if first is not None and last is not None and last > first else 0.0


def _main(role: str, address: str, port: str, warm_s: str, seconds: str) -> None:
    connection = meet(role, address, int(port))
    print(json.dumps(exchange(connection, role == "connect", float(warm_s), float(seconds))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
