"""What does a compressed step of HookState cost for each coordinate and rank, and which part of it how much?

python benchmarks/hook.py [--length-log2 20,22] [--workers 4] [--bits 4] [--steps 12] [--json FILE]

The ranks are threads that exchange within this process, so there is no network in it. Figures are processor time of one
kernel thread per rank, in nanoseconds per coordinate of one bucket and per rank, of the median step; so other work on
the machine hardly counts. `all` is of the whole process: what it has more than the parts is exchanging, copying and
Python.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from output import show, write_json

import evenkeel
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.training.hook import bucket_average

OF_CODE, OF_WIRE = ("measure", "encode", "decode", "observe"), ("add", "pack_total")


class Bucket:
    """One parameter's gradient, as a hook reads it from DDP."""

    def __init__(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self._parameter, self._gradient = parameter, gradient

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> torch.Tensor:
        return self._gradient

    def gradients(self) -> list[torch.Tensor]:
        return [self._gradient.view(self._parameter.shape)]

    def parameters(self) -> list[torch.Tensor]:
        return [self._parameter]


def timed(work: Callable[..., Any], name: str, spent_s: dict[str, float]) -> Callable[..., Any]:
    """`work`, whose processor time is added to `spent_s`."""

    def call(*arguments: Any, **named: Any) -> Any:
        begin = time.thread_time()
        try:
            return work(*arguments, **named)
        finally:
            spent_s[name] = spent_s.get(name, 0.0) + time.thread_time() - begin

    return call


def measure(length: int, workers: int, bits: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    spent_s: dict[str, float] = {}
    states, buckets = [], []
    gradient = torch.randn(length, generator=torch.Generator().manual_seed(0))
    for ranks in thread_collectives(workers):
        state = evenkeel.HookState(evenkeel.THC(bits=bits), reducer=evenkeel.Sharded(ranks))
        code = state._code
        wire = code.wire(workers)
        for owner, names in ((code, OF_CODE), (wire, OF_WIRE)):
            for name in names:
                setattr(owner, name, timed(getattr(owner, name), name, spent_s))
        code.wire = lambda world, wire=wire: wire
        states.append(state)
        parameter = torch.nn.Parameter(torch.zeros(1, length))
        buckets.append(Bucket(parameter, gradient.clone()))
    taken: list[dict[str, float]] = []
    write = timed(bucket_average._write, "write", spent_s)
    with ThreadPoolExecutor(workers) as pool, patch.object(bucket_average, "_write", write):
        for _ in range(steps + 4):
            spent_s.clear()
            begin = time.process_time()
            futures = list(pool.map(lambda pair: pair[0].average(pair[1]), zip(states, buckets, strict=True)))
            for future in futures:
                future.wait()
            taken.append({"all": time.process_time() - begin, **spent_s})
    for state in states:
        state.close()
    names = taken[-1]
    per = 1e9 / length / workers
    return {name: statistics.median(step[name] for step in taken[4:]) * per for name in names}


@click.command()
@click.option("--length-log2", default="20,22", show_default=True, help="Logarithms of lengths, separated by commas.")
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--bits", type=click.IntRange(1, 8), default=4, show_default=True)
@click.option("--steps", type=click.IntRange(1, 12), default=10, show_default=True)  # the 16th measures errors
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(length_log2: str, workers: int, bits: int, steps: int, json_path: Path | None) -> None:
    rows = [
        {"length_log2": int(log2), **measure(2 ** int(log2), workers, bits, steps)} for log2 in length_log2.split(",")
    ]
    columns = {"length_log2": ("log2 length", ""), **{name: (name, ".2f") for name in rows[0] if name != "length_log2"}}
    show(f"THC, {bits} bits, error feedback, {workers} ranks: processor ns per coordinate and rank", rows, columns)
    write_json(json_path, {"workers": workers, "bits": bits, "steps": steps}, rows)


if __name__ == "__main__":
    main()
