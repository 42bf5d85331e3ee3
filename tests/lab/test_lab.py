"""A real lab, once: hosts that reach each other at the wanted rate, and nothing left of it however it ends."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel.errors import ConfigurationError, EvenkeelError, LabError
from evenkeel.lab import shell
from evenkeel.lab.cluster import Lab, clean
from evenkeel.lab.owner import owner_of
from evenkeel.lab.topology import Topology


def why_not():
    """Why no lab can be made here; empty if one can."""
    name = f"evenkeel-test-{os.getpid()}"
    try:
        shell.require()
        shell.run(("ip", "netns", "add", name))
        shell.run(("ip", "netns", "delete", name))
    except EvenkeelError as error:
        return str(error)
    return ""


WHY_NOT = why_not()
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

TALK = """
import os, socket
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
with socket.create_server(address) if rank == 0 else socket.socket() as end:
    end.settimeout(20)
    if rank == 0:
        peer, (host, _) = end.accept()
        print("heard", peer.recv(99).decode(), "from", host)
        peer.close()
    else:
        while end.connect_ex(address):
            end.close()
            end = socket.socket()
        end.sendall(f"rank {rank} of {size}".encode())
print(*(name for _, name in socket.if_nameindex()), os.environ["GLOO_SOCKET_IFNAME"])
"""


def namespaces_of(pid):
    return [name for name in shell.namespaces() if (owner := owner_of(name)) is not None and owner.pid == pid]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "evenkeel", "lab", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started_pids(process, hosts):
    """What each host printed first; `echo $$` makes it the number of its process."""
    return [int(process.stdout.readline().split("|")[1]) for _ in range(hosts)]


def wait_until_gone(pid):
    """The processes are not our children; a pidfd becomes readable when one ends."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor):
        assert select.select([descriptor], [], [], 20)[0], f"process {pid} goes on"


def test_two_hosts(tmp_path):
    out = tmp_path / "lab.json"
    process = start("--hosts", "2", "--rate", "50mbit", "--json", str(out), "--", sys.executable, "-c", TALK)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert sorted(stdout.splitlines()) == [
        "host0 | heard rank 1 of 2 from 10.77.0.2",
        "host0 | lo eth0 eth0",
        "host1 | lo eth0 eth0",
    ]
    assert "50 Mbit/s links carry" in stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["host"], row["rank"], row["code"]) for row in rows] == [("host0", 0, 0), ("host1", 1, 0)]
    # Never more than was asked for; how much less depends on what else this machine does.
    for way in ("there_bps", "back_bps"):
        assert 10e6 < rows[0][way] < 51e6
    assert namespaces_of(process.pid) == []


def test_a_host_that_fails_is_named():
    process = start("--hosts", "2", "--no-check", "--", "sh", "-c", "[ $RANK = 0 ] || exit 3; sleep 100")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "lab: host1 ended with exit code 3" in stderr
    assert "lab: host0 was killed by SIGTERM after a signal to stop" in stderr
    assert namespaces_of(process.pid) == []


def test_processes_that_hide_from_their_group_are_ended_too():
    hide = "echo $(setsid sh -c 'echo $$; exec sleep 100 >&- 2>&-' &)"  # goes on once the other has a group of its own
    lines = []
    with Lab(Topology(1)) as lab:
        lab.run(["sh", "-c", hide], lambda host, line, is_error: lines.append(line))
        (pid,) = map(int, lines)
        assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    wait_until_gone(pid)


def test_a_stopped_lab_is_removed():
    process = start("--hosts", "2", "--no-check", "--", "sh", "-c", "echo $$; exec sleep 100")
    pids = started_pids(process, 2)
    assert len(namespaces_of(process.pid)) == 3
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "host0 was killed by SIGTERM after a signal to stop" in stderr
    assert namespaces_of(process.pid) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_crashed_lab_is_cleaned_and_one_in_use_is_not():
    process = start("--hosts", "2", "--no-check", "--", "sh", "-c", "echo $$; exec sleep 100")
    try:
        pids = started_pids(process, 2)
        left = namespaces_of(process.pid)
        assert len(left) == 3
        assert not set(clean()) & set(left)
        assert namespaces_of(process.pid) == left
    finally:
        process.kill()
        process.communicate(timeout=30)
    for pid in pids:  # they end with it, although nobody told them
        wait_until_gone(pid)
    assert namespaces_of(process.pid) == left
    assert set(left) <= set(clean())
    assert namespaces_of(process.pid) == []


class Broken(Topology):
    """One whose last command fails."""

    def setup(self, label):
        return [*super().setup(label), ("ip", "link", "set", "no-such-interface", "up")]


def test_a_lab_that_cannot_be_made_leaves_nothing():
    before = namespaces_of(os.getpid())
    with pytest.raises(LabError, match="no-such-interface"):
        Lab(Broken(2)).__enter__()
    assert namespaces_of(os.getpid()) == before == []


def test_delay_where_the_kernel_has_it():
    refused = ""
    try:
        with Lab(Topology(2, 1e9, delay_s=0.01)) as lab:
            assert lab.check_rate().round_trip_s >= 0.02
    except ConfigurationError as error:
        refused = str(error)
    assert not refused or ("this kernel has no netem" in refused and "leave --delay and --loss out" in refused)
    assert namespaces_of(os.getpid()) == []
