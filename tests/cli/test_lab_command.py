"""`evenkeel lab` without root: help, mistakes, and what it asks of the machine."""

import os
import shutil

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main


def run(*arguments):
    return CliRunner().invoke(main, ["lab", *arguments])


@pytest.mark.parametrize("command", ["run", "clean"])
def test_help_shows_an_example(command):
    assert f"Examples:\n    evenkeel lab {command}" in run(command, "--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--rate", "fast", "--", "true"), "rate must be a rate such as 100mbit"),
        (("run", "--rate", "1bit", "--", "true"), "rate: must be 8kbit"),
        (("run", "--delay", "soon", "--", "true"), "delay must be a time"),
        (("run", "--loss", "100%", "--", "true"), "loss: must be a share"),
        (("run", "--loss", "2", "--", "true"), "loss must be a share"),
        (("run", "--cpus", "9999", "--", "true"), "cpus: [9999] cannot be used here"),
        (("run", "--", "no-such-program"), "command: there is no program 'no-such-program'"),
        (("run", "--json", "no/such/x.json", "--", "true"), "json: no/such/x.json cannot be written: there is no"),
        (("clean", "--json", "no/such/x.json"), "json: no/such/x.json cannot be written: there is no"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("evenkeel: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("run", "--", "true"), ("clean",)])
def test_without_root_it_says_so(arguments, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "the lab needs root" in result.stderr
    assert "sudo" in result.stderr


@pytest.mark.parametrize("arguments", [("run", "--", "true"), ("clean",)])
def test_without_iproute2_it_says_what_to_install(arguments, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else which(name) or name)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "tc cannot be found; run: apt-get install iproute2" in result.stderr


def test_the_command_keeps_its_own_options(monkeypatch):
    """What stands behind the program is not ours, even where it looks like an option of ours."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = run("run", "--hosts", "3", "sh", "--hosts", "x", "--help")
    assert "the lab needs root" in result.stderr
