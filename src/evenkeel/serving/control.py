"""Finds the control sockets of the servers of this user, and asks there for changes.

A server listens at `PID.sock` in a folder that is only this user's. Whoever may connect there may manage the server:
no port, no key, nothing that a web page or another machine could reach.
"""

import http.client
import json
import os
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from evenkeel.errors import BackendLostError, ConfigurationError, EvenkeelError

__all__ = ["ask", "find_socket", "own_socket"]

_TIMEOUT_S = 600.0  # a reload loads models and lets the old ones finish


def _folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "evenkeel"
    return Path(tempfile.gettempdir()) / f"evenkeel-{os.geteuid()}"


def _check_private(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise ConfigurationError(f"{folder} must be a folder of this user alone (mode 700); remove it")


def own_socket() -> Path:
    """Gives the path at which this process listens to those who manage it; makes the folder.

    Raises:
        ConfigurationError: the folder cannot be made, or is not this user's alone.
    """
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be used: {error.strerror or error}") from error
    for left in folder.glob("*.sock"):  # by servers that were killed
        if not _is_alive(left.stem):
            left.unlink(missing_ok=True)
    return folder / f"{os.getpid()}.sock"


def find_socket(pid: int | None = None) -> Path:
    """Gives the control socket of the server with that process id, or of the only one of this user.

    Raises:
        ConfigurationError: there is none, or there are several.
    """
    folder = _folder()
    with suppress(FileNotFoundError):
        _check_private(folder)
    here = [path for path in sorted(folder.glob("*.sock")) if _is_alive(path.stem)]
    if pid is not None:
        here = [path for path in here if path.stem == str(pid)]
    if not here:
        whose = "with this process id" if pid is not None else "of this user"
        raise ConfigurationError(f"no server {whose} runs on this machine, or it has no control socket in {folder}")
    if len(here) > 1:
        raise ConfigurationError(f"several servers run; say which: --pid {' or '.join(path.stem for path in here)}")
    return here[0]


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, target: str, fields: dict[str, Any] | None = None) -> Any:
    """Asks the server at a control socket for something; gives its answer.

    Raises:
        BackendLostError: it does not answer.
        EvenkeelError: it refuses, in its own words.
    """
    connection = _UnixConnection(path)
    try:
        connection.request(method, target, json.dumps(fields) if fields else None)
        response = connection.getresponse()
        body = response.read()
        found = json.loads(body) if body else {}
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BackendLostError(f"the server at {path} does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise EvenkeelError(str(found.get("error", f"HTTP status {response.status}")))
    return found
