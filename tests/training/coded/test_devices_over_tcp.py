"""Devices as real processes: they leave, come back and join, the coordinator too, and the gradient stays exact."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from coded_helpers import CodedData, code_named, coded_data
from evenkeel.backends.worker.address import parse_address
from evenkeel.errors import ConfigurationError, EvenkeelError, ProtocolError
from evenkeel.training.coded.coordinator import CodedSettings, Coordinator
from evenkeel.training.coded.losses import Logistic
from evenkeel.training.coded.messages import DeviceMessage, encode
from evenkeel.training.coded.sockets import call
from evenkeel.training.coded.tcp_link import TcpDevices
from evenkeel.training.coded.training import TrainingPlan, train

KEY = b"a key of the tests, long enough"


class Processes:
    """Device processes, all ended at the end."""

    def __init__(self, data: CodedData, folder: Path) -> None:
        self.folder, self.address = folder, ""
        self.running: dict[str, subprocess.Popen[str]] = {}
        for place, (table, labels) in enumerate(zip(data.tables, data.labels, strict=True)):
            np.savez(folder / f"dev{place}.npz", X=table, y=labels)

    def start(self, name: str, *more: str, data: bool = True, key: bytes = KEY) -> subprocess.Popen[str]:
        own = ["--data", str(self.folder / f"{name}.npz")] if data else []
        self.running[name] = subprocess.Popen(
            [
                *(sys.executable, "-m", "evenkeel.training.coded.device_process", "--coordinator", self.address),
                *("--name", name, "--store", str(self.folder / f"store-{name}"), "--parent-pid", str(os.getpid())),
                *own,
                *more,
            ],
            env={**os.environ, "EVENKEEL_DEVICE_KEY": key.decode()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.running[name]

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.communicate()


@contextmanager
def processes(data: CodedData, folder: Path) -> Iterator[Processes]:
    made = Processes(data, folder)
    try:
        yield made
    finally:
        for name in list(made.running):
            made.kill(name)


def wait_for(coordinator: Coordinator, names: set[str]) -> None:
    coordinator._wait_until(lambda: names <= set(coordinator.present), 30.0, lambda: f"{names} did not come")


def check(found, data: CodedData, weights) -> None:
    value, gradient = data.sums(weights, Logistic())
    assert np.abs(found.gradient - gradient).max() <= 1e-9 * np.abs(gradient).max()
    assert found.value == pytest.approx(value, rel=1e-9)


def test_processes_leave_come_back_and_join_and_the_coordinator_restarts(tmp_path: Path) -> None:
    data = coded_data(4)
    first = CodedData(data.tables[:3], data.labels[:3])
    weights = np.linspace(-1, 1, 5)
    settings = CodedSettings(wait_s=30.0, least_wait_s=1.0)
    with processes(data, tmp_path) as devices:
        link = TcpDevices(key=KEY)
        devices.address = link.address
        for name in ("dev0", "dev1", "dev2"):
            devices.start(name)
        coordinator = Coordinator(link, code_named("balanced:copies=1"), settings, tmp_path / "memory")
        coordinator.set_up(3)
        assert coordinator.setup_bytes >= sum(table.nbytes for table in first.tables)
        whole = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
        check(whole, first, weights)

        devices.kill("dev1")
        coordinator._wait_until(lambda: "dev1" not in coordinator.present, 30.0, str)
        found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
        assert found.decoded == ("d1",)
        check(found, first, weights)

        # The coordinator is killed; devices come back to it by themselves, and one was restarted meanwhile.
        address = link.address
        link.close()
        devices.start("dev1")
        link = TcpDevices(address, KEY)
        coordinator = Coordinator(link, code_named("balanced:copies=1"), settings, tmp_path / "memory")
        coordinator.set_up(3)
        wait_for(coordinator, {"dev0", "dev1", "dev2"})
        found = coordinator.evaluate(weights, Logistic(), (0.0, 1.0))
        assert found.decoded == ()
        assert (found.gradient == whole.gradient).all()
        assert coordinator.repair_bytes == 0  # dev1 had its block on disk

        devices.start("dev3")
        wait_for(coordinator, {"dev3"})
        check(coordinator.evaluate(weights, Logistic(), (0.0, 1.0)), data, weights)
        assert coordinator.repair_bytes > 0
        link.close()


def test_a_device_with_the_wrong_key_is_refused_and_says_so(tmp_path: Path) -> None:
    data = coded_data(1)
    with processes(data, tmp_path) as devices:
        link = TcpDevices(key=KEY)
        devices.address = link.address
        process = devices.start("dev0", key=b"another key, as long as the other")
        while process.poll() is None:
            assert link.poll(link.time() + 0.05) == []
        assert process.returncode == 1
        assert "do not hold the same key" in process.communicate()[1]
        link.close()


def test_a_device_ends_when_the_training_does_and_refuses_wrong_files(tmp_path: Path) -> None:
    data = coded_data(1)
    data.tables[0][3, 2] = np.nan
    with processes(data, tmp_path) as devices:
        link = TcpDevices(key=KEY)
        devices.address = link.address
        wrong = devices.start("dev0")
        helper = devices.start("helper", data=False)
        events = []
        while not events:
            events = link.poll(link.time() + 0.05)
        assert [(event.kind, event.device) for event in events] == [("joined", "helper")]
        link.send("helper", DeviceMessage("end"))
        while helper.poll() is None:
            link.poll(link.time() + 0.05)
        assert helper.returncode == 0
        assert wrong.wait(30) == 2
        assert "row 3, column 2 is not a finite number" in wrong.communicate()[1]
        link.close()


def connect(link: TcpDevices) -> socket.socket:
    address = parse_address(link.address)
    return socket.create_connection((address.host, address.port))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 9,
        b"".join(bytes(piece) for piece in encode(DeviceMessage("step", {}, {"w": np.ones(9)}))),
        b"".join(bytes(piece) for piece in encode(DeviceMessage("hello", {"name": "x"}, {"w": np.ones(9999)}))),
        b"".join(bytes(piece) for piece in encode(DeviceMessage("hello", {"name": "\n"}))),
        b"".join(bytes(piece) for piece in encode(DeviceMessage("proof", {"proof": "x", "challenge": "y"}))),
    ],
)
@pytest.mark.parametrize("key", [b"", KEY])
def test_strangers_are_cut_off_and_told_why(sent, key) -> None:
    link = TcpDevices(key=key)
    with connect(link) as stranger:
        stranger.settimeout(5)
        stranger.sendall(sent)
        stranger.setblocking(False)
        heard = b""
        while True:
            assert link.poll(link.time() + 0.01) == []
            try:
                piece = stranger.recv(65536)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
            if not piece:
                break
            heard += piece
    assert b"refused" in heard or not heard
    link.close()


def test_an_address_beyond_this_machine_needs_a_key() -> None:
    with pytest.raises(ConfigurationError, match="--key-file"):
        TcpDevices("tcp://0.0.0.0:0")
    with pytest.raises(ConfigurationError, match="tcp://host:port"):
        TcpDevices("unix:/tmp/x")
    TcpDevices("tcp://0.0.0.0:0", KEY).close()


def test_a_caller_without_the_listener_or_its_key_says_so() -> None:
    link = TcpDevices(key=KEY)
    address = parse_address(link.address)
    import threading

    ended = threading.Event()

    def heed() -> None:
        while not ended.is_set():
            link.poll(link.time() + 0.01)

    thread = threading.Thread(target=heed)
    thread.start()
    try:
        with pytest.raises(ProtocolError, match="asks for a key"), call(address, b"", 5.0):
            pass
        with pytest.raises(ProtocolError, match="do not hold the same key"), call(address, KEY[::-1], 5.0):
            pass
    finally:
        ended.set()
        thread.join()
        link.close()
    with pytest.raises(EvenkeelError, match="cannot be reached"), call(address, KEY, 5.0):
        pass


def test_a_training_over_tcp_is_the_training_in_this_process(tmp_path: Path) -> None:
    from coded_helpers import local_coordinator

    data = coded_data(3)
    plan = TrainingPlan(Logistic(), 1.0, (0.0, 1.0), rounds=12, tolerance=0.0)
    with processes(data, tmp_path) as devices:
        link = TcpDevices(key=KEY)
        devices.address = link.address
        for place in range(3):
            devices.start(f"dev{place}")
        coordinator = Coordinator(link, code_named("mds:own=2"), CodedSettings(wait_s=30.0, least_wait_s=1.0))
        coordinator.set_up(3)
        far = train(coordinator, plan)
        coordinator.dismiss()
        while any(process.poll() is None for process in devices.running.values()):
            link.poll(link.time() + 0.05)
        assert [process.returncode for process in devices.running.values()] == [0, 0, 0]
        link.close()
    near = train(local_coordinator(data, "mds:own=2")[1], plan)
    assert (far.weights == near.weights).all()


def test_a_training_with_killed_devices_and_a_killed_coordinator_ends_where_it_should(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "coded_churn.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--rounds", "40", "--pace", "0.1", "--json", str(tmp_path / "facts.json")],
        capture_output=True,
        text=True,
        timeout=110,
    )
    facts = json.loads((tmp_path / "facts.json").read_text())
    # So short a training has not come to its end when a device joins with new data: it ends near, and 200 rounds there.
    assert facts["apart"] < 1e-6, ran.stderr
    assert facts["coordinator_killed"] == 2
    assert facts["killed"] > 2
    assert facts["decoded_rounds"] > 2
    assert facts["repair_bytes"] > 0
