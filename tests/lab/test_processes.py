"""Several real processes at a time: output, exit codes, signals, nothing left behind."""

import os
import signal
from pathlib import Path

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.lab.processes import HostExit, Launch, run_all

FOR_EVER = "while :; do sleep 100 & wait; done"


def run(*scripts, write=None, **options):
    lines = []
    launches = [Launch(f"host{rank}", ("sh", "-c", script), dict(os.environ)) for rank, script in enumerate(scripts)]

    def note(host, line, is_error):
        lines.append((host, line, is_error))
        if write is not None:
            write(host, line)

    exits = run_all(launches, note, **options)
    assert [left.host for left in exits] == [launch.host for launch in launches]
    return exits, lines


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_output_comes_line_by_line_from_each():
    exits, lines = run("echo one; echo two; printf half", "echo wrong >&2; printf 'a\\rb\\r\\nc\\n'")
    assert [left.code for left in exits] == [0, 0]
    assert [line for line in lines if line[0] == "host0"] == [
        ("host0", "one", False),
        ("host0", "two", False),
        ("host0", "half", False),
    ]
    assert [line[1:] for line in lines if line[0] == "host1" and line[2]] == [("wrong", True)]
    assert [line[1] for line in lines if line[0] == "host1" and not line[2]] == ["a", "b", "c"]


def test_a_lot_of_output_is_whole():
    _, lines = run("seq 20000")
    assert [line for _, line, _ in lines] == [str(number) for number in range(1, 20001)]


def test_bytes_that_are_no_text_do_not_stop_it():
    _, lines = run("printf '\\377ok\\n'")
    assert lines == [("host0", "\ufffdok", False)]


def test_each_has_its_own_variables_and_processors():
    cpu = min(os.sched_getaffinity(0))
    script = "echo $RANK; grep Cpus_allowed_list /proc/self/status"
    lines = []
    launches = [Launch("a", ("sh", "-c", script), {**os.environ, "RANK": "5"}, cpus=[cpu])]
    run_all(launches, lambda host, line, is_error: lines.append(line))
    assert lines[0] == "5"
    assert lines[1].split() == ["Cpus_allowed_list:", str(cpu)]
    assert os.sched_getaffinity(0) != {cpu} or os.cpu_count() == 1  # ours stay


def once(file):
    """Goes on when the file is there."""
    return f"until [ -e {file} ]; do :; done"


def test_when_one_fails_the_others_are_told_to_stop(tmp_path):
    ready = tmp_path / "ready"
    exits, lines = run(f"{once(ready)}; exit 3", f"trap 'echo bye; exit 7' TERM; touch {ready}; {FOR_EVER}", FOR_EVER)
    assert exits[0].code == 3
    assert not exits[0].stopped
    assert (exits[1].code, exits[1].stopped) == (7, True)
    assert ("host1", "bye", False) in lines
    assert (exits[2].code, exits[2].stopped) == (128 + signal.SIGTERM, True)


def test_who_does_not_listen_is_killed(tmp_path):
    ready = tmp_path / "ready"
    exits, _ = run(f"{once(ready)}; exit 1", f"trap '' TERM; touch {ready}; {FOR_EVER}", grace_s=0.2)
    assert (exits[1].code, exits[1].stopped) == (128 + signal.SIGKILL, True)


def test_the_others_may_go_on(tmp_path):
    file = tmp_path / "pid"
    # The second goes on until the first is there no more, not even as a number.
    second = f"until [ -s {file} ]; do :; done; while kill -0 $(cat {file}) 2>&-; do :; done; echo done"
    exits, lines = run(f"echo $$ >{file}; exit 3", second, keep_going=True)
    assert [left.code for left in exits] == [3, 0]
    assert ("host1", "done", False) in lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(number):
    before = signal.getsignal(number)
    trap = f"trap 'echo heard; exit 5' {number.name.removeprefix('SIG')}; echo ready; {FOR_EVER}"
    ready = set()

    def write(host, line):
        if line == "ready":
            ready.add(host)
            if len(ready) == 2:
                os.kill(os.getpid(), number)

    exits, lines = run(trap, trap, write=write)
    assert [(left.code, left.stopped) for left in exits] == [(5, True), (5, True)]
    assert [line for line in lines if line[1] == "heard"] != []
    assert signal.getsignal(number) is before


def test_a_second_signal_kills():
    def write(host, line):
        if line in ("ready", "heard"):
            os.kill(os.getpid(), signal.SIGTERM)

    exits, _ = run(f"trap 'echo heard' TERM; echo ready; {FOR_EVER}", write=write, grace_s=100)
    assert exits[0].code == 128 + signal.SIGKILL


def test_what_a_process_started_ends_with_it():
    exits, lines = run("sleep 100 & echo $!")
    assert exits[0].code == 0
    assert gone(int(lines[0][1]))


def test_an_error_while_writing_ends_all():
    pids = []

    def write(host, line):
        pids.append(int(line))
        if len(pids) == 2:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run(f"echo $$; {FOR_EVER}", f"echo $$; {FOR_EVER}", write=write)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_program_that_is_not_there():
    with pytest.raises(ConfigurationError, match=r"command: 'no/such' cannot be run"):
        run_all([Launch("a", ("no/such",), {})], lambda *line: None)


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (HostExit("host1", 3, 1.0, False), "host1 ended with exit code 3"),
        (HostExit("host1", 139, 1.0, False), "host1 was killed by SIGSEGV"),
        (HostExit("host1", 143, 1.0, True), "host1 was killed by SIGTERM after a signal to stop"),
        (HostExit("host1", 255, 1.0, False), "host1 ended with exit code 255"),
    ],
)
def test_how_an_end_is_told(left, text):
    assert left.text() == text
