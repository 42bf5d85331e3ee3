"""A configuration says whom the server lets in; with everything on, no key shows up anywhere."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from certificates import Authority
from evenkeel.client import AsyncInferenceClient, ClientTls
from evenkeel.errors import ConfigurationError, UnauthenticatedError
from evenkeel.http_client.client import HttpClient
from evenkeel.serving.config import read_config
from evenkeel.serving.trusted import exposures, guard_of
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.keys import CLIENT_KEYS_VARIABLE

pytestmark = pytest.mark.timeout(120)

FRONT, SCRAPER, UPSTREAM, WORKER = (f"{name}-secret-0123456789" for name in ("front", "scraper", "upstream", "worker"))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(CLIENT_KEYS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, []),
        ({"host": "unix:/tmp/x"}, []),
        ({"host": "0.0.0.0"}, ["is open", "without TLS"]),
        ({"host": ["127.0.0.1", "::"]}, ["is open", "without TLS"]),
        ({"host": "0.0.0.0", "keys": {"file": "k"}}, ["without TLS"]),
        ({"host": "0.0.0.0", "tls": {"certificate": "c"}}, ["is open"]),
        ({"host": "0.0.0.0", "tls": {"certificate": "c", "client_ca": "a"}}, []),
        ({"host": "0.0.0.0", "tls": {"certificate": "c"}, "keys": {"file": "k"}}, []),
    ],
)
def test_what_strangers_can_do_is_said(config, words):
    said = exposures(read_config(config))
    assert len(said) == len(words)
    for sentence, word in zip(said, words, strict=True):
        assert word in sentence


def test_keys_are_needed_as_soon_as_there_are_some(tmp_path, monkeypatch):
    assert guard_of(read_config({})).access is None
    monkeypatch.setenv(CLIENT_KEYS_VARIABLE, f"alice {FRONT}")
    access = guard_of(read_config({})).access
    assert access.admit("infer", f"Bearer {FRONT}", "", "") == "alice"
    assert not [one for one in exposures(read_config({"host": "0.0.0.0"})) if "is open" in one]
    monkeypatch.setenv(CLIENT_KEYS_VARIABLE, " ")
    with pytest.raises(ConfigurationError, match="holds no key"):
        guard_of(read_config({}))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        guard_of(read_config({"keys": {"file": "none"}}, tmp_path))


def test_headers_of_a_configuration_are_not_shown():
    config = read_config({"remote_credentials": {"headers": {"X-Team": UPSTREAM}}})
    assert config.remote_credentials.load().lines() == f"X-Team: {UPSTREAM}\r\n".encode()
    assert UPSTREAM not in repr(config)
    assert "X-Team" in repr(config)


def written(file: Path, text: str) -> Path:
    file.touch(0o600)
    file.write_text(text)
    return file


@contextlib.asynccontextmanager
async def running(folder: Path, name: str, arguments: list[str], **env: str):
    """A command of ours as a process, from when it says where it listens; gives its line, and its id."""
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "evenkeel", *arguments, "--parent-pid", str(os.getpid())),
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **env},
        )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line, (folder / f"{name}.log").read_text()
        yield line, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def serve(folder: Path, name: str, **config) -> list[str]:
    base = {"port": 0, "host": "127.0.0.1", "backups": 0, "policy": "none"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**base, **config}))
    return ["serve", str(folder / f"{name}.yaml")]


def descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def test_with_keys_and_tls_everywhere_requests_are_answered_and_no_key_shows_up(tmp_path):
    authority = Authority(tmp_path)
    for name, of in (("server", "server"), ("worker", "server"), ("gateway", "client")):
        authority.sign(name, of=of)
    server = {"certificate": "server.pem", "key": "server.key", "client_ca": "authority.pem"}
    own = {"ca": "authority.pem", "certificate": "gateway.pem", "key": "gateway.key"}
    written(tmp_path / "worker-key", WORKER)
    written(tmp_path / "upstream-keys", f"front {UPSTREAM}")
    written(tmp_path / "upstream-key", UPSTREAM)
    worker = ["worker", "--model", "cifar10-base", "--listen", "tcp://127.0.0.1:0"]
    worker += ["--key-file", str(tmp_path / "worker-key"), "--tls-certificate", str(tmp_path / "worker.pem")]
    worker += ["--tls-key", str(tmp_path / "worker.key"), "--tls-ca", str(authority.file)]
    upstream = serve(tmp_path, "upstream", replicas=1, tls=server, keys={"file": "upstream-keys"})

    async def run() -> None:
        async with running(tmp_path, "w", worker) as at, running(tmp_path, "upstream", upstream) as (above, _):
            url = above.split(" on ")[1].split()[0]
            assert url.startswith("https://")
            replicas = [at[0].split()[-1], url]
            tls = {**server, "clients": "optional"}
            remote = {"remote_tls": own, "remote_credentials": {"bearer_file": "upstream-key"}}
            front = serve(
                tmp_path, "front", replicas=replicas, tls=tls, worker_tls=own, worker_key_file="worker-key", **remote
            )
            keys = f"alice {FRONT}; scraper {SCRAPER} watch"
            async with running(tmp_path, "front", front, **{CLIENT_KEYS_VARIABLE: keys}) as (said, pid):
                assert "NOT READY" not in said, (tmp_path / "front.log").read_text()
                await check(said.split(" on ")[1].split()[0])
                for process in (pid, at[1]):
                    for one in descendants(process):
                        shown = Path(f"/proc/{one}/cmdline").read_text()
                        for key in (FRONT, SCRAPER, UPSTREAM, WORKER):
                            assert key not in shown

    async def check(url: str) -> None:
        mine = ClientTls(authority.file)
        pixels = np.zeros(read_config({}).card().input_shape, np.uint8)
        async with AsyncInferenceClient(url, "cifar10-base", bearer=FRONT, tls=mine) as client:
            answers = [await client.classify(pixels) for _ in range(8)]
            assert {answer.source for answer in answers} == {"exact"}
        async with AsyncInferenceClient(url, "cifar10-base", bearer=UPSTREAM, tls=mine) as client:
            with pytest.raises(UnauthenticatedError):
                await client.classify(pixels)
        async with HttpClient(url, credentials=Credentials(bearer=SCRAPER), tls=mine) as client:
            metrics = (await client.request("GET", "/metrics")).body.decode()
        assert 'evenkeel_requests_by_key_total{key="alice"} 9.0' in metrics
        assert 'evenkeel_refused_requests_total{reason="wrong key"} 1.0' in metrics
        assert 'evenkeel_handshakes_total{outcome="done"} 3.0' in metrics
        assert "evenkeel_certificate_expiry_timestamp_seconds 1" in metrics
        up = [line for line in metrics.splitlines() if line.startswith("evenkeel_backend_up{")]
        assert len(up) == 2
        assert all(line.endswith(" 1.0") for line in up)

    asyncio.run(run())
    said = "".join((tmp_path / f"{name}.log").read_text() for name in ("w", "upstream", "front"))
    for key in (FRONT, SCRAPER, UPSTREAM, WORKER):
        assert key not in said


def test_workers_that_a_gateway_starts_do_not_inherit_its_keys(tmp_path):
    secrets = {CLIENT_KEYS_VARIABLE: f"alice {FRONT}", "EVENKEEL_WORKER_KEY": WORKER}

    async def run() -> None:
        async with running(tmp_path, "g", serve(tmp_path, "g", replicas=1), **secrets) as (_, pid):
            workers = [one for one in descendants(pid) if b"worker.main" in Path(f"/proc/{one}/cmdline").read_bytes()]
            assert len(workers) == 1
            environment = Path(f"/proc/{workers[0]}/environ").read_text()
            assert "ORT_DISABLE_TELEMETRY" in environment
            assert FRONT not in environment
            assert WORKER not in environment

    asyncio.run(run())


def test_a_server_that_everybody_reaches_says_so_when_it_starts(tmp_path):
    async def run() -> None:
        async with running(tmp_path, "g", serve(tmp_path, "g", replicas=1, host="0.0.0.0")):
            pass

    asyncio.run(run())
    assert "is open: whoever reaches it can send requests" in (tmp_path / "g.log").read_text()
