"""How long does it take to encode a collage, and how near is that to copying its bytes?

python benchmarks/encode.py [--grid 3] [--sides 32,224] [--repeats 300] [--json FILE]

Tiles were shrunk when they arrived, so encoding is what stands between an idle backup and its task. Beside each time
stands the floor: the canvas's bytes over the bandwidth of a plain copy of as many bytes, measured in the same run.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import evenkeel
from evenkeel.coding.answers import Collage, Pixels, ScoreForm
from evenkeel.models.cards import Layout

LAYOUTS: tuple[Layout, Layout] = ("NHWC", "NCHW")


def times_ms(work: Callable[[], object], repeats: int) -> np.ndarray:
    """Milliseconds of each of `repeats` calls, after a few that warm up."""
    taken = []
    for _ in range(repeats + 10):
        begin = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begin) * 1e3)
    return np.array(taken[10:])


def measure(grid: int, side: int, layout: Layout, items: int, repeats: int) -> dict[str, Any]:
    code = Collage(grid, side, ScoreForm(10), pixels=Pixels(layout))
    random = np.random.default_rng(0)
    tiles = [random.integers(0, 256, code.pixels.shape(side, side), np.uint8) for _ in range(items)]
    source = code.spares(tiles)[0].inputs
    target = np.empty_like(source)
    encode_ms = times_ms(lambda: code.spares(tiles), repeats)
    copy_ms = times_ms(lambda: np.copyto(target, source), repeats)
    return {
        "grid": grid,
        "tile_side_pixels": side,
        "layout": layout,
        "items": items,
        "canvas_bytes": source.nbytes,
        "p50_ms": float(np.percentile(encode_ms, 50)),
        "p99_ms": float(np.percentile(encode_ms, 99)),
        "floor_ms": float(np.percentile(copy_ms, 50)),
        "copy_gigabytes_per_s": source.nbytes / float(np.percentile(copy_ms, 50)) / 1e6,
    }


def commit() -> str:
    """The commit that was measured, as far as git knows one."""
    command = ["git", "describe", "--always", "--dirty"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


@click.command(help=__doc__)
@click.option("--grid", default=3, show_default=True, help="Boxes along one side.")
@click.option("--sides", default="32,224", show_default=True, help="Tile sides in pixels.")
@click.option("--repeats", default=300, show_default=True, help="Encodings of each kind.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows here as well.")
def main(grid: int, sides: str, repeats: int, json_path: Path | None) -> None:
    rows = []
    click.echo(f"{'tiles':>14} {'layout':>6} {'items':>5} {'p50 ms':>8} {'p99 ms':>8} {'floor ms':>8} {'GB/s':>6}")
    for side in [int(side) for side in sides.split(",")]:
        for layout in LAYOUTS:
            for items in sorted({1, grid * grid}):
                row = measure(grid, side, layout, items, repeats)
                rows.append(row)
                click.echo(
                    f"{f'{grid}x{grid} of {side}x{side}':>14} {layout:>6} {items:>5} {row['p50_ms']:>8.3f} "
                    f"{row['p99_ms']:>8.3f} {row['floor_ms']:>8.3f} {row['copy_gigabytes_per_s']:>6.1f}"
                )
    if json_path is not None:
        result = {
            "evenkeel": evenkeel.__version__,
            "commit": commit(),
            "machine": {"platform": platform.platform(), "processors": os.cpu_count(), "numpy": np.__version__},
            "arguments": {"grid": grid, "sides": sides, "repeats": repeats},
            "rows": rows,
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
