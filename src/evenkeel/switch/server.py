"""Adds in user space: the switch that needs no root, and the parameter server behind a switch in the kernel."""

import ctypes
import socket
import threading
from ctypes import POINTER, byref, c_int, c_uint32, c_uint64, c_void_p
from functools import cache

from evenkeel.errors import ConfigurationError
from evenkeel.switch.aggregator import Rule, SlotPolicy
from evenkeel.switch.build import load
from evenkeel.switch.registrar import Registrar
from evenkeel.switch.table import Table

__all__ = ["DEFAULT_RULE", "SERVER_COUNTERS", "SwitchServer", "typed_server"]

_SLICE_S = 0.1
_RING = 1 << 14
_JOB_BYTES = 128 << 20

# Slots are not scarce here: an eighth of a gigabyte, of which only what is used is there at all.
DEFAULT_RULE = Rule(SlotPolicy.UNLIMITED, sets=1 << 15, regions=1 << 4)

SERVER_COUNTERS = (
    *(
        "packets",
        "results",
        "results_again",
        "nacks",
        "queries",
        "reminders",
        "partials",
        "left_out",
        "late",
        "duplicates",
    ),
    *("injected_in", "injected_out", "old", "ahead", "overlap"),
    *("short", "magic", "version", "kind", "lane_type", "length", "bitmap", "job", "token", "sender", "epoch"),
    "bound",
    *("refusals", "jobs", "bytes_in", "bytes_out"),
)


class SwitchServer:
    """Serves on a socket of its own.

    Args:
        host: address to bind.
        port: 0: any that is free.
        rule: by which a switch in this process adds before the server; None: a switch elsewhere does, or none.
        loss_in: share of the packets that come in to lose on purpose.
        loss_out: the same, of results that go out.
        seed: of these losses.
        job_bytes: most memory of one job; what is over it waits.
        registrar: lets the jobs into the switch in the kernel that adds before the server; then there is no `rule`.

    Raises:
        ConfigurationError: the address cannot be bound, or there is no compiler for the C parts.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        rule: Rule | None = DEFAULT_RULE,
        loss_in: float = 0.0,
        loss_out: float = 0.0,
        seed: int = 0,
        job_bytes: int = _JOB_BYTES,
        registrar: Registrar | None = None,
    ) -> None:
        if rule is not None and registrar is not None:
            raise ConfigurationError("a server has a switch in its own process or in the kernel, not both")
        for name, share in (("loss_in", loss_in), ("loss_out", loss_out)):
            if not 0 <= share < 1:
                raise ConfigurationError(f"{name}: must be a share of at least 0 and below 1, found {share}")
        self._library = _library()
        self._table = None if rule is None else Table(rule)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ConfigurationError(
                f"{host}:{port} cannot be served: {error.strerror}; is another switch there already?"
            ) from error
        self.address: tuple[str, int] = self._socket.getsockname()
        table = None if self._table is None else self._table.address
        losses = seed, _share(loss_in), _share(loss_out)
        self._handle: int | None = self._library.server_open(self._socket.fileno(), table, _RING, job_bytes, *losses)
        if not self._handle:
            raise MemoryError("no room for the server's buffers")
        self._registrar = registrar
        if registrar is not None:
            self._library.server_behind(self._handle, registrar.words, registrar.bytes_only, registrar.callback)

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop` is set."""
        while not stop.is_set():
            self.serve(_SLICE_S)

    def serve(self, slice_s: float) -> None:
        """Serves for so long."""
        if self._registrar is not None and self._registrar.changed():
            self._library.server_enroll_again(self._handle)
        self._library.server_run(self._handle, int(slice_s * 1e9))

    def counters(self) -> dict[str, int]:
        """Counts what came in, what went out, and what was dropped, by reason."""
        count = c_int()
        found = self._library.server_counters(self._handle, byref(count))
        return dict(zip(SERVER_COUNTERS, found[: count.value], strict=True))

    def close(self) -> None:
        """Lets go of the socket and of all jobs."""
        if self._handle is not None:
            self._library.server_close(self._handle)
            self._handle = None
            self._socket.close()


def _share(share: float) -> int:
    return int(share * 2**32)


@cache
def _library() -> ctypes.CDLL:
    return typed_server(load("server"))


def typed_server(library: ctypes.CDLL) -> ctypes.CDLL:
    """Says what the functions of `native/server.c` take and give."""
    library.server_open.restype = c_void_p
    library.server_open.argtypes = c_int, c_void_p, c_uint32, c_uint64, c_uint64, c_uint64, c_uint64
    library.server_close.argtypes = (c_void_p,)
    library.server_behind.argtypes = c_void_p, c_uint32, c_uint32, c_void_p
    library.server_enroll_again.argtypes = (c_void_p,)
    library.server_turn.argtypes = c_void_p, POINTER(c_int)
    library.server_run.argtypes = c_void_p, c_uint64
    library.server_counters.argtypes = c_void_p, POINTER(c_int)
    library.server_counters.restype = POINTER(c_uint64)
    return library
