"""Addresses that a worker can listen on."""

import pytest

from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/w 1.sock", Address("unix", path="/run/w 1.sock")),
        ("tcp://10.0.0.7:9000", Address("tcp", host="10.0.0.7", port=9000)),
        ("tcp://:0", Address("tcp", host="127.0.0.1", port=0)),
        ("tcp://[::1]:80/", Address("tcp", host="::1", port=80)),
        ("tcp://gpu-3.local:65535", Address("tcp", host="gpu-3.local", port=65535)),
        ("fd:7", Address("fd", number=7)),
    ],
)
def test_an_address_is_read_and_written(text, address):
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix:" + "x" * 108, "tcp://host", "tcp://host:65536", "tcp://a:b:1", "fd:x", "fd:-1", "/tmp/w.sock"],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigurationError, match="address"):
        parse_address(text)


def test_no_message_holds_a_password():
    with pytest.raises(ConfigurationError, match=r"address 'tcp://10\.0\.0\.7:9'"):
        parse_address("tcp://admin:hunter2@10.0.0.7:9")
