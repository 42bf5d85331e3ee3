"""What do keys and TLS cost the gateway?

python benchmarks/tls.py [--requests 8000] [--rounds 5] [--json FILE]

One connection that is kept, one item of uint8 pixels a request, binary tensors, closed loop, through gateways that
differ by nothing but what guards them; they take turns, so that all meet the same machine. Processor time is that of
the gateway's process alone. Then a new connection for each request: what a handshake costs, with a P-256 certificate.
Needs openssl.
"""

import ssl
import subprocess
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop
from output import show, write_json
from process_tree import cpu_s
from raw_client import drive, request_bytes
from trivial_server import NAME, trivial_config

from evenkeel.bench.serving.server_process import ServerProcess
from evenkeel.errors import EvenkeelError
from evenkeel.oip import Tensor, write_request

_KEY = "a-key-of-the-benchmark-0001"
_GUARDS = ("nothing", "key", "TLS", "TLS and key")
_MAX_ADDED = 0.15  # processor time that TLS may add at 3 KB


def _certificate(folder: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "own.key", "-out", "own.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


def _config(folder: Path, guard: str, side: int, policy: str) -> dict[str, Any]:
    config = trivial_config(folder, side, policy, replicas=1, backups=1)
    if "TLS" in guard:
        config["tls"] = {"certificate": str(folder / "own.pem"), "key": str(folder / "own.key")}
    if "key" in guard:
        config["keys"] = {"file": str(folder / "keys")}
    return config


def _request(url: str, side: int) -> bytes:
    item = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    tensor = Tensor("images", "UINT8", item.shape, item)
    body, length = write_request([tensor], binary=True, parameters={"binary_data_output": True})
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
    return request_bytes(f"{url}/v2/models/{NAME}/infer", body, headers | {"Authorization": f"Bearer {_KEY}"})


def _measure(server: ServerProcess, request: bytes, tls: ssl.SSLContext, requests: int) -> dict[str, float]:
    before_s = cpu_s([server.pid])
    load = drive(server.url, request, requests=requests, tls=tls)
    if load.failed:
        raise EvenkeelError(f"{load.failed} of {load.requests} requests failed")
    used_us = (cpu_s([server.pid]) - before_s) / load.requests * 1e6
    return {"cpu_us": used_us, "p50_ms": load.percentile_ms(50), "p99_ms": load.percentile_ms(99)}


async def measure(side: int, policy: str, requests: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each guard on a kept connection, and for each with a connection for each request."""
    async with AsyncExitStack() as stack:
        servers: dict[str, ServerProcess] = {}
        for guard in _GUARDS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tls-")))
            _certificate(folder)
            (folder / "keys").write_text(f"benchmark {_KEY}\n")
            (folder / "keys").chmod(0o600)
            servers[guard] = await stack.enter_async_context(ServerProcess(_config(folder, guard, side, policy)))
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for number in range(rounds + 1):
            for guard, server in servers.items():
                request = _request(server.url, side)
                kept = _measure(server, request, context, requests)
                before_s, count = cpu_s([server.pid]), max(200, requests // 8)
                for _ in range(count):
                    drive(server.url, request, requests=1, tls=context)
                fresh = {"cpu_us": (cpu_s([server.pid]) - before_s) / count * 1e6}
                if number:  # the first round warms up
                    found.setdefault((guard, "kept"), []).append(kept)
                    found.setdefault((guard, "a new one each"), []).append(fresh)
    rows = []
    for (guard, connection), measured in found.items():
        median = {key: float(np.median([one[key] for one in measured])) for key in measured[0]}
        plain = np.array([one["cpu_us"] for one in found["nothing", connection]])
        added = np.array([one["cpu_us"] for one in measured]) / plain - 1  # round by round
        rows.append({"guard": guard, "connection": connection, "side": side, "policy": policy, **median,
                     "added": float(np.median(added)), "added_low": float(added.min()),
                     "added_high": float(added.max())})  # fmt: skip
    return rows


@click.command()
@click.option("--requests", default=8000, help="Requests in a turn.")
@click.option("--rounds", default=5, help="Turns of each gateway.")
@click.option("--side", default=32, help="Side of an item in pixels: 32 is 3 KB.")
@click.option("--policy", default="collage+hedge", help="Policy of the gateways.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for the rows.")
def main(requests: int, rounds: int, side: int, policy: str, json_path: Path | None) -> None:
    """What do keys and TLS cost the gateway?"""
    rows = uvloop.run(measure(side, policy, requests, rounds))
    columns = {
        "guard": ("guard", ""), "connection": ("connection", ""), "cpu_us": ("us/request", ".1f"),
        "added": ("added", "+.1%"), "added_low": ("least", "+.1%"), "added_high": ("most", "+.1%"),
        "p50_ms": ("p50 ms", ".3f"), "p99_ms": ("p99 ms", ".3f"),
    }  # fmt: skip
    show(f"Processor time of the gateway, items of {side}x{side}x3, {policy}", rows, columns)
    (tls,) = [row for row in rows if (row["guard"], row["connection"]) == ("TLS", "kept")]
    click.echo(f"TLS adds {tls['added']:+.1%}; at most {_MAX_ADDED:.0%} is wanted at 3 KB")
    arguments = {"requests": requests, "rounds": rounds, "side": side, "policy": policy}
    write_json(json_path, arguments, rows)


if __name__ == "__main__":
    main()
