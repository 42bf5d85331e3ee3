"""How long does it take to average the gradient of a convolutional network, by plain all-reduce and by each code?

evenkeel lab run --hosts 4 --rate 100mbit -- python benchmarks/aggregation.py [--rounds 400] [--json FILE]

Every round begins at the same moment on all ranks, and ends when the average lies in the bucket: encoding, exchanges,
adding and decoding are in it, and waiting for a slower rank's coding too, but no training. So it is what a step would
take longer if nothing were hidden behind its computation. `mean` is over all rounds, so that GradiVeQ's rounds of
samples and of learning are in it; `median` is an ordinary round's. The gradients are noise, which takes as many
directions as a code allows: real ones would take no longer.
"""

import os
import statistics
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from hook import Bucket
from output import show, write_json
from torch import Tensor

import evenkeel
from evenkeel.coding.sums.by_name import code_of
from evenkeel.reducers.ranks.collectives import ring_bytes
from evenkeel.training.hook.stats import HookStats
from evenkeel.training.plan.measure import group_from_environment

_CODES = (
    "thc",
    "gradiveq",
    *(f"gradiveq:ratio={ratio}+thc" for ratio in (8, 4, 2)),
    "lowrank:rank=16+thc:block=512",
)


def resnet32() -> list[tuple[int, ...]]:
    """The weights of the ResNet-32 for CIFAR-100 that GradiVeQ's paper trains: .46 M in convolutions, a small head."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    inside = 16
    for outside in (16, 32, 64):
        for _ in range(10):
            shapes.append((outside, inside, 3, 3))
            inside = outside
    return [*shapes, (100, inside)]


class Network(Bucket):
    """One bucket of many parameters' gradients."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self._weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self._flat = torch.zeros(sum(map(prod, shapes)))

    def buffer(self) -> Tensor:
        return self._flat

    def gradients(self) -> list[Tensor]:
        pieces = torch.split(self._flat, [weight.numel() for weight in self._weights])
        return [piece.view(weight.shape) for piece, weight in zip(pieces, self._weights, strict=True)]

    def parameters(self) -> list[Tensor]:
        return list(self._weights)


def rounds_s(average: Callable[[], object], bucket: Network, noise: Tensor, rounds: int) -> list[float]:
    """Seconds of each round after the first two: those open connections and, for our codes, are not compressed yet."""
    seconds = []
    for place in range(rounds + 2):
        bucket.buffer().copy_(noise.roll(place))
        dist.barrier()
        begin = time.perf_counter()
        average()
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


@click.command()
@click.option("--rounds", type=click.IntRange(20), default=400, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(rounds: int, json_path: Path | None) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shapes = resnet32()
    with group_from_environment("gloo") as rank:
        bucket, workers = Network(shapes), dist.get_world_size()
        noise = torch.randn(bucket.buffer().numel(), generator=torch.Generator().manual_seed(rank))
        rows: list[dict[str, Any]] = []

        def add(name: str, seconds: list[float], sent_bytes: float, stats: HookStats | None = None) -> None:
            row: dict[str, Any] = {
                "code": name,
                "median_ms": statistics.median(seconds) * 1e3,
                "mean_ms": statistics.mean(seconds) * 1e3,
                "sent_kb": sent_bytes / 1e3,
            }
            first = rows[0] if rows else row
            row["times_faster"] = first["mean_ms"] / row["mean_ms"]
            row["ratio"] = first["sent_kb"] / row["sent_kb"]
            if stats is not None:
                for part in ("encode_s", "add_s", "communicate_s", "decode_s"):
                    row[part.replace("_s", "_ms")] = getattr(stats, part) / stats.compressed_steps * 1e3
            rows.append(row)

        plain_s = rounds_s(lambda: dist.all_reduce(bucket.buffer()), bucket, noise, rounds // 4)
        add("fp32 all-reduce", plain_s, ring_bytes(bucket.buffer(), workers))
        for name in _CODES:
            state = evenkeel.HookState(code_of(name))
            seconds = rounds_s(lambda state=state: state.average(bucket).wait(), bucket, noise, rounds)
            stats = state.stats()
            add(name, seconds, stats.sent_bytes / stats.compressed_steps, stats)
            state.close()
        if rank == 0:
            columns = {
                "code": ("code", ""),
                "mean_ms": ("mean ms", ".1f"),
                "median_ms": ("median ms", ".1f"),
                "times_faster": ("times faster", ".2f"),
                "sent_kb": ("KB sent", ".0f"),
                "ratio": ("ratio", ".1f"),
                "encode_ms": ("encode ms", ".1f"),
                "add_ms": ("add ms", ".1f"),
                "communicate_ms": ("exchange ms", ".1f"),
                "decode_ms": ("decode ms", ".1f"),
            }
            show(f"{workers} workers, {len(noise) / 1e6:.2f} M gradients, {rounds} rounds", rows, columns)
            write_json(json_path, {"workers": workers, "rounds": rounds}, rows)


if __name__ == "__main__":
    main()
