"""The probe's two sides on loopback, and what is made of their figures."""

import json
import math
import socket
import subprocess
import sys
import threading

import pytest

from evenkeel.lab import probe
from evenkeel.lab.rate_check import RateCheck


def connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def test_both_directions_are_counted():
    near, far = connected()
    seen = {}
    other = threading.Thread(target=lambda: seen.update(far=probe.exchange(far, False, 0.05, 0.1)))
    other.start()
    seen["near"] = probe.exchange(near, True, 0.05, 0.1)
    other.join()
    for side in ("near", "far"):
        assert seen[side]["received_bps"] > 1e6
    assert 0 < seen["near"]["round_trip_s"] < 1
    assert seen["far"]["round_trip_s"] is None


def test_a_side_that_leaves_is_said():
    near, far = connected()
    far.close()
    with near, pytest.raises(ConnectionError):
        probe.exchange(near, True, 0.05, 0.1)


def test_the_script_needs_nothing_but_python():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    sides = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", probe.__file__, role, "127.0.0.1", port, "0.05", "0.1"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for role in ("connect", "listen")  # it waits until somebody listens
    ]
    results = [json.loads(side.communicate(timeout=30)[0]) for side in sides]
    assert all(result["received_bps"] > 1e6 for result in results)
    assert [result["round_trip_s"] is None for result in results] == [False, True]


@pytest.mark.parametrize(
    ("there", "back", "warning"),
    [
        (94e6, 95e6, None),
        (94e6, 60e6, "carries 60% of the wanted rate: the machine is too busy"),
        (0, 95e6, "carries 0% of the wanted rate"),
        (94e6, 300e6, "carries 300% of the wanted rate: it is not shaped"),
    ],
)
def test_a_rate_too_far_off_is_a_warning(there, back, warning):
    check = RateCheck(100e6, there, back, 1.5e-4)
    found = check.warning()
    assert found is None if warning is None else warning in found
    assert "100 Mbit/s" in check.text()


def test_without_a_rate_there_is_nothing_to_warn_of():
    check = RateCheck(math.inf, 5e9, 6.12e9, 3e-5)
    assert check.warning() is None
    assert (
        check.text()
        == "unlimited links carry 5 Gbit/s there and 6.12 Gbit/s back at once (payload), round trip 0.03 ms"
    )
