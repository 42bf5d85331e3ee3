"""What does one hop to a worker process cost? Round trip and CPU of the client, at 3 KB and 150 KB.

Run: python benchmarks/hop.py
"""

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np
import uvloop

from evenkeel.backends.backend import Reply
from evenkeel.backends.process import ProcessBackend
from evenkeel.backends.session import ClientOptions
from evenkeel.backends.worker_config import WorkerConfig

__all__ = ["SIZES", "measure_backend"]

SIZES = {"3 KB": (1, 32, 32, 3), "150 KB": (1, 224, 224, 3)}
MODEL = f"trivial=python:{Path(__file__).with_name('trivial_model.py')}:make"


async def measure_backend(shape: tuple[int, ...], count: int, share: bool = True) -> dict[str, float]:
    """Milliseconds of `count` round trips, one after the other, and the client's CPU microseconds for each."""
    options = ClientOptions() if share else ClientOptions(share_slots=0)
    backend = ProcessBackend("hop", WorkerConfig((MODEL,), "unix:/unused"), ("trivial",), options)
    await backend.start()
    try:
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        loop = asyncio.get_running_loop()
        times_s = []
        for number in range(-count // 10, count):  # the first are not counted
            if number == 0:
                cpu_s = time.process_time()
            began_s = time.perf_counter()
            reply: asyncio.Future[Reply] = loop.create_future()
            backend.submit("trivial", image, reply.set_result)
            error = (await reply).error
            if error is not None:
                raise error
            if number >= 0:
                times_s.append(time.perf_counter() - began_s)
        cpu_s = time.process_time() - cpu_s
    finally:
        await backend.close()
    p50_s, p99_s = np.percentile(times_s, [50, 99])
    return {"p50_ms": p50_s * 1e3, "p99_ms": p99_s * 1e3, "client_cpu_us": cpu_s / count * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="round trips of each kind")
    count = parser.parse_args().count
    print(f"{'item':>8} {'through':>14} {'p50 ms':>8} {'p99 ms':>8} {'client CPU us':>14}")
    for name, shape in SIZES.items():
        for share in (False, True):
            if share and int(np.prod(shape)) < ClientOptions().share_from_bytes:
                continue
            row = uvloop.run(measure_backend(shape, count, share))
            through = "shared memory" if share else "socket"
            print(f"{name:>8} {through:>14} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {row['client_cpu_us']:14.0f}")


if __name__ == "__main__":
    main()
