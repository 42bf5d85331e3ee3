"""A server that adds packets, for tests: one for each process that needs one, in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evenkeel.switch.server import SwitchServer

_address: str | None = None
_lock = threading.Lock()


def server_address() -> str:
    """The address of a server that lives as long as this process."""
    global _address
    with _lock:  # ranks are threads
        if _address is None:
            server = SwitchServer()
            threading.Thread(target=server.run, args=(threading.Event(),), daemon=True).start()
            _address = "{}:{}".format(*server.address)
        return _address


def use_server(address: str) -> None:
    """Has this process use another process's server."""
    global _address
    _address = address


@contextmanager
def serving(**options: Any) -> Iterator[SwitchServer]:
    """A server of its own, gone on leaving."""
    server, stop = SwitchServer(**options), threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join()
        server.close()
