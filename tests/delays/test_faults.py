import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evenkeel.delays.faults import CpuHog, Fault, freeze, kill, parse_fault, thaw
from evenkeel.errors import ConfigurationError, EvenkeelError


def state_of(pid: int) -> str:
    """The letter that the kernel gives a process: R running, S sleeping, T stopped, Z ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid: int) -> bool:
    try:
        return state_of(pid) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition, limit_s: float = 20.0) -> bool:
    ends_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > ends_s:
            return False
        os.sched_yield()
    return True


@pytest.fixture
def echo():
    """A process that answers each line; waits for input, so it ends with its pipe at the latest."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_frozen_process_goes_on_where_it_was(echo):
    assert freeze(echo.pid)
    assert until(lambda: state_of(echo.pid) == "T")
    echo.stdin.write(b"hello\n")
    echo.stdin.flush()
    assert state_of(echo.pid) == "T", "input does not wake it"
    assert thaw(echo.pid)
    assert echo.stdout.readline() == b"hello\n"


def test_a_killed_process_ends_at_once(echo):
    assert kill(echo.pid)
    assert echo.wait(20) == -signal.SIGKILL
    assert not kill(echo.pid), "it is gone"
    assert not freeze(echo.pid)
    assert not thaw(echo.pid)


@pytest.mark.parametrize("pid", [0, -1, 1, -12345, pytest.param(os.getpid(), id="itself")])
@pytest.mark.parametrize("fault", [freeze, thaw, kill])
def test_a_fault_never_touches_groups_or_itself(fault, pid, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    with pytest.raises(EvenkeelError, match="id of one other process"):
        fault(pid)


def test_a_hog_keeps_cores_busy_and_ends_with_its_block():
    with CpuHog(cores=2, seconds=60.0) as hog:
        pids = hog.pids
        assert len(pids) == 2
        for pid in pids:  # clock ticks of user time only grow while it spins
            assert until(lambda pid=pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) > 2)
    assert all(gone(pid) for pid in pids)
    assert hog.pids == ()


def test_a_hog_ends_by_itself():
    with CpuHog(cores=1, seconds=0.01) as hog:
        (pid,) = hog.pids
        assert until(lambda: gone(pid))


def test_a_hog_does_not_outlive_its_parent():
    code = (
        "from evenkeel.delays.faults import CpuHog; import sys\n"
        "hog = CpuHog(1, 600.0).__enter__()\n"
        "print(hog.pids[0], flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    assert until(lambda: gone(pid))


@pytest.mark.parametrize(("cores", "seconds"), [(0, 1.0), (257, 1.0), (1, 0.0), (1, 1e9), (1, float("nan"))])
def test_a_hog_has_bounds(cores, seconds):
    with pytest.raises(ConfigurationError, match="a CPU hog"):
        CpuHog(cores, seconds)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("freeze:replica=3,at=5s,for=2s", Fault("freeze", "replica", 3, 5.0, 2.0)),
        ("freeze:backup=0,at=0,for=200ms", Fault("freeze", "backup", 0, 0.0, 0.2)),
        ("kill:replica=1,at=3s", Fault("kill", "replica", 1, 3.0)),
        ("hog:cores=2,at=2s,for=3s", Fault("hog", "machine", 2, 2.0, 3.0)),
    ],
)
def test_a_text_names_a_fault(text, fault):
    assert parse_fault(text) == fault
    assert parse_fault(fault.describe()) == fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("melt:replica=1,at=1", "fault 'melt' is unknown; allowed are freeze, kill, hog"),
        ("freeze:replica=1,at=1", "field 'for' is missing"),
        ("freeze:at=1,for=1", "either 'replica' or 'backup'"),
        ("freeze:replica=1,backup=1,at=1,for=1", "either 'replica' or 'backup'"),
        ("kill:replica=1", "field 'at' is missing"),
        ("kill:replica=1,at=1,for=2", "field 'for' is unknown; allowed are replica, backup, at"),
        ("kill:replica=-1,at=1", "field 'replica' must not be negative"),
        ("kill:replica=one,at=1", "field 'replica' must be a whole number"),
        ("kill:replica=1,at=-1", "field 'at' must not be negative"),
        ("kill:replica=1,at=soon", "must be a time such as"),
        ("freeze:replica=1,at=1,for=0", "field 'for' must be above zero"),
        ("hog:cores=0,at=1,for=1", "field 'cores' must be from 1"),
        ("hog:replica=0,at=1,for=1", "field 'replica' is unknown; allowed are cores, at, for"),
    ],
)
def test_a_wrong_text_is_refused_with_the_field(text, message):
    with pytest.raises(ConfigurationError) as caught:
        parse_fault(text)
    assert message in str(caught.value)
