"""Runs one command for each host: output line by line, exit codes, signals passed on, nothing left behind.

Knows nothing of networks: a command line that begins with `ip netns exec` runs in a host, any other one here.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

from evenkeel.errors import ConfigurationError, LabError
from evenkeel.processes import end_with_parent

__all__ = ["HostExit", "Launch", "run_all"]

_POLL_S = 0.1
_LAST_WORDS_S = 1.0  # for output of a process that ended, while somebody else holds its pipe open
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Launch:
    """Describes one host's process, to be started."""

    host: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cpus: Sequence[int] = ()  # none: any


@dataclass(frozen=True)
class HostExit:
    """Says how one host's process ended."""

    host: str
    code: int  # as a shell has it: 0 done, 128 + n killed by signal n
    seconds: float
    stopped: bool  # we ended it, since another host had failed or on a signal

    def text(self) -> str:
        """Says it as in `host2 was killed by SIGSEGV`."""
        if self.code > 128 and self.code - 128 in set(signal.Signals):
            how = f"was killed by {signal.Signals(self.code - 128).name}"
        else:
            how = f"ended with exit code {self.code}"
        return f"{self.host} {how}" + (" after a signal to stop" if self.stopped else "")


def run_all(
    launches: Sequence[Launch],
    write: Callable[[str, str, bool], None],
    *,
    keep_going: bool = False,
    grace_s: float = 10.0,
) -> list[HostExit]:
    """Runs them at the same time until all have ended, and says how, in the order of `launches`.

    Called in the main thread, SIGINT, SIGTERM and SIGHUP are passed on to all, once; whatever still runs `grace_s`
    later, or at a second signal, is killed. Each command has a process group, which ends with it.

    Args:
        launches: one for each host.
        write: is given the host's name, a line without its end, and whether it came from the error output.
        keep_going: False: when one fails, the others are ended too, since they would wait for it.
        grace_s: from the request to stop until the kill.

    Raises:
        ConfigurationError: the command cannot be run at all.
    """
    group = _HostProcesses(write, keep_going, grace_s)
    with _signals(group.interrupt):
        try:
            for launch in launches:
                group.start(launch)
            group.wait()
        finally:
            group.kill()
    return [running.result() for running in group.all]


class _Running:
    """Holds a started process, and the halves of lines that it wrote."""

    def __init__(self, launch: Launch) -> None:
        parent = os.getpid()

        def prepare() -> None:
            # Between fork and exec: a process of ours must not outlive us, even if we are killed outright.
            end_with_parent(parent)
            if launch.cpus:
                os.sched_setaffinity(0, launch.cpus)

        self.host = launch.host
        self.stopped = False
        self.code: int | None = None
        self.began = self.ended = time.monotonic()
        try:
            self.process = subprocess.Popen(
                launch.command,
                env=dict(launch.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=prepare,
            )
        except OSError as error:
            raise ConfigurationError(f"command: {launch.command[0]!r} cannot be run: {error.strerror}") from error

    @property
    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return self.process.stdout, self.process.stderr

    def signal(self, number: int) -> None:
        """Signals the whole group, if it is still there: a group's number is not used again before its end was read."""
        if self.code is None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return

    def look(self) -> bool:
        """True once it has ended; then its group is killed, and only after that its number given back."""
        if self.code is None and os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.signal(signal.SIGKILL)
            returned = self.process.wait()
            self.code = 128 - returned if returned < 0 else returned
            self.ended = time.monotonic()
        return self.code is not None

    def result(self) -> HostExit:
        if self.code is None:
            raise LabError(f"{self.host} did not end, although it was killed")
        return HostExit(self.host, self.code, self.ended - self.began, self.stopped)


class _HostProcesses:
    """Holds all processes that run on the hosts."""

    def __init__(self, write: Callable[[str, str, bool], None], keep_going: bool, grace_s: float) -> None:
        self.all: list[_Running] = []
        self._write = write
        self._keep_going = keep_going
        self._grace_s = grace_s
        self._selector = selectors.DefaultSelector()
        self._halves: dict[IO[bytes], bytes] = {}
        self._signals: list[int] = []
        self._kill_at: float | None = None

    def start(self, launch: Launch) -> None:
        running = _Running(launch)
        self.all.append(running)
        for pipe, is_error in zip(running.pipes, (False, True), strict=True):
            os.set_blocking(pipe.fileno(), False)
            self._halves[pipe] = b""
            self._selector.register(pipe, selectors.EVENT_READ, (running, is_error))

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal, and no more: it may have come in the middle of anything."""
        self._signals.append(number)

    def wait(self) -> None:
        """Waits until all have ended and their output is read."""
        while not self._all_ended() or (self._halves and not self._silent()):
            self._read(_POLL_S)
            if self._signals and self._kill_at is None:
                self._stop(self._signals[0])
            elif not self._keep_going and self._kill_at is None and any(running.code for running in self.all):
                self._stop(signal.SIGTERM)
            if len(self._signals) > 1 or (self._kill_at is not None and time.monotonic() >= self._kill_at):
                for running in self.all:
                    running.signal(signal.SIGKILL)

    def kill(self) -> None:
        """Ends whatever is left, and reads its last words."""
        for running in self.all:
            running.signal(signal.SIGKILL)
        give_up = time.monotonic() + _LAST_WORDS_S
        while not self._all_ended() and time.monotonic() < give_up:
            time.sleep(0.005)
        self._read(0)
        for pipe in list(self._halves):
            self._end(pipe)
        self._selector.close()

    def _all_ended(self) -> bool:
        return not [running for running in self.all if not running.look()]  # every one is looked at

    def _silent(self) -> bool:
        """True once all ended so long ago that nothing of theirs can still come."""
        return time.monotonic() > max((running.ended for running in self.all), default=0.0) + _LAST_WORDS_S

    def _stop(self, number: int) -> None:
        self._kill_at = time.monotonic() + self._grace_s
        for running in self.all:
            if not running.look():
                running.stopped = True
                running.signal(number)

    def _read(self, timeout_s: float) -> None:
        if not self._halves:
            time.sleep(min(timeout_s, 0.01))
            return
        for key, _ in self._selector.select(timeout_s):
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
            try:
                data = os.read(pipe.fileno(), 65_536)
            except BlockingIOError:
                continue
            if not data:
                self._end(pipe)
                continue
            # A progress bar ends its lines with a carriage return.
            text = (self._halves[pipe] + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            *lines, self._halves[pipe] = text.split(b"\n")
            for line in lines:
                self._line(pipe, line)

    def _end(self, pipe: IO[bytes]) -> None:
        half = self._halves.pop(pipe)
        if half:
            self._line(pipe, half)
        self._selector.unregister(pipe)
        pipe.close()

    def _line(self, pipe: IO[bytes], line: bytes) -> None:
        running, is_error = self._selector.get_key(pipe).data
        self._write(running.host, line.decode(errors="replace"), is_error)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to `handler` meanwhile; outside the main thread, where Python allows none, they stay as they are."""
    before = {}
    try:
        for number in _PASSED_ON:
            try:
                before[number] = signal.signal(number, handler)
            except ValueError:
                break
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
