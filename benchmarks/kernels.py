"""How long do THC's kernels take for each coordinate, beside their plain twins and beside copying memory?

python benchmarks/kernels.py [--length-log2 22] [--workers 4] [--threads 1,2] [--device cpu] [--json FILE]

One row per operation: the twin and the kernel in one thread, the kernel in more, and the floor: the fewest bytes that
the operation has to read and write, at the bandwidth of a plain copy in one thread, measured in the same run. Times are
the least of `--repeats`, in nanoseconds per coordinate of the vector; adding is for all of the workers' parts. On a
machine that is busy with something else only the processor time, of one thread, means anything.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from output import show, write_json

from evenkeel.coding.sums.kernels import twins_only
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total


def least_s(work: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Seconds, and processor seconds, of the fastest of `repeats` calls after one that warms up."""
    taken, processor = [], []
    for _ in range(repeats + 1):
        begin, processor_begin = time.perf_counter(), time.process_time()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
        processor.append(time.process_time() - processor_begin)
    return min(taken[1:]), min(processor[1:])


def operations(length: int, workers: int, device: torch.device) -> dict[str, tuple[Callable[[], object], float]]:
    """What is measured, and how many bytes it has to move for each coordinate."""
    code, this_round = THC(), Round(0, workers)
    vector = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(device)
    stats = code.measure(vector, this_round)
    lanes, wire = code.lanes(length, this_round), code.wire(workers)
    parts = [code.encode(vector, stats, Round(rank, workers)) for rank in range(workers)]
    total = wire.add(parts, lanes)
    packed = wire.pack_total(total)
    up, down, lane = code.bits / 8, wire.down_width / 8, total.itemsize
    return {
        "measure": (lambda: code.measure(vector, this_round), 4),
        "encode": (lambda: code.encode(vector, stats, this_round), 4 + up),
        "add": (lambda: wire.add(parts, lanes), workers * up + lane),
        "pack_total": (lambda: wire.pack_total(total), lane + down),
        "unpack_total": (lambda: wire.unpack_total(packed, lanes), down + lane),
        "decode": (lambda: code.decode(Total(total, workers), stats, length, this_round), lane + 4),
        "decode_packed": (
            lambda: code.decode(Total(packed, workers, packed=True), stats, length, this_round),
            down + 4,
        ),
    }


def measure(length: int, workers: int, threads: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    source = torch.zeros(length, device=device)
    target = torch.empty_like(source)
    copy_s_per_byte = least_s(lambda: target.copy_(source), repeats, device)[0] / (8 * length)
    rows = []
    for name, (work, moved_bytes) in operations(length, workers, device).items():
        torch.set_num_threads(1)
        row: dict[str, Any] = {"operation": name, "floor_ns": moved_bytes * copy_s_per_byte * 1e9}
        with twins_only():
            row["twin_ns"] = least_s(work, max(1, repeats // 5), device)[0] / length * 1e9
        for count in threads:
            torch.set_num_threads(count)
            best_s, processor_s = least_s(work, repeats, device)
            row.setdefault("processor_ns", processor_s / length * 1e9)
            row[f"kernel_{count}_threads_ns"] = best_s / length * 1e9
        row["scaling"] = row[f"kernel_{threads[0]}_threads_ns"] / row[f"kernel_{threads[-1]}_threads_ns"]
        rows.append(row)
    return rows


@click.command()
@click.option("--length-log2", type=click.IntRange(12, 28), default=22, show_default=True)
@click.option("--workers", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads, separated by commas.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(length_log2: int, workers: int, threads: str, repeats: int, device: str, json_path: Path | None) -> None:
    counts = [int(count) for count in threads.split(",")]
    rows = measure(2**length_log2, workers, counts, repeats, torch.device(device))
    columns = {
        "operation": ("operation", ""),
        "twin_ns": ("twin ns", ".2f"),
        **{f"kernel_{count}_threads_ns": (f"kernel ns, {count} threads", ".2f") for count in counts},
        "scaling": ("scaling", ".2f"),
        "floor_ns": ("copy floor ns", ".2f"),
        "processor_ns": (f"processor ns, {counts[0]} threads", ".2f"),
    }
    show(f"THC, 4 bits, 2^{length_log2} coordinates, {workers} workers: ns per coordinate", rows, columns)
    arguments = {"length": 2**length_log2, "workers": workers, "threads": counts, "repeats": repeats, "device": device}
    write_json(json_path, arguments, rows)


if __name__ == "__main__":
    main()
