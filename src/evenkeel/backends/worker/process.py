"""Starts workers as child processes of this one, watches them and starts them again.

Parent and child talk over a socket pair that the child inherits. It has no name, so nobody else can connect, nothing is
left in any folder, and when either end dies the other knows at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply
from evenkeel.backends.worker.config import WorkerConfig, to_arguments
from evenkeel.backends.worker.connection import Connection
from evenkeel.backends.worker.key import KEY_VARIABLE
from evenkeel.backends.worker.links import WorkerLink
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions, WorkerHello
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, EvenkeelError
from evenkeel.models.digest import ModelDigests
from evenkeel.trust.keys import CLIENT_KEYS_VARIABLE

__all__ = ["LastWords", "ProcessBackend"]

_log = logging.getLogger(__name__)
_EXIT_S = 1.0  # for a worker whose connection ended to end by itself
_TAIL_BYTES = 4096
_MAX_SAID = 16 << 10  # bytes of a worker's words that are logged in `_SAID_S`
_SAID_S = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ProcessBackend(Backend):
    """Starts a worker process and restarts it when it is lost, behind a `WorkerBackend`.

    Args:
        name: unique in a gateway.
        config: what the worker serves; `listen` and `parent_pid` are set here.
        models: names that it must hold.
        options: as for `WorkerBackend`.
        digests: as for `WorkerBackend`.
    """

    managed = True

    def __init__(
        self,
        name: str,
        config: WorkerConfig,
        models: Sequence[str] = (),
        options: ClientOptions | None = None,
        digests: ModelDigests | None = None,
    ) -> None:
        self.name = name
        self._link = _ProcessLink(name, config)
        self._worker = WorkerBackend(name, self._link, models, options, digests)
        self._worker.on_change = lambda: self.on_change()

    @property
    def ready(self) -> bool:
        """True while the process runs and takes tasks."""
        return self._worker.ready

    @property
    def pid(self) -> int | None:
        """Gives the id of the worker's process; None while there is none."""
        return self._link.pid

    @property
    def batch(self) -> int:
        """Gives the largest number of rows that a model of the worker takes in one pass, as it last said."""
        return self._worker.batch

    @property
    def hello(self) -> WorkerHello | None:
        """Gives what the worker last said of itself."""
        return self._worker.hello

    @property
    def why_not(self) -> str:
        """Says why the worker is not ready, if it was ever lost."""
        return self._worker.why_not

    @property
    def last_error(self) -> EvenkeelError | None:
        """Says why the worker was last lost; None if it never was."""
        return self._worker.last_error

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends one task; see `Backend.submit`."""
        return self._worker.submit(model, inputs, on_reply, key)

    def cancel(self, ticket: int) -> None:
        """Gives the task up; see `Backend.cancel`."""
        self._worker.cancel(ticket)

    def suspect(self) -> None:
        """Starts the process again soon if it does not answer pings; see `ClientOptions`."""
        self._worker.suspect()

    async def start(self) -> None:
        """Starts the process; returns when it has loaded its models. Errors as `WorkerBackend.start`."""
        await self._worker.start()

    async def close(self) -> None:
        """Ends the process, by force if it does not end by itself; open tickets get a BackendLostError."""
        await self._worker.close()


class LastWords(asyncio.Protocol):
    """Keeps the last words of a process. What it writes goes to the log, as far as that is not too much.

    Args:
        who: the process, for the log.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._chunks: deque[bytes] = deque()
        self._room = _MAX_SAID
        self._renew: asyncio.TimerHandle | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Keeps what the process wrote, and logs it."""
        self._room -= len(data)
        if self._room >= 0:
            _log.warning("%s says: %s", self._who, data.decode("utf-8", "replace").strip())
        elif self._renew is None:
            _log.warning("%s says more than %d bytes in %g s; the rest is left out", self._who, _MAX_SAID, _SAID_S)
            self._renew = asyncio.get_running_loop().call_later(_SAID_S, self._listen)
        self._chunks.append(data)
        while sum(map(len, self._chunks)) - len(self._chunks[0]) >= _TAIL_BYTES:
            self._chunks.popleft()

    def _listen(self) -> None:
        self._room, self._renew = _MAX_SAID, None

    def connection_lost(self, exc: Exception | None) -> None:
        """Notes that the process has closed its output."""
        if self._renew is not None:
            self._renew.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def text(self) -> str:
        """Gives the last words."""
        return b"".join(self._chunks)[-_TAIL_BYTES:].decode("utf-8", "replace").strip()


# Nobody else connects to these workers, and what they run need not see them.
_OUR_KEYS = frozenset({KEY_VARIABLE, CLIENT_KEYS_VARIABLE})


class _ProcessLink(WorkerLink):
    """Starts a process for each connection, and ends it with the connection."""

    def __init__(self, name: str, config: WorkerConfig) -> None:
        self._name, self._config = name, config
        self._process: subprocess.Popen[bytes] | None = None
        self._output: asyncio.BaseTransport | None = None
        self._tail: LastWords | None = None
        self.where = f"process {name!r}"
        self.ours = True

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def open(self, make: Callable[[], Connection]) -> None:
        await self._end(0.0)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        try:
            ours.setblocking(False)
            config = replace(self._config, listen=f"fd:{theirs.fileno()}", parent_pid=os.getpid())
            threads = {name: str(config.threads) for name in _THREAD_VARIABLES}
            # -P: a file beside the user's must not be taken for a module of ours. A session of its own: Ctrl-C in a
            # terminal is for the parent alone, which first finishes what it accepted.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "evenkeel.backends.worker.main", *to_arguments(config)],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**threads, **{name: value for name, value in os.environ.items() if name not in _OUR_KEYS}},
            )
        except OSError as error:
            ours.close()
            os.close(read_end)
            raise BackendLostError(f"worker {self._name!r} cannot be started: {error}") from error
        finally:
            theirs.close()
            os.close(write_end)
        try:
            pipe = os.fdopen(read_end, "rb", buffering=0)
            self._output, self._tail = await loop.connect_read_pipe(lambda: LastWords(f"worker {self._name}"), pipe)
            await loop.create_unix_connection(make, sock=ours)
        except BaseException:
            ours.close()
            raise

    async def ended(self, error: EvenkeelError, greeted: bool) -> EvenkeelError:
        code = await self._end(_EXIT_S)
        words = "" if self._tail is None else self._tail.text()
        if code is None or not isinstance(error, BackendLostError):
            return error
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = f"; its last words: {words}" if words else ""
        if greeted:
            return BackendLostError(f"worker {self._name!r} ended with {ending}{said}")
        if code == 2:
            return ConfigurationError(f"worker {self._name!r} cannot start: {words or 'no reason given'}")
        return BackendError(f"worker {self._name!r} ended with {ending} before it was ready{said}")

    async def close(self) -> None:
        await self._end(_EXIT_S)

    async def _end(self, patience_s: float) -> int | None:
        """Waits for the process to end, and kills it after `patience_s`; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            code = await loop.run_in_executor(None, _wait, process, patience_s)
        except asyncio.CancelledError:
            process.kill()
            process.wait()
            raise
        if self._tail is not None:
            with contextlib.suppress(TimeoutError):  # a grandchild may hold the pipe open
                async with asyncio.timeout(_EXIT_S):
                    await self._tail.closed
        if self._output is not None:
            self._output.close()
            self._output = None
        return code


def _wait(process: subprocess.Popen[bytes], patience_s: float) -> int:
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
