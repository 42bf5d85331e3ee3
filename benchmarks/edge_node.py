"""What does an edge node do for an image beside its model, and what does the cascade's decision cost?

    python benchmarks/edge_node.py [--requests 4000] [--rounds 3] [--json FILE]

The shipped light classifier answers everything (its data centre is not there), over one connection, in a closed loop:
the time of an answer, less the median pass of the same model alone, is what the node adds. The decision is timed in
this process: grant the promise, judge the scores, count the answer.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from output import show, write_json
from process_tree import adopt_orphans, cpu_s, end_all
from raw_client import drive, request_bytes

from evenkeel.bench.serving.server_process import ServerProcess
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import EvenkeelError
from evenkeel.models import shipped
from evenkeel.models.session import open_session
from evenkeel.oip import Tensor, write_request
from evenkeel.promises.certificate import load_certificate
from evenkeel.promises.promise import Promise
from evenkeel.serving.gateway.promise_gate import PromiseGate

_LIGHT = "cifar10-light"
_NODE = {"light": _LIGHT, "data_centre": "http://127.0.0.1:9", "policy": {"min_confidence": 0.0}}
_TARGETS = {"node_ms": 0.5, "decision_us": 20.0}


def images(count: int) -> np.ndarray:
    with np.load(shipped.IMAGES) as file:
        return np.asarray(file["images"][:count])


def pass_ms(rounds: int = 2000) -> float:
    """The median pass of the light model alone."""
    session = open_session(shipped.model_path(_LIGHT))
    name, pixels = session.get_inputs()[0].name, images(1)
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        session.run(None, {name: pixels})
        times.append(time.perf_counter() - began_s)
    return float(np.median(times)) * 1e3


async def node(requests: int) -> dict[str, Any]:
    async with ServerProcess(_NODE, "edge") as server:
        pixels = images(1)
        body, header_length = write_request(
            [Tensor("images", "UINT8", pixels.shape, pixels)], binary=True, parameters={"binary_data_output": True}
        )
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header_length)}
        request = request_bytes(f"{server.url}/v2/models/cifar10-base/infer", body, headers)
        await asyncio.to_thread(drive, server.url, request, requests=max(200, requests // 4))
        before_s = cpu_s([server.pid])
        load = await asyncio.to_thread(drive, server.url, request, requests=requests)
        cpu_us = (cpu_s([server.pid]) - before_s) / load.requests * 1e6
        if load.failed:
            raise EvenkeelError(f"{load.failed} of {load.requests} requests failed")
        alone_ms = pass_ms()
        return {
            "p50_ms": load.percentile_ms(50),
            "p99_ms": load.percentile_ms(99),
            "pass_ms": alone_ms,
            "node_ms": load.percentile_ms(50) - alone_ms,
            "cpu_us": cpu_us,
        }


def decision_us(repeats: int = 20_000) -> float:
    certificate = load_certificate(shipped.CERTIFICATE)
    gate = PromiseGate(certificate)
    code = Cascade(8, ScoreForm(10, certificate.temperature), kind=certificate.score, model=_LIGHT)
    promise = Promise("min_accuracy", shipped.PROMISED)
    rows = np.random.default_rng(0).normal(size=(64, 1, 10)).astype(np.float32)
    began_s = time.perf_counter()
    for number in range(repeats):
        grant = gate.grant(promise)
        answer = code.decode(1, {1: rows[number % 64]})[0]
        assert grant is not None
        if answer.confidence >= grant.threshold:
            grant.covers(answer.source)
    return (time.perf_counter() - began_s) / repeats * 1e6


@click.command(help=__doc__)
@click.option("--requests", default=4000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(requests: int, rounds: int, json_path: Path | None) -> None:
    adopt_orphans()
    rows = []
    try:
        for number in range(rounds):
            rows.append({"round": number, **asyncio.run(node(requests)), "decision_us": decision_us()})
    finally:
        end_all()
    columns = {
        "round": ("round", "d"),
        "p50_ms": ("p50 ms", ".3f"),
        "p99_ms": ("p99 ms", ".3f"),
        "pass_ms": ("pass ms", ".3f"),
        "node_ms": ("node's own ms", ".3f"),
        "cpu_us": ("its processor us", ".0f"),
        "decision_us": ("decision us", ".1f"),
    }
    show("an edge node, one connection", rows, columns)
    for key, target in _TARGETS.items():
        best = min(row[key] for row in rows)
        click.echo(f"{key}: {best:.3g}, at most {target:g} wanted: {'reached' if best <= target else 'NOT reached'}")
    write_json(json_path, {"requests": requests, "rounds": rounds}, rows)


if __name__ == "__main__":
    main()
