"""`bench serving --url` and `plan serving` at a server that wants a key, and has a certificate of its own authority."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from certificates import Authority
from evenkeel.bench.serving.server_process import ServerProcess
from evenkeel.cli.main import main

KEY = "a-key-of-the-client-000001"

pytestmark = pytest.mark.timeout(120)


def test_a_server_with_keys_and_tls_is_measured_and_planned_from(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.sign("server")
    for name, text in (("keys", f"alice {KEY}"), ("key", KEY)):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(text)
    config = {
        "replicas": 1,
        "backups": 0,
        "policy": "none",
        "keys": {"file": str(tmp_path / "keys")},
        "tls": {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")},
    }
    let_in = ["--key-file", str(tmp_path / "key"), "--ca", str(authority.file)]

    async def run() -> None:
        async with ServerProcess(config) as server:
            measured = ["bench", "serving", "--url", server.url, "--rate", "80", "--requests", "600"]
            for allowed in (False, True):
                report = str(tmp_path / f"{allowed}.json")
                result = await asyncio.to_thread(
                    CliRunner().invoke, main, [*measured, "--json", report, *(let_in if allowed else let_in[2:])]
                )
                assert (result.exit_code == 0) == allowed, result.output
            (row,) = json.loads((tmp_path / "True.json").read_text())["rows"]
            assert row["failed"] < 0.5  # it answers; how many depends on what else the machine does
            metrics = f"{server.url}/metrics"
            planned = [
                "plan",
                "serving",
                metrics,
                "--column",
                "evenkeel_service_duration_seconds",
                "--requests",
                "2000",
            ]
            refused = await asyncio.to_thread(CliRunner().invoke, main, [*planned, *let_in[2:]])
            assert "401" in refused.output
            result = await asyncio.to_thread(CliRunner().invoke, main, [*planned, *let_in])
            assert result.exit_code == 0, result.output
            assert KEY not in result.output

    asyncio.run(run())


@pytest.mark.parametrize("command", [["bench", "serving"], ["plan", "serving", "--delay", "two-mode"]])
def test_a_key_without_a_server_is_refused(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    result = CliRunner().invoke(main, [*command, "--key-file", str(tmp_path / "key")])
    assert result.exit_code != 0
    assert "key-file, ca: they are for" in result.output
