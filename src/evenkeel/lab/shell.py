"""Runs `ip` and `tc`, and says plainly why they cannot be run."""

import os
import shutil
import signal
import subprocess
import time

from evenkeel.errors import ConfigurationError, LabError

__all__ = ["namespaces", "remove", "require", "run"]

_TIMEOUT_S = 20.0
_END_S = 5.0  # for processes to be gone after they were killed


def require() -> None:
    """Refuses where no lab can be made.

    Raises:
        ConfigurationError: not Linux, not root, or iproute2 is missing.
    """
    if os.uname().sysname != "Linux":
        raise ConfigurationError(f"the lab needs Linux's network namespaces; this is {os.uname().sysname}")
    if os.geteuid() != 0:
        raise ConfigurationError("the lab needs root, to make network namespaces; run it with sudo")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise ConfigurationError(
            f"the lab needs iproute2, and {' and '.join(missing)} cannot be found; run: apt-get install iproute2"
        )


def run(command: tuple[str, ...]) -> str:
    """Runs a command and gives what it printed.

    Raises:
        ConfigurationError: this machine does not let it, or its kernel has no such thing.
        LabError: it failed otherwise.
    """
    try:
        # In a session of its own: Ctrl-C is for us to handle, not for a command half way through.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"`{' '.join(command)}` did not end within {_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise LabError(f"`{' '.join(command)}` cannot be run: {error.strerror}") from error
    if done.returncode == 0:
        return done.stdout
    said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    if "netem" in command and "qdisc kind is unknown" in said:
        raise ConfigurationError(
            "this kernel has no netem, which adds delay and loss (modprobe sch_netem); leave --delay and --loss out"
        )
    if "not permitted" in said:
        raise ConfigurationError(
            f"`{' '.join(command)}`: {said}. In a container the lab needs CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    raise LabError(f"`{' '.join(command)}` failed: {said}")


def namespaces() -> list[str]:
    """Names all network namespaces."""
    return [line.split()[0] for line in run(("ip", "netns", "list")).splitlines() if line.strip()]


def remove(names: list[str]) -> list[str]:
    """Kills every process in these network namespaces and removes those; gives what went wrong, and goes on."""
    problems = {}
    for name in names:
        try:
            _empty(name)
            run(("ip", "netns", "delete", name))
        except (LabError, ConfigurationError) as error:
            problems[name] = str(error)
    left = set(namespaces()) if problems else set()
    return [problem for name, problem in problems.items() if name in left]  # another may have been faster


def _empty(name: str) -> None:
    give_up = time.monotonic() + _END_S
    while pids := [int(word) for word in run(("ip", "netns", "pids", name)).split()]:
        if time.monotonic() > give_up:
            raise LabError(f"processes {pids} in {name} do not end")
        for pid in pids:
            if pid == os.getpid():
                raise LabError(f"this process runs in {name} itself")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
