"""What does a shared pass gain, for a model of which eight rows take as long as two single ones?

python benchmarks/batching.py [--seconds 5] [--json FILE]

One replica behind the gateway, whose model waits as a GPU would: 4 ms for one row, 8 ms for eight. A closed loop of 16
connections for throughput; an open loop at a tenth of what single passes can do for the latency of lone requests.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop
from output import show, write_json
from raw_client import drive, request_bytes
from trivial_server import NAME, trivial_config

from evenkeel.bench.serving.load import Target, drive as drive_open_loop
from evenkeel.bench.serving.server_process import ServerProcess
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.simulate import arrivals

_MODEL = Path(__file__).with_name("trivial_model.py").resolve()
_SIDE, _CONNECTIONS, _SINGLE_S = 32, 16, 0.004
_COLUMNS = {
    "max_batch": ("max_batch", "d"),
    "requests_per_s": ("requests/s", ".0f"),
    "p50_ms": ("p50 ms", ".1f"),
    "p99_ms": ("p99", ".1f"),
    "low_load_p50_ms": ("p50 at load .1", ".2f"),
    "low_load_p99_ms": ("p99", ".2f"),
}


async def measure(max_batch: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="batching-") as folder:
        config = trivial_config(Path(folder), _SIDE, "none", replicas=1, backups=0, max_batch=max_batch)
        config["run"] = f"python:{_MODEL}:make_batchable"
        async with ServerProcess(config) as server:
            images = np.random.default_rng(0).integers(0, 256, (1, _SIDE, _SIDE, 3), np.uint8)
            body, length = write_request([Tensor("images", "UINT8", images.shape, images)], binary=True)
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
            request = request_bytes(f"{server.url}/v2/models/{NAME}/infer", body, headers)
            requests = round(seconds / _SINGLE_S) * (1 if max_batch == 1 else 4)
            load = await asyncio.to_thread(drive, server.url, request, requests=requests, connections=_CONNECTIONS)
            target = Target(server.url, NAME, "images", images, None)
            times_s = arrivals(0.1 / _SINGLE_S, round(0.1 / _SINGLE_S * seconds), 0)
            records = await drive_open_loop(target, times_s, keys=False)
            low_ms = [record.latency_ms for record in records]
    return {
        "max_batch": max_batch,
        "requests_per_s": load.rate_per_s,
        "p50_ms": load.percentile_ms(50),
        "p99_ms": load.percentile_ms(99),
        "low_load_p50_ms": float(np.percentile(low_ms, 50)),
        "low_load_p99_ms": float(np.percentile(low_ms, 99)),
    }


@click.command(help=__doc__)
@click.option("--seconds", default=5.0)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(seconds: float, json_path: Path | None) -> None:
    async def run() -> list[dict[str, Any]]:
        return [await measure(max_batch, seconds) for max_batch in (1, 64, 1, 64)]

    rows = uvloop.run(run())
    show("a pass of 8 costs 2 passes of 1", rows, _COLUMNS)
    write_json(json_path, {"seconds": seconds}, rows)


if __name__ == "__main__":
    main()
