"""The commands that change a running server ask for the right thing, and say what they were answered."""

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from evenkeel.errors import ConfigurationError
from evenkeel.serving import control

NODES = {"m": [{"name": "replica-0", "kind": "replica", "own": True, "ready": True, "tasks": 2}]}


@pytest.fixture
def asked(monkeypatch):
    found = []

    def ask(path, method, target, fields=None):
        found.append((path, method, target, fields))
        return {"/v2/fleet/reload": {"loaded": ["m"], "need_restart": ["port"]}, "/v2/fleet": NODES}.get(target, {})

    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(control, "find_socket", lambda pid: f"{pid}.sock")
    return found


@pytest.mark.parametrize(
    ("line", "wanted", "says"),
    [
        (
            "reload",
            ("None.sock", "POST", "/v2/fleet/reload", None),
            "loaded: m\nchanged too, but only a restart of the server uses it: port",
        ),
        ("reload --model a/b", ("None.sock", "POST", "/v2/repository/models/a%2Fb/load", None), "loaded: a/b"),
        ("restart --pid 7 --at-once 3", ("7.sock", "POST", "/v2/fleet/restart", {"at_once": 3}), "all workers are new"),
        ("resize --replicas 9", ("None.sock", "POST", "/v2/fleet/resize", {"replicas": 9}), "done"),
        ("fleet", ("None.sock", "GET", "/v2/fleet", None), "m  replica-0  own  2 tasks"),
    ],
)
def test_what_is_asked_and_said(asked, line, wanted, says):
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 0, result.output
    assert asked == [wanted]
    assert says in result.output


def test_without_a_server_the_commands_say_so(monkeypatch):
    def find(pid):
        raise ConfigurationError("no server of this user runs on this machine")

    monkeypatch.setattr(control, "find_socket", find)
    result = CliRunner().invoke(main, ["reload"])
    assert result.exit_code == 2
    assert "no server of this user runs" in result.output
