"""`evenkeel switch up`, `stats` and `down`."""

import json

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from switch_packets import why_no_kernel

WHY_NOT = why_no_kernel()


def ran(*words: str):
    return CliRunner().invoke(main, ["switch", *words])


@pytest.mark.root
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_switch_goes_up_is_counted_and_goes_down(tmp_path):
    file = tmp_path / "stats.json"
    try:
        made = ran("up", "--hosts", "2", "--policy", "assoc", "--slots", "64", "--name", "cli")
        assert made.exit_code == 0, made.output
        assert "switch cli: assoc, 64 slots" in made.output
        assert ran("stats", "--name", "cli", "--json", str(file)).exit_code == 0
        row = json.loads(file.read_text())["rows"][0]
        assert {"policy": "assoc", "slots": 64, "slots_in_use": 0, "jobs": 0}.items() <= row.items()
    finally:
        gone = ran("down", "--name", "cli")
    assert gone.output == "switch cli is gone\n"
    assert "switch cli was not up" in ran("down", "--name", "cli").output
    assert ran("stats", "--name", "cli").exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hosts", "2", "--policy", "best"), "policy: must be one of unlimited, atp, atp-free"),
        (("--hosts", "2", "--slots", "1000"), "slots: must be a power of two, found 1000"),
        (("--hosts", "2", "--jobs", "3"), "regions: must be a power of two"),
        (("--hosts", "2", "--mtu", "9000"), "mtu: must be 76 to 3498"),
        (("--hosts", "x"), "hosts: must be a number, or ports"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_right(words, said):
    done = ran("up", *words)
    assert done.exit_code == 2
    assert said in done.output


def test_without_root_the_switch_in_user_space_is_offered(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    done = ran("up", "--hosts", "2")
    assert done.exit_code == 2
    assert "needs root; run it with sudo; `evenkeel switch run` is the same switch in user space" in done.output


def test_without_clang_its_install_line_is_said(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("evenkeel.switch.build.shutil.which", lambda name: "/bin/ip" if name == "ip" else None)
    monkeypatch.setattr("evenkeel.switch.kernel.libbpf", lambda: None)
    done = ran("up", "--hosts", "2", "--name", "noclang")
    assert done.exit_code == 2
    assert "run: apt-get install clang libbpf-dev" in done.output
