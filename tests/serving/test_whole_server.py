"""The whole server for real: `evenkeel serve` in a process of its own, its workers killed and frozen."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from evenkeel.arrays import Array
from evenkeel.bench.serving.faults_live import worker_pids
from evenkeel.bench.serving.load import Target, drive
from evenkeel.bench.serving.server_process import Counters, ServerProcess, read_counters
from evenkeel.delays import faults
from evenkeel.errors import EvenkeelError
from evenkeel.figures.records import RequestRecord
from evenkeel.models import shipped

pytestmark = pytest.mark.timeout(180)

# Replicas take 40 ms, one task in fifty five times as long; light enough for two cores that do other work too.
SMALL = {"replicas": 3, "backups": 1, "delay": "two-mode:scale=0.25,seed=5"}
BACKUP = 3  # its worker number


def target(url: str) -> Target:
    with np.load(shipped.IMAGES, allow_pickle=False) as arrays:
        return Target(url, "cifar10-base", "images", arrays["images"], arrays["labels"])


def evenly(rate_per_s: float, seconds: float) -> Array:
    return np.arange(int(rate_per_s * seconds)) / rate_per_s


async def until(holds: Callable[[Counters], bool], url: str, seconds: float = 30.0) -> Counters:
    """Ask the server until its counters are so; each question takes its time, so nothing sleeps."""
    counters = Counters()
    try:
        async with asyncio.timeout(seconds):
            while not holds(counters):
                counters = await read_counters(url)
    except TimeoutError:
        raise AssertionError(f"after {seconds} s still not so: {counters}") from None
    return counters


def serving(test: Callable[[ServerProcess], Awaitable[None]], **config: Any) -> None:
    async def run() -> None:
        async with ServerProcess({**SMALL, **config}) as server:
            await test(server)

    asyncio.run(run())


def all_answered(records: list[RequestRecord]) -> bool:
    return [record.error for record in records if record.error] == []


def test_real_images_get_real_answers_and_say_how_they_are_known() -> None:
    async def test(server: ServerProcess) -> None:
        records = await drive(target(server.url), evenly(30, 5))
        assert all_answered(records)
        right = np.mean([record.label == record.truth for record in records])
        assert right > 0.8
        sources = {record.source for record in records}
        assert "exact" in sources
        assert sources <= {"exact", "hedge", "collage"}
        counters = await read_counters(server.url)
        assert counters["items"] == len(records)
        assert counters.total("backup_passes") > 0

    serving(test)


def test_a_killed_replica_loses_nothing_and_comes_back() -> None:
    async def test(server: ServerProcess) -> None:
        victim = worker_pids(server.pid)[0]
        driving = asyncio.create_task(drive(target(server.url), evenly(30, 6)))
        await until(lambda counters: counters.get("items", 0) > 30, server.url)
        assert faults.kill(victim)
        records = await driving
        assert all_answered(records)
        counters = await until(lambda counters: counters.get("backend_up[replica-0]") == 1, server.url)
        assert counters["failed"] == 0
        assert worker_pids(server.pid)[0] != victim

    serving(test)


def test_a_frozen_replica_loses_nothing_is_ejected_restarted_and_readmitted() -> None:
    async def test(server: ServerProcess) -> None:
        victim = worker_pids(server.pid)[1]
        driving = asyncio.create_task(drive(target(server.url), evenly(30, 12)))
        await until(lambda counters: counters.get("items", 0) > 30, server.url)
        assert faults.freeze(victim)
        try:
            ejected = await until(lambda counters: counters.get("ejections[stalled]", 0) > 0, server.url)
            assert ejected["backend_up[replica-1]"] == 0
            readmitted = await until(lambda counters: counters.get("readmissions", 0) > 0, server.url)
            assert readmitted["backend_up[replica-1]"] == 1
        finally:
            faults.thaw(victim)
        assert all_answered(await driving)
        assert worker_pids(server.pid)[1] != victim

    # Without fills and hedges only the ejection can save the items that the frozen replica holds.
    serving(test, policy="none", backups=0)


def test_without_its_backup_the_service_goes_on_as_hedging() -> None:
    async def test(server: ServerProcess) -> None:
        faults.kill(worker_pids(server.pid)[BACKUP])
        records = await drive(target(server.url), evenly(30, 4))
        assert all_answered(records)

    serving(test)


def test_with_all_replicas_gone_it_says_503_until_one_is_back() -> None:
    async def test(server: ServerProcess) -> None:
        pids = worker_pids(server.pid)
        for number in (0, 1, 2):
            faults.kill(pids[number])
        async with aiohttp.ClientSession(server.url) as session:
            statuses: set[int] = set()
            async with asyncio.timeout(30):
                while 503 not in statuses or 200 not in statuses:
                    async with session.get("/v2/health/ready") as response:
                        if response.status == 503 or 503 in statuses:
                            statuses.add(response.status)
        assert all_answered(await drive(target(server.url), evenly(20, 1)))

    serving(test)


def test_sigterm_answers_everything_that_was_accepted() -> None:
    async def test(server: ServerProcess) -> None:
        driving = asyncio.create_task(drive(target(server.url), np.zeros(60)))
        await until(lambda counters: counters.get("items", 0) >= 60, server.url)
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        assert all_answered(await driving)
        assert await server.process.wait() == 0

    serving(test)


def test_nothing_is_left_when_the_gateway_is_killed() -> None:
    async def run() -> None:
        server = ServerProcess(SMALL)
        await server.__aenter__()
        pids = worker_pids(server.pid)
        assert len(pids) == 4
        assert server.process is not None
        server.process.kill()
        await server.process.wait()
        async with asyncio.timeout(20):
            while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in pids.values()):
                await asyncio.to_thread(Path("/proc/self/stat").read_text)
        await server.__aexit__(None, None, None)

    asyncio.run(run())


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_node_that_is_down_does_not_keep_the_gateway_from_starting_and_joins_later(tmp_path: Path) -> None:
    elsewhere = tmp_path / "worker.sock"

    async def run() -> None:
        reached = {"replicas": {"count": 1, "addresses": [f"unix:{elsewhere}"], "urls": ["http://127.0.0.1:1"]}}
        async with ServerProcess({**SMALL, **reached, "backups": 0}) as server:
            assert all_answered(await drive(target(server.url), evenly(10, 1)))
            assert (await read_counters(server.url))["backend_up[replica-1]"] == 0
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "evenkeel", "worker", "--model", str(shipped.card_path("cifar10-base"))),
                *("--listen", f"unix:{elsewhere}"),
                stdout=asyncio.subprocess.DEVNULL,
            )
            try:
                await until(lambda counters: counters.get("backend_up[replica-1]") == 1, server.url)
                assert all_answered(await drive(target(server.url), evenly(10, 1)))
            finally:
                worker.terminate()
                assert await worker.wait() == 0

    asyncio.run(run())


def test_a_worker_that_cannot_start_is_told_in_one_line(tmp_path: Path) -> None:
    card = shipped.card_path("cifar10-base").read_text()
    (tmp_path / "card.json").write_text(card.replace("cifar10-base.onnx", "missing.onnx"))

    async def run() -> None:
        with pytest.raises(EvenkeelError, match=r"missing\.onnx"):
            async with ServerProcess({**SMALL, "model": str(tmp_path / "card.json"), "codes": ["replicate"]}):
                pass

    asyncio.run(run())


def test_an_image_whose_pass_never_ends_costs_no_other_request_although_both_workers_have_it(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import threading\nimport numpy as np\n"
        "def make():\n"
        "    def run(rows):\n"
        "        if (rows == 7).all():\n"
        "            threading.Event().wait()\n"
        "        return np.eye(10, dtype=np.float32)[rows[:, 0, 0, 0] % 10] * 9\n"
        "    return run\n"
    )
    config = {"replicas": 1, "backups": 1, "codes": ["replicate"], "run": f"python:{tmp_path}/hangs.py:make"}

    async def ask(session: aiohttp.ClientSession, pixel: int) -> tuple[int, float]:
        data = np.full((1, 32, 32, 3), pixel, np.uint8).tobytes()
        path, kind = "/v2/models/cifar10-base/infer", "application/octet-stream"
        headers = {"Inference-Header-Content-Length": "0", "Content-Type": kind}
        async with session.post(path, data=data, headers=headers) as response:
            found = await response.json()
            return response.status, found["outputs"][0]["data"][pixel % 10] if response.status == 200 else 0.0

    async def run() -> None:
        async with ServerProcess(config) as server, aiohttp.ClientSession(server.url) as session:
            assert await ask(session, 3) == (200, 9.0)
            poison = asyncio.create_task(ask(session, 7))
            others: list[asyncio.Task[tuple[int, float]]] = []
            while not poison.done():  # two a second
                others.append(asyncio.create_task(ask(session, 8 + len(others) % 200)))
                await asyncio.wait([poison], timeout=0.5)
            assert (await poison)[0] == 500
            assert await asyncio.gather(*others) == [(200, 9.0)] * len(others)
            assert (await read_counters(server.url))["failed"] == 1

    asyncio.run(run())
