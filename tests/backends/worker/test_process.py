"""Worker processes for real: killed, frozen, stopped, orphaned."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend_helpers import OPTIONS, ask, in_loop, open_files, send, until
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError

ROW = np.arange(3, dtype=np.float32)[None]
IMAGE = np.ones((1, 224, 224, 3), np.uint8)
MODELS = """
import os, sys, time

def make():
    def run(rows):
        if rows.flat[0] == 7:
            os._exit(3)
        return rows.reshape(len(rows), -1)[:, :3] * 2
    return run

def make_then_die():
    print("cannot find the weights", file=sys.stderr)
    os._exit(5)
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "double.py").write_text(MODELS)
    return f"python:{tmp_path / 'double.py'}:make"


@contextlib.asynccontextmanager
async def started(spec, *, delay="", **options):
    config = WorkerConfig(models=(spec,), listen="unix:/unused", delay=delay)
    backend = ProcessBackend("replica-1", config, ("double",), dataclasses.replace(OPTIONS, **options))
    try:
        await backend.start()
        yield backend
    finally:
        pid = backend.pid
        await backend.close()
        assert pid is None or not os.path.exists(f"/proc/{pid}")
        assert not open_files()


@in_loop
async def test_a_worker_killed_under_load_answers_every_ticket_and_comes_back(spec):
    before = set(os.listdir("/dev/shm"))
    async with started(spec) as backend:
        first_pid = backend.pid
        changes = []
        backend.on_change = lambda: changes.append(backend.ready)
        tickets = [send(backend, IMAGE)[1] for _ in range(100)]
        await tickets[5]
        os.kill(first_pid, signal.SIGKILL)
        tickets += [send(backend, IMAGE)[1] for _ in range(100)]
        replies = await asyncio.gather(*(_wait(ticket) for ticket in tickets))
        assert replies[0].error is None
        assert isinstance(replies[-1].error, BackendLostError)
        assert all(reply.error is None or isinstance(reply.error, BackendLostError) for reply in replies)
        await until(lambda: backend.ready)
        assert backend.pid != first_pid
        assert "replica-1' ended with signal SIGKILL" in str(backend.last_error)
        np.testing.assert_array_equal((await ask(backend, ROW)).outputs, ROW * 2)
        assert all(len(ticket.all) == 1 for ticket in tickets)
        assert changes == [False, True]
    assert set(os.listdir("/dev/shm")) == before


async def _wait(replies):
    return await replies


@in_loop
async def test_a_frozen_worker_replies_late_or_is_started_again(spec):
    async with started(spec, heartbeat_s=0.1, frozen_after_s=30.0, frozen_if_suspected_s=0.2) as backend:
        pid = backend.pid
        os.kill(pid, signal.SIGSTOP)
        late = send(backend, ROW)[1]
        os.kill(pid, signal.SIGCONT)
        assert (await late).error is None
        os.kill(pid, signal.SIGSTOP)
        lost = send(backend, ROW)[1]
        backend.suspect()
        assert "no sign of life" in str((await lost).error)
        await until(lambda: backend.ready)
        assert backend.pid != pid
        assert (await ask(backend, ROW)).error is None
        os.kill(backend.pid, signal.SIGSTOP)  # and closing ends a frozen one all the same


@in_loop
async def test_a_task_that_ends_the_process_is_lost_and_the_reason_known(spec):
    async with started(spec) as backend:
        reply = await ask(backend, np.full((1, 3), 7.0))
        assert isinstance(reply.error, BackendLostError)
        await until(lambda: backend.ready)
        assert "ended with exit code 3" in str(backend.last_error)


@in_loop
async def test_sigterm_finishes_what_is_queued_and_the_worker_is_replaced(spec):
    async with started(spec, delay="constant:seconds=0.05s") as backend:
        tickets = [send(backend, ROW)[1] for _ in range(3)]
        await tickets[0]
        pid = backend.pid
        os.kill(pid, signal.SIGTERM)
        for ticket in tickets:
            assert (await ticket).error is None
        await until(lambda: backend.ready and backend.pid != pid)
        assert "exit code 0" in str(backend.last_error)


@in_loop
async def test_what_cannot_start_says_why(spec):
    with pytest.raises(ConfigurationError, match=r"replica-1' cannot start: .*No module named 'nowhere'"):
        async with started("python:nowhere:make"):
            pass
    with pytest.raises(BackendError, match="exit code 5 before it was ready; its last words: cannot find the weights"):
        async with started(f"{spec}_then_die"):
            pass


@in_loop
async def test_a_worker_of_its_own_drains_on_sigterm_and_exits_with_0(spec, tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    arguments = ["--model", spec, "--listen", listen, "--delay=constant:seconds=0.05s"]
    with subprocess.Popen(
        [sys.executable, "-m", "evenkeel.backends.worker.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            backend = WorkerBackend("w", listen, ("double",), OPTIONS)
            await backend.start()
            tickets = [send(backend, ROW)[1] for _ in range(3)]
            await tickets[0]
            process.send_signal(signal.SIGTERM)
            for ticket in tickets:
                assert (await ticket).error is None
            assert await asyncio.to_thread(process.wait, 10) == 0
            await backend.close()
            assert process.stdout.read() == f"evenkeel worker: listening on {listen}\n"
            assert process.stderr.read() == ""
            assert not (tmp_path / "w.sock").exists()
        finally:
            process.kill()


PARENT = """
import asyncio, sys
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.config import WorkerConfig

async def main():
    backend = ProcessBackend("w", WorkerConfig((sys.argv[1],), "unix:/unused"))
    await backend.start()
    print(backend.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@in_loop
async def test_no_worker_outlives_its_parent_not_even_a_frozen_one(spec):
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, spec, stdout=asyncio.subprocess.PIPE)
    pid = int(await parent.stdout.readline())
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    await parent.wait()
    await until(lambda: _gone(pid))


def _gone(pid: int) -> bool:
    """Ended; whoever is its parent now may not have reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
