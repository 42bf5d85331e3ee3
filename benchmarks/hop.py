"""What does one hop through the gateway cost: client, gateway, trivial worker and back?

python benchmarks/hop.py [--requests 4000] [--rounds 3] [--json FILE]

One connection, one item of uint8 pixels a request, binary tensors, closed loop; beside it the floors: the same bytes
sent back by the HTTP server alone, and the same item sent to the worker alone; and what a remote replica costs: the hop
through a gateway whose replica is another gateway, reached by the Open Inference Protocol, where only the processor
time of the first counts. Then, in an open loop at half the load of nine replicas and one backup under the two-mode law,
what a request costs the gateway's process with and without collages; there the two take turns, so that both meet the
same machine.
"""

import asyncio
import socket
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
from numpy.typing import NDArray
from output import show, write_json
from process_tree import adopt_orphans, cpu_s, end_all
from raw_client import Connection, Load, drive, request_bytes
from trivial_server import NAME, trivial_config

from evenkeel.backends.backend import Reply
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.bench.serving.load import Target, drive as drive_open_loop
from evenkeel.bench.serving.server_process import ServerProcess
from evenkeel.delays.text import parse_delay
from evenkeel.errors import EvenkeelError
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.simulate import arrivals

_HERE = Path(__file__).resolve().parent
_TARGETS_MS = {32: 0.30, 224: 0.75}  # p50 of one hop, by side of the item
_POLICIES = ("none", "collage+hedge")
_REPLICAS, _LOAD = 9, 0.5
_TURNS = 4  # of the own worker and the remote replica
_OCTETS = {"Content-Type": "application/octet-stream"}


def _items(side: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def _inference_request(url: str, side: int) -> bytes:
    item = _items(side, 1)
    body, header_length = write_request(
        [Tensor("images", "UINT8", item.shape, item)], binary=True, parameters={"binary_data_output": True}
    )
    headers = {**_OCTETS, "Inference-Header-Content-Length": str(header_length)}
    return request_bytes(f"{url}/v2/models/{NAME}/infer", body, headers)


def _closed_loop(url: str, pid: int, request: bytes, requests: int) -> dict[str, float]:
    drive(url, request, requests=max(200, requests // 4))
    before_s = cpu_s([pid])
    load = drive(url, request, requests=requests)
    if load.failed:
        raise EvenkeelError(f"{load.failed} of {load.requests} requests failed")
    return {**_percentiles(load), "cpu_us_per_request": (cpu_s([pid]) - before_s) / load.requests * 1e6}


def _percentiles(load: Load) -> dict[str, float]:
    return {"p50_ms": load.percentile_ms(50), "p99_ms": load.percentile_ms(99)}


def echo(side: int, requests: int) -> dict[str, float]:
    """The floor of the front end: as many bytes through the same server without any of our code."""
    with _echo_server() as (url, pid):
        return _closed_loop(url, pid, request_bytes(url + "/", _items(side, 1).tobytes(), _OCTETS), requests)


@contextmanager
def _echo_server() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(_HERE / "echo_server.py"), str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        until_s = time.monotonic() + 20
        while True:
            try:
                Connection(url).close()
                break
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


async def framed(side: int, requests: int) -> dict[str, float]:
    """The floor of the back end: the item to a worker and the scores back, without the gateway and without HTTP."""
    model = f"{NAME}=python:{_HERE / 'trivial_model.py'}:make"
    backend = ProcessBackend("worker", WorkerConfig(models=(model,), listen="tcp://127.0.0.1:0"), [NAME])
    loop = asyncio.get_running_loop()
    item = _items(side, 1)
    latencies_s: list[float] = []
    await backend.start()
    try:
        for number in range(requests + 500):
            sent_s = time.perf_counter()
            replied: asyncio.Future[Reply] = loop.create_future()
            backend.submit(NAME, item, replied.set_result)
            reply = await replied
            if reply.error is not None:
                raise reply.error
            if number >= 500:
                latencies_s.append(time.perf_counter() - sent_s)
    finally:
        await backend.close()
    return _percentiles(Load(np.array(latencies_s) * 1e3, sum(latencies_s), 0))


async def hop(side: int, policy: str, requests: int) -> dict[str, float]:
    """Through `evenkeel serve`."""
    with tempfile.TemporaryDirectory(prefix="hop-") as folder:
        config = trivial_config(Path(folder), side, policy, replicas=1, backups=1)
        async with ServerProcess(config) as server:
            return _closed_loop(server.url, server.pid, _inference_request(server.url, side), requests)


async def remote_hop(side: int, requests: int) -> list[dict[str, Any]]:
    """Through a gateway with an own worker, and through one whose replica is that gateway, in turns."""
    with tempfile.TemporaryDirectory(prefix="hop-") as folder, tempfile.TemporaryDirectory(prefix="hop-") as other:
        own = trivial_config(Path(folder), side, "none", replicas=1, backups=0)
        async with ServerProcess(own) as worker_gateway:
            nodes = {"count": 0, "urls": [worker_gateway.url]}
            remote = trivial_config(Path(other), side, "none", replicas=nodes, backups=0)
            async with ServerProcess(remote) as remote_gateway:
                servers = {"own worker": worker_gateway, "remote replica": remote_gateway}
                rows: dict[str, list[dict[str, float]]] = {what: [] for what in servers}
                for _ in range(_TURNS):
                    for what, server in servers.items():
                        request = _inference_request(server.url, side)
                        rows[what].append(_closed_loop(server.url, server.pid, request, requests // _TURNS))
    return [{"what": what, **_means(measured)} for what, measured in rows.items()]


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


async def open_loop(policy: str, scale: float, requests: int, seed: int) -> dict[str, float]:
    """Processor time of the gateway's process for a request, at half the load, under the two-mode law."""
    delay = f"two-mode:scale={scale:g},seed={seed}"
    rate_per_s = _LOAD * _REPLICAS / parse_delay(delay).mean_s
    times_s = arrivals(rate_per_s, requests, seed)
    with tempfile.TemporaryDirectory(prefix="hop-") as folder:
        config = trivial_config(Path(folder), 32, policy, replicas=_REPLICAS, backups=1, delay=delay)
        async with ServerProcess(config) as server:
            target = Target(server.url, NAME, "images", _items(32, 100), None)
            # The live quantiles have to know the law before collages and hedges are what they will be.
            await drive_open_loop(target, times_s[: requests // 4])
            before_s = cpu_s([server.pid])
            records = await drive_open_loop(target, times_s)
            took_s = cpu_s([server.pid]) - before_s
    failed = sum(not record.answered for record in records)
    if failed:
        raise EvenkeelError(f"{failed} of {requests} requests failed")
    latencies_ms = np.array([record.latency_ms for record in records])
    return {
        "rate_per_s": rate_per_s,
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p99_ms": float(np.percentile(latencies_ms, 99)),
        "cpu_us_per_request": took_s / requests * 1e6,
        "filled": sum(record.source == "collage" for record in records) / requests,
    }


def closed_loop_rows(requests: int) -> Iterator[dict[str, Any]]:
    """Floors and hops, for both sizes."""
    for side, target_ms in _TARGETS_MS.items():
        about = {"item_bytes": side * side * 3}
        yield {"what": "echo, HTTP alone", **about, **echo(side, requests)}
        yield {"what": "worker alone", **about, **uvloop.run(framed(side, requests))}
        for policy in _POLICIES:
            row = {"what": "hop", "policy": policy, **about, **uvloop.run(hop(side, policy, requests))}
            yield {**row, "target_p50_ms": target_ms} if policy == "none" else row


def remote_rows(requests: int) -> Iterator[dict[str, Any]]:
    """An own worker and a remote replica, for both sizes."""
    for side in _TARGETS_MS:
        own, remote = uvloop.run(remote_hop(side, requests))
        yield {**own, "item_bytes": side * side * 3}
        ratio = remote["cpu_us_per_request"] / own["cpu_us_per_request"]
        yield {**remote, "item_bytes": side * side * 3, "cpu_ratio": ratio}


def open_loop_rows(scale: float, requests: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Every policy in every round, and the mean over the rounds of each."""
    rows: dict[str, list[dict[str, float]]] = {policy: [] for policy in _POLICIES}
    for number in range(rounds):
        for policy in _POLICIES:
            rows[policy].append(uvloop.run(open_loop(policy, scale, requests, number + 1)))
            yield {"what": "open loop", "policy": policy, "round": number + 1, **rows[policy][-1]}
    for policy, measured in rows.items():
        yield {"what": "open loop, mean", "policy": policy, **_means(measured)}


@click.command(help=__doc__)
@click.option("--requests", default=4000, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Of the open loop; 0 leaves it out.")
@click.option("--remote-only", is_flag=True, help="Nothing but the remote replica and the own worker beside it.")
@click.option("--scale", default=0.05, show_default=True, help="Of the two-mode law; .05 asks 585 items a second.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here as well.")
def main(requests: int, rounds: int, remote_only: bool, scale: float, json_path: Path | None) -> None:
    adopt_orphans()
    try:
        hops = [] if remote_only else list(closed_loop_rows(requests))
        remotes = list(remote_rows(requests))
        loops = list(open_loop_rows(scale, requests, rounds)) if rounds and not remote_only else []
    finally:
        end_all()
    times = {
        "p50_ms": ("p50 ms", ".3f"),
        "p99_ms": ("p99 ms", ".3f"),
        "cpu_us_per_request": ("server CPU us/req", ".0f"),
    }
    names = {"what": ("what", ""), "policy": ("policy", "")}
    size = {"item_bytes": ("bytes", "d")}
    if hops:
        columns = {**names, **size, **times, "target_p50_ms": ("p50 wanted", ".2f")}
        show("One hop, one connection", hops, columns)
    columns = {"what": names["what"], **size, **times, "cpu_ratio": ("CPU, remote / own (wanted: 1.50)", ".2f")}
    show("What a remote replica costs its gateway", remotes, columns)
    if loops:
        columns = {
            **names,
            "round": ("round", "d"),
            "rate_per_s": ("req/s", ".0f"),
            **times,
            "filled": ("filled", ".1%"),
        }
        show(f"Nine replicas, one backup, load {_LOAD}", loops, columns)
        without, with_collages = (row["cpu_us_per_request"] for row in loops[-2:])
        click.echo(f"CPU of the gateway, collage+hedge / none: {with_collages / without:.3f} (wanted: at most 1.15)")
    write_json(json_path, {"requests": requests, "rounds": rounds, "scale": scale}, [*hops, *remotes, *loops])


if __name__ == "__main__":
    main()
