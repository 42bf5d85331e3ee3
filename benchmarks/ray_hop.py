"""What does a task cost at a worker that Ray hosts, beside a worker on local TCP, and beside a call of a Ray actor?

python benchmarks/ray_hop.py [--requests 3000] [--rounds 5] [--deaths 5] [--json FILE]

Run it where Ray is installed. It starts a cluster of one node on this machine. The same trivial model stands behind all
three; one task at a time, from this process for the workers and from one of its own for Ray's call, so that Ray's
threads do not count against the workers. They take turns, so that all meet the same machine. Processor time is the
caller's, all threads. Then the hosted worker's process is killed again and again: how long until its backend is out,
and until it is back?
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop
from output import show, write_json
from process_tree import adopt_orphans, end_all

from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.ray_actors.engine import RayEngine, RayWorkers
from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import EvenkeelError

_HERE = Path(__file__).resolve().parent
_SPEC = f"python:{_HERE / 'trivial_model.py'}:make"
_MODEL = "trivial_model"
_SIDES = (32, 224)
_KEY = "of this benchmark alone"
_MAX_HOP, _MIN_SAVED = 1.2, 8.0  # to reach, at 3 KB
_STORE = 200 << 20


def _item(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)


def _figures(latencies_s: list[float], used_s: float) -> dict[str, float]:
    p50, p99 = np.percentile(latencies_s, [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99), "cpu_us": used_s / len(latencies_s) * 1e6}


def actor_caller() -> None:
    """The other process: starts a cluster, says its address, and calls an actor as often as each line of input says."""
    import ray
    from ray.cluster_utils import Cluster
    from trivial_model import make

    class Actor:
        def __init__(self) -> None:
            self._model = make()

        def infer(self, rows: Any) -> Any:
            return self._model(rows)

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    head = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": _STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        actor = ray.remote(num_cpus=1)(Actor).remote()
        print(json.dumps(cluster.address), flush=True)
        for line in sys.stdin:
            side, requests = map(int, line.split())
            item = _item(side)
            latencies_s, before_s = [], time.process_time()
            for _ in range(requests):
                began_s = time.perf_counter()
                ray.get(actor.infer.remote(item))
                latencies_s.append(time.perf_counter() - began_s)
            print(json.dumps(_figures(latencies_s, time.process_time() - before_s)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def _ray_side() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, __file__, "--as-actor-caller"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, next(json.loads(line) for line in process.stdout if line.startswith('"'))
        finally:
            process.stdin.close()
            process.wait(30)


def _call_actor(process: subprocess.Popen[str], side: int, requests: int) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{side} {requests}\n")
    process.stdin.flush()
    figures: dict[str, float] = json.loads(process.stdout.readline())
    return figures


async def _one(backend: Backend, item: np.ndarray) -> None:
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    backend.submit(_MODEL, item, future.set_result)
    if (error := (await future).error) is not None:
        raise error


async def _hop(backend: Backend, side: int, requests: int) -> dict[str, float]:
    item = _item(side)
    latencies_s, before_s = [], time.process_time()
    for _ in range(requests):
        began_s = time.perf_counter()
        await _one(backend, item)
        latencies_s.append(time.perf_counter() - began_s)
    return _figures(latencies_s, time.process_time() - before_s)


@contextmanager
def _local_worker() -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w") as key:
        key.write(_KEY)
        key.flush()
        command = [sys.executable, "-m", "evenkeel.backends.worker.main", "--model", _SPEC, "--key-file", key.name]
        command += ["--listen", "tcp://127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().rpartition(" ")[2].strip()
            finally:
                process.terminate()


async def _die(backend: WorkerBackend) -> dict[str, float]:
    """Kills the worker's process; seconds until it is out, and until it is back."""
    assert backend.hello is not None
    began_s = time.perf_counter()
    os.kill(backend.hello.pid, signal.SIGKILL)
    moments = []
    for ready in (False, True):
        while backend.ready is not ready:
            await asyncio.sleep(0.001)
        moments.append(time.perf_counter() - began_s)
    await _one(backend, _item(32))
    return {"out_s": moments[0], "back_s": moments[1]}


async def _measure(
    process: subprocess.Popen[str], address: str, local_address: str, requests: int, rounds: int, deaths: int
) -> list[dict[str, Any]]:
    local = WorkerBackend("local", local_address, [_MODEL], ClientOptions(key=_KEY.encode()))
    config = WorkerConfig((_SPEC,), "tcp://127.0.0.1:0")
    workers = RayWorkers(RayEngine(address), "trivial/replica", RayOptions(1, address), config, [_MODEL])
    hosted = workers.make("hosted")
    rows: list[dict[str, Any]] = []
    try:
        await asyncio.gather(local.start(), hosted.start())
        for side in _SIDES:
            for number in range(-1, rounds):  # the first is not counted
                count = requests if number >= 0 else requests // 4
                both = {"worker on local TCP": local, "worker in a Ray actor": hosted}
                found = {name: await _hop(backend, side, count) for name, backend in both.items()}
                found["call of a Ray actor"] = await asyncio.to_thread(_call_actor, process, side, count)
                rows += [{"side": side, "who": who, "round": number, **row} for who, row in found.items()]
        for number in range(deaths):
            rows.append({"who": "death of the hosted worker", "round": number, **await _die(hosted)})
    finally:
        await asyncio.gather(local.close(), hosted.close())
    return [row for row in rows if row["round"] >= 0]


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median of the rounds."""
    table = []
    for side in _SIDES:
        for who in dict.fromkeys(row["who"] for row in rows if row.get("side") == side):
            of_it = [row for row in rows if row.get("side") == side and row["who"] == who]
            medians = {key: float(np.median([row[key] for row in of_it])) for key in ("p50_ms", "p99_ms", "cpu_us")}
            table.append({"KB": side * side * 3 / 1024, "who": who, **medians})
    return table


@click.command(help=__doc__)
@click.option("--requests", type=click.IntRange(10), default=3000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--deaths", type=click.IntRange(0), default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as-actor-caller", is_flag=True, hidden=True)
def main(requests: int, rounds: int, deaths: int, json_file: Path | None, as_actor_caller: bool) -> None:
    if as_actor_caller:
        actor_caller()
        return
    adopt_orphans()
    try:
        with _ray_side() as (process, address), _local_worker() as local:
            rows = uvloop.run(_measure(process, address, local, requests, rounds, deaths))
    except EvenkeelError as error:
        raise click.ClickException(str(error)) from None
    finally:
        end_all()
    table = _table(rows)
    columns = {"KB": ("KB", ".0f"), "who": ("", ""), "p50_ms": ("p50, ms", ".3f"), "p99_ms": ("p99, ms", ".3f")}
    show("One task at a time", table, {**columns, "cpu_us": ("processor time of the caller, us", ".0f")})
    tcp, hosted, call = table[:3]
    hop, saved = hosted["p50_ms"] / tcp["p50_ms"], call["cpu_us"] / hosted["cpu_us"]
    click.echo(f"p50 of the hosted worker: {hop:.2f} times that on local TCP (to reach: {_MAX_HOP} at most)")
    click.echo(f"processor time of Ray's call: {saved:.1f} times that of the hosted worker (to reach: {_MIN_SAVED:g})")
    if deaths:
        fates = [row for row in rows if "out_s" in row]
        out_s, back_s = (max(row[key] for row in fates) for key in ("out_s", "back_s"))
        click.echo(f"a dead actor was out after {out_s:.3f} s and back after {back_s:.2f} s, the longest of {deaths}")
    write_json(json_file, {"requests": requests, "rounds": rounds, "deaths": deaths}, rows)


if __name__ == "__main__":
    main()
