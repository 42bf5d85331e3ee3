"""Makes real faults for tests and benchmarks: a process frozen, a process killed, cores kept busy.

Only processes whose ids are handed in, and helpers started here, are ever touched.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.text_values import read_count, read_duration_s, split_spec, unknown

__all__ = ["CpuHog", "Fault", "freeze", "kill", "parse_fault", "thaw"]

_LONGEST_S = 3600.0
_MAX_CORES = 256
# A helper ends at its own deadline, or as soon as its parent is gone (then it has another parent).
_SPIN = """
import os, sys, time
ends_s, parent = time.monotonic() + float(sys.argv[1]), int(sys.argv[2])
while time.monotonic() < ends_s and os.getppid() == parent:
    for _ in range(20000):
        pass
"""


@dataclass(frozen=True)
class Fault:
    """Describes one fault of a scenario: what happens to which worker (or to the machine), and when.

    A freeze ends after `for_s`, and so does a hog. A kill has no end (`for_s` is 0): whoever started the worker may
    start it again.
    """

    kind: Literal["freeze", "kill", "hog"]
    target: Literal["replica", "backup", "machine"]
    number: int  # of the replica or backup, from 0; for the machine, how many cores are kept busy
    at_s: float  # since the experiment began
    for_s: float = 0.0

    def describe(self) -> str:
        """Writes the text from which `parse_fault` makes this fault."""
        target = "cores" if self.target == "machine" else self.target
        lasts = f",for={self.for_s}s" if self.for_s else ""
        return f"{self.kind}:{target}={self.number},at={self.at_s}s{lasts}"


class CpuHog:
    """Keeps `cores` cores busy for `seconds`, from entering the `with` block until leaving it at the latest.

    The helper processes end by themselves at their time, and soon after their parent is gone, however it went.

    Raises:
        ConfigurationError: cores or seconds out of bounds.
        EvenkeelError: a helper could not be started.
    """

    def __init__(self, cores: int, seconds: float) -> None:
        if not 1 <= cores <= _MAX_CORES:
            raise ConfigurationError(f"a CPU hog needs 1 to {_MAX_CORES} cores, found {cores}")
        if not 0 < seconds <= _LONGEST_S:
            raise ConfigurationError(f"a CPU hog lasts up to {_LONGEST_S:.0f} s, found {seconds}")
        self._cores, self._seconds = cores, seconds
        self._helpers: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """Gives the ids of the helper processes."""
        return tuple(helper.pid for helper in self._helpers)

    def __enter__(self) -> "CpuHog":
        command = [sys.executable, "-I", "-S", "-c", _SPIN, str(self._seconds), str(os.getpid())]
        try:
            for _ in range(self._cores):
                self._helpers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        except OSError as error:
            self.stop()
            raise EvenkeelError(f"a CPU hog could not be started: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the helpers now, and waits until they are gone."""
        for helper in self._helpers:
            helper.kill()
        for helper in self._helpers:
            helper.wait()
        self._helpers.clear()


def freeze(pid: int) -> bool:
    """Stops the process (SIGSTOP): it keeps its connections and answers nothing. False if it is gone already."""
    return _signal(pid, signal.SIGSTOP)


def thaw(pid: int) -> bool:
    """Lets a frozen process go on (SIGCONT). False if it is gone."""
    return _signal(pid, signal.SIGCONT)


def kill(pid: int) -> bool:
    """Ends the process at once (SIGKILL), without a chance to tidy up. False if it is gone already."""
    return _signal(pid, signal.SIGKILL)


def parse_fault(text: str) -> Fault:
    """Reads the fault that a short text names.

    `freeze:replica=3,at=5s,for=2s`, `kill:backup=0,at=3s`, `hog:cores=2,at=2s,for=3s`; workers count from 0.

    Raises:
        ConfigurationError: names the field that is wrong or missing, and what is allowed.
    """
    name, given = split_spec(text, "fault")
    if name not in _READERS:
        raise unknown("fault", name, list(_READERS))
    return _READERS[name](text, given)


def _read_freeze(text: str, given: dict[str, str]) -> Fault:
    target, number = _worker(text, given, ("at", "for"))
    return Fault("freeze", target, number, _at_s(text, given), _for_s(text, given))


def _read_kill(text: str, given: dict[str, str]) -> Fault:
    target, number = _worker(text, given, ("at",))
    return Fault("kill", target, number, _at_s(text, given))


def _read_hog(text: str, given: dict[str, str]) -> Fault:
    _refuse_others(text, given, ("cores", "at", "for"))
    cores = read_count(_field(text, given, "cores"), f"fault {text!r}: field 'cores'")
    if not 1 <= cores <= _MAX_CORES:
        raise ConfigurationError(f"fault {text!r}: field 'cores' must be from 1 to {_MAX_CORES}, found {cores}")
    return Fault("hog", "machine", cores, _at_s(text, given), _for_s(text, given))


_READERS: dict[str, Callable[[str, dict[str, str]], Fault]] = {
    "freeze": _read_freeze,
    "kill": _read_kill,
    "hog": _read_hog,
}


def _worker(text: str, given: dict[str, str], others: tuple[str, ...]) -> tuple[Literal["replica", "backup"], int]:
    _refuse_others(text, given, ("replica", "backup", *others))
    if ("replica" in given) == ("backup" in given):
        raise ConfigurationError(f"fault {text!r}: give either 'replica' or 'backup', with its number from 0")
    target: Literal["replica", "backup"] = "replica" if "replica" in given else "backup"
    number = read_count(given[target], f"fault {text!r}: field {target!r}")
    if number < 0:
        raise ConfigurationError(f"fault {text!r}: field {target!r} must not be negative")
    return target, number


def _at_s(text: str, given: dict[str, str]) -> float:
    at_s = read_duration_s(_field(text, given, "at"), f"fault {text!r}: field 'at'")
    if at_s < 0:
        raise ConfigurationError(f"fault {text!r}: field 'at' must not be negative")
    return at_s


def _for_s(text: str, given: dict[str, str]) -> float:
    for_s = read_duration_s(_field(text, given, "for"), f"fault {text!r}: field 'for'")
    if not 0 < for_s <= _LONGEST_S:
        raise ConfigurationError(f"fault {text!r}: field 'for' must be above zero and at most {_LONGEST_S:.0f} s")
    return for_s


def _field(text: str, given: dict[str, str], word: str) -> str:
    if word not in given:
        raise ConfigurationError(f"fault {text!r}: field {word!r} is missing")
    return given[word]


def _refuse_others(text: str, given: dict[str, str], allowed: tuple[str, ...]) -> None:
    for word in given:
        if word not in allowed:
            raise unknown(f"fault {text!r}: field", word, allowed)


def _signal(pid: int, number: signal.Signals) -> bool:
    # 0 and negative numbers mean whole groups of processes, 1 is the machine's own: none of them is ever meant.
    if pid <= 1 or pid == os.getpid():
        raise EvenkeelError(f"a fault needs the id of one other process, found {pid}")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise EvenkeelError(f"process {pid} belongs to someone else, so no fault can be made in it") from error
    return True
