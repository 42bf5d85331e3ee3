"""Counts the bytes that this process has really sent over TCP, as the kernel does."""

import os
import socket
import struct
from typing import NamedTuple

from evenkeel.errors import EvenkeelError

__all__ = ["SocketBytes", "socket_bytes"]

_COUNTS_AT = 200  # tcpi_bytes_sent and tcpi_bytes_retrans of Linux's struct tcp_info, from 4.19 on
_COUNTS = struct.Struct("QQ")


class SocketBytes(NamedTuple):
    """Counts the payload of TCP connections, without headers; `sent` includes what was `resent`.

    What the machine's own full queue refuses is in `sent` twice, and not in `resent`: TCP does not call it lost.
    """

    sent: int
    resent: int


def socket_bytes() -> SocketBytes:
    """Counts the bytes that all TCP connections that are open now have carried.

    Unlike an interface's counters it tells the processes of one machine apart, and needs no rights.

    Raises:
        EvenkeelError: the kernel does not count.
    """
    sent = resent = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile, as the folder's own entry is
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(information) < _COUNTS_AT + _COUNTS.size:
                    raise EvenkeelError("bytes on the wire cannot be counted: that needs Linux 4.19 or newer")
                counts = _COUNTS.unpack_from(information, _COUNTS_AT)
                sent, resent = sent + counts[0], resent + counts[1]
    return SocketBytes(sent, resent)
