"""How servers and workers start and end: alive before they are ready, ended by a signal at any time."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import yaml

from evenkeel.bench.serving.load import Target, drive
from evenkeel.bench.serving.server_process import ServerProcess, read_counters
from evenkeel.models import shipped

pytestmark = pytest.mark.timeout(120)

# Loading takes until somebody writes into the pipe.
WAITING = """
import numpy as np
def make():
    open({pipe!r}).read()
    return lambda rows: np.zeros((len(rows), 10), np.float32)
"""
FAILING = """
def make():
    def run(rows):
        raise RuntimeError("no kernel image is available")
    return run
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.asynccontextmanager
async def serving(folder: Path, **config):
    """`evenkeel serve` as a process, and its URL, from its first moment."""
    port = free_port()
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"port": port, "backups": 0, "policy": "none", "replicas": 1, **config}))
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "evenkeel", "serve", str(path), "--parent-pid", str(os.getpid())),
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def status(url: str) -> int | None:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status
    except aiohttp.ClientError:
        return None


async def until(url: str, wanted: int) -> None:
    async with asyncio.timeout(60):
        while await status(url) != wanted:
            pass


@pytest.fixture
def waiting_model(tmp_path: Path) -> Path:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "waiting.py").write_text(WAITING.format(pipe=str(pipe)))
    return pipe


def test_it_is_alive_before_its_model_is_loaded_and_ready_afterwards(tmp_path: Path, waiting_model: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, run="python:waiting.py:make") as (process, url):
            await until(f"{url}/v2/health/live", 200)
            assert await status(f"{url}/v2/health/ready") == 503
            await asyncio.to_thread(waiting_model.write_text, "go on")
            await until(f"{url}/v2/health/ready", 200)
            assert b"evenkeel: cifar10-base on http://" in await process.stdout.readline()
            process.send_signal(signal.SIGHUP)
            assert await process.wait() == 0

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_while_its_model_is_loaded(tmp_path: Path, waiting_model: Path, number: int) -> None:
    async def run() -> None:
        async with serving(tmp_path, run="python:waiting.py:make") as (process, url):
            await until(f"{url}/v2/health/live", 200)
            process.send_signal(number)
            async with asyncio.timeout(20):
                assert await process.wait() == 0

    asyncio.run(run())


def test_a_signal_ends_a_worker_while_its_model_is_loaded(tmp_path: Path, waiting_model: Path) -> None:
    command = [sys.executable, "-m", "evenkeel", "worker", "--listen", f"unix:{tmp_path}/w.sock"]
    with subprocess.Popen([*command, f"--model=python:{tmp_path}/waiting.py:make"]) as process:
        os.close(os.open(waiting_model, os.O_WRONLY))  # returns once the worker has it open; the next open waits
        process.terminate()
        assert process.wait(30) == 0


LOSING = """
import os, signal
import numpy as np
class Ends:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # what its handler raises here is printed, and goes no further
        sum(range(1000))
def make():
    Ends()
    return lambda rows: np.zeros((len(rows), 10), np.float32)
"""


def test_a_signal_whose_exit_is_lost_while_its_model_is_loaded_ends_a_worker_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "losing.py").write_text(LOSING)
    command = [sys.executable, "-m", "evenkeel", "worker", "--listen", f"unix:{tmp_path}/w.sock"]
    done = subprocess.run(
        [*command, f"--model=python:{tmp_path}/losing.py:make"], timeout=60, check=True, capture_output=True
    )
    assert b"Exception ignored in" in done.stderr


def test_a_model_whose_passes_fail_is_not_ready_and_the_log_says_where_it_fails(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)

    async def run() -> None:
        async with serving(tmp_path, run="python:failing.py:make") as (process, url):
            await process.stdout.readline()
            assert await status(f"{url}/v2/health/live") == 200
            assert await status(f"{url}/v2/health/ready") == 503
            process.terminate()
            assert await process.wait() == 0

    asyncio.run(run())
    log = (tmp_path / "log").read_text()
    assert "no kernel image is available" in log
    assert 'failing.py", line 4, in run' in log
    assert "is not ready" in log


def test_wrong_and_silent_nodes_elsewhere_do_not_keep_the_others_from_serving() -> None:
    async def garbage(reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9)
        await reader.read(100)
        writer.close()

    async def silent(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def run() -> None:
        servers = [await asyncio.start_server(talk, "127.0.0.1", 0) for talk in (garbage, silent)]
        addresses = [f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
        config = {"replicas": {"count": 1, "addresses": addresses}, "backups": 0}
        async with ServerProcess(config) as server:
            with np.load(shipped.IMAGES, allow_pickle=False) as arrays:
                target = Target(server.url, "cifar10-base", "images", arrays["images"], arrays["labels"])
            records = await drive(target, np.arange(10) / 20)
            assert [record.error for record in records if record.error] == []
            counters = await read_counters(server.url)
            assert [counters[f"backend_up[replica-{number}]"] for number in range(3)] == [1, 0, 0]
        for one in servers:
            one.close()

    asyncio.run(run())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_it_listens_on_both_kinds_of_addresses_and_a_unix_socket(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "http.sock"
        async with serving(tmp_path, host=["::", f"unix:{path}"]) as (process, url):
            await until(f"{url}/v2/health/ready", 200)
            assert await status(url.replace("127.0.0.1", "[::1]") + "/v2/health/ready") == 200
            connector = aiohttp.UnixConnector(str(path))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://localhost/v2/health/ready") as answer,
            ):
                assert answer.status == 200
            process.terminate()
            assert await process.wait() == 0
        assert not path.exists()

    asyncio.run(run())
    assert ":: is open: whoever reaches it can send requests" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("of_gateway", ["another", "none"])
def test_a_worker_with_another_key_is_named_as_the_reason_why_it_is_not_ready(tmp_path: Path, of_gateway: str) -> None:
    for name in ("worker", "gateway"):
        (tmp_path / name).write_text(name * 8)
        (tmp_path / name).chmod(0o600)

    async def run() -> None:
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "evenkeel", "worker", "--model", "cifar10-base", "--listen", "tcp://127.0.0.1:0"),
            *("--key-file", str(tmp_path / "worker")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            address = (await worker.stdout.readline()).decode().split()[-1]
            key = {"worker_key_file": str(tmp_path / "gateway")} if of_gateway == "another" else {}
            async with serving(tmp_path, replicas=[address], **key) as (process, url):
                line = (await process.stdout.readline()).decode()
                assert "NOT READY: no replica has done a pass yet" in line
                assert ("the keys differ" if key else "asks for a key") in line
                assert await status(f"{url}/v2/health/ready") == 503
        finally:
            worker.terminate()
            _, said = await worker.communicate()
        assert (b"a client was refused: the keys differ" in said) == bool(key)

    asyncio.run(run())
