"""Workers that another process places: found, reached by their own keys, lost, replaced, let go. Without Ray itself."""

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend_helpers import OPTIONS, ask, in_loop, open_files, until
from evenkeel.backends.ray_actors import engine as engine_module
from evenkeel.backends.ray_actors.engine import RayEngine, RayWorkers
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.errors import BackendError, BackendLostError, MissingExtraError

ROW = np.arange(3, dtype=np.float32)[None]
DRIVER = [sys.executable, str(Path(__file__).parents[2] / "helpers" / "fake_ray_driver.py")]
MODEL = """
import os

def make():
    def run(rows):
        if rows.flat[0] == 7:
            os._exit(3)
        return rows * 2
    return run

def make_none():
    raise RuntimeError("no such layer")
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "double.py").write_text(MODEL)
    return f"python:{tmp_path / 'double.py'}:make"


@contextlib.asynccontextmanager
async def workers(spec, scenario="well", count=2, load_s=20.0):
    engine = RayEngine(scenario, DRIVER)
    config = WorkerConfig((spec,), "tcp://127.0.0.1:0")
    made = RayWorkers(engine, "double/replica", RayOptions(count), config, ["double"], load_s)
    backends: list[WorkerBackend] = []

    def make() -> WorkerBackend:
        backend = made.make(f"replica-{len(backends)}")
        backend._options = replace(backend._options, first_pause_s=OPTIONS.first_pause_s, max_pause_s=0.1)
        backends.append(backend)
        return backend

    try:
        yield make
    finally:
        await asyncio.gather(*(backend.close() for backend in backends))
        assert engine._process is None
        assert not open_files()


@in_loop
async def test_workers_are_found_and_do_tasks_and_are_let_go(spec, caplog):
    with caplog.at_level(logging.WARNING):
        async with workers(spec) as make:
            backends = [make(), make()]
            await asyncio.gather(*(backend.start() for backend in backends))
            replies = await asyncio.gather(*(ask(backend, ROW) for backend in backends))
            assert all(np.array_equal(reply.outputs, ROW * 2) for reply in replies)
            assert [backend.hello.worker for backend in backends] == [0, 1]
            assert "127.0.0.1" in backends[0]._link.where
            assert "worker 0 of double/replica on Ray node aaaaaaaa" in backends[0]._link.where
            await backends[0].close()
            again = make()  # takes the place that is free
            await again.start()
            assert again.hello.worker == 0
    assert caplog.text.count("released") >= 2


@in_loop
async def test_a_lost_worker_comes_back_although_the_process_that_speaks_to_ray_went_with_it(spec):
    async with workers(spec) as make:
        backend = make()
        await backend.start()
        pid = backend.hello.pid
        reply = await ask(backend, ROW * 0 + 7)
        assert isinstance(reply.error, BackendLostError)
        await until(lambda: backend.ready)
        assert backend.hello.pid != pid
        assert np.array_equal((await ask(backend, ROW)).outputs, ROW * 2)


@in_loop
async def test_only_who_was_given_the_actor_s_key_is_taken(spec):
    async with workers(spec) as make:
        backend = make()
        await backend.start()
        address = backend._link.where.partition(",")[0]
        for key in (b"", b"another key of 16 bytes"):
            stranger = WorkerBackend("stranger", address, ["double"], replace(OPTIONS, key=key, start_timeout_s=0.5))
            with pytest.raises(BackendError, match=r"asks for a key|keys differ"):
                await stranger.start()
            await stranger.close()
        assert backend.ready


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("gone", "no Ray cluster answers at head:6379"),
        ("full", "Ray has not placed cifar10-base/replica: the cluster has 2 nodes"),
        ("wrong", "the process that speaks to Ray ended"),
    ],
)
@in_loop
async def test_what_ray_cannot_do_is_said_at_once_and_tried_again(spec, scenario, message):
    async with workers(spec, scenario, load_s=3600.0) as make:
        backend = make()
        starting = asyncio.ensure_future(backend.start())
        await until(lambda: message in backend.why_not)
        if scenario == "wrong":  # trying again may help at once
            starting.cancel()
        else:  # nobody waits for the whole time of a start
            with pytest.raises(BackendError, match=message):
                await starting
        assert message in backend.why_not
        reply = await ask(backend, ROW)
        assert message in str(reply.error)
        assert not reply.began


@pytest.mark.parametrize("steps", range(8))
@in_loop
async def test_who_is_let_go_while_it_starts_leaves_no_process_behind(spec, steps):
    async with workers(spec) as make:
        backend = make()
        starting = asyncio.ensure_future(backend.start())
        for _ in range(steps):
            await asyncio.sleep(0)
        await backend.close()
        starting.cancel()
        await asyncio.wait([starting])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@in_loop
async def test_a_cluster_that_is_gone_is_not_looked_for_all_the_time(spec, monkeypatch):
    started = []
    start = engine_module._RayProcess.start

    async def counted(program, address):
        started.append(address)
        return await start(program, address)

    monkeypatch.setattr(engine_module._RayProcess, "start", counted)
    async with workers(spec, "gone", load_s=3600.0) as make:
        tried = await asyncio.gather(*(make().start() for _ in range(3)), return_exceptions=True)
        assert all("no Ray cluster answers at head:6379" in str(error) for error in tried)
    assert len(started) == 1


@in_loop
async def test_a_model_that_cannot_be_served_is_said_by_its_reason(spec):
    async with workers(spec.replace(":make", ":make_none")) as make:
        with pytest.raises(BackendError, match="its factory raised RuntimeError: no such layer"):
            await make().start()


def test_without_ray_the_error_is_the_install_line(monkeypatch):
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evenkeel\[ray\]'"):
        RayEngine("auto")


def test_serving_loads_no_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise RuntimeError('loaded')")
    modules = "evenkeel, evenkeel.serving.service, evenkeel.backends.ray_actors.actor"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", f"import {modules}"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)
