"""What do codes over the reals move, how often do they decode, how well, and what does their coordinator learn?

python benchmarks/coded_tables.py [--data a9a.svm.xz ...] [--trials 4000] [--json FILE] [--figure attack.png]

The tables behind docs/systems/coded_training.md, each from fixed seeds: reliability under absence and after a fixed
number of losses, RLNC's transfers, chances of square matrices, condition numbers, nonzeros of sums, and how many rows
of a device the coordinator knows after so many rounds. Nothing is timed, so that it may run beside other work.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from evenkeel.bench.coded.data import LabelledRows, Partitions, partitions_of, read_rows
from evenkeel.coding.answers import linear_codes
from evenkeel.coding.answers.linear import LinearCode
from evenkeel.coding.answers.linear_codes import linear_code, rlnc
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing, save
from evenkeel.figures.outputs import check_outputs, write_json
from evenkeel.figures.records import json_document
from evenkeel.training.coded.losses import Logistic

DEVICES = 20
Row = dict[str, Any]

# Absence -> codes that reach .99 or nearly.
ABSENCE = {
    0.05: ("mds:extra=4", "rlnc:extra=8", "balanced:copies=3,extra=4", "balanced:copies=2,extra=5", "balanced:copies=2",
           "replication:copies=2", "replication:groups=7"),
    0.1: ("mds:extra=7", "rlnc:extra=10", "balanced:copies=3,extra=8", "balanced:copies=4,extra=7", "balanced:copies=3",
          "replication:copies=3", "replication:groups=6"),
    0.2: ("mds:extra=12", "rlnc:extra=14", "balanced:copies=4,extra=14", "balanced:copies=5,extra=13",
          "balanced:copies=4", "replication:copies=4", "replication:groups=5"),
}  # fmt: skip
# Losses -> extra devices of RLNC; copies and extra devices of the balanced code.
LOSSES = {1: (7, 1, 1), 2: (9, 2, 2), 3: (10, 2, 7), 4: (10, 3, 5), 6: (12, 3, 14), 8: (14, 3, 19), 10: (16, 4, 20)}


def drawn(text: str, seed: int) -> LinearCode:
    """A fresh draw of a code; of what has no chance in it, the same each time."""
    fixed = text.startswith("replication:groups")
    return linear_code(text if fixed else f"{text}{',' if ':' in text else ':'}seed={seed}", DEVICES)


def chance(text: str, alive_of: Callable[[np.random.Generator, int, int], np.ndarray], trials: int) -> float:
    """Share of sets of devices that decode, over fresh draws of the code; those of dear designs are fewer."""
    draws = 12 if text.startswith(("balanced", "mds")) else 200
    hits = 0
    each = trials // draws
    for seed in range(draws):
        code = drawn(text, seed)
        random = np.random.default_rng([seed, 1])
        hits += int(code.decodes(alive_of(random, each, code.devices)).sum())
    return hits / (draws * each)


def absence_rows(trials: int) -> list[Row]:
    rows = []
    for absence, texts in ABSENCE.items():
        moved = len(drawn(texts[0], 0).transfers)
        for text in texts:
            found = chance(text, lambda random, count, devices, q=absence: random.random((count, devices)) >= q, trials)
            transfers = float(
                np.mean([len(drawn(text, seed).transfers) for seed in range(1 if "rlnc" not in text else 200)])
            )
            rows.append(
                {
                    "table": "absence",
                    "absence": absence,
                    "code": text,
                    "setup_partitions": transfers / DEVICES,
                    "share_of_mds": transfers / moved,
                    "decode_probability": found,
                    "storage": float(np.bincount(drawn(text, 0).holders).mean()),
                }
            )
    return rows


def exactly(losses: int) -> Callable[[np.random.Generator, int, int], np.ndarray]:
    def alive(random: np.random.Generator, count: int, devices: int) -> np.ndarray:
        return random.random((count, devices)).argsort(axis=1).argsort(axis=1) >= losses

    return alive


def loss_rows(trials: int) -> list[Row]:
    rows = []
    for losses, (extra, copies, sums) in LOSSES.items():
        for text, moved in (
            (f"mds:extra={losses}", float(losses)),
            (f"rlnc:extra={extra}", extra / 2),
            (f"balanced:copies={copies},extra={sums}", float(copies)),
        ):
            found = chance(text, exactly(losses), trials)
            rows.append(
                {
                    "table": "losses",
                    "losses": losses,
                    "code": text,
                    "setup_partitions": moved,
                    "decode_probability": found,
                }
            )
    return rows


def rlnc_rows() -> list[Row]:
    moved = np.array([len(rlnc(DEVICES, extra=8, seed=seed).transfers) for seed in range(1000)]) / (8 * DEVICES)
    half = {len(rlnc(DEVICES, extra=8, half=True, seed=seed).transfers) for seed in range(1000)}
    assert half == {4 * DEVICES}
    return [
        {
            "table": "rlnc",
            "share_of_mds": float(moved.mean()),
            "sd": float(moved.std(ddof=1)),
            "outside_3_percent": float((np.abs(moved - 0.5) > 0.015).mean()),
            "half_weight_share": 0.5,
        }
    ]


def square_rows(trials: int) -> list[Row]:
    """Chance of a square of random bits to have an inverse over the reals, beside the limit over GF(2)."""
    random = np.random.default_rng(2)
    rows = []
    for size in (1, 2, 3, 4, 6, 8, 10, 12, 16):
        bits = random.integers(0, 2, (trials, size, size)).astype(np.float64)
        ranks = np.linalg.matrix_rank(bits, tol=1e-9 * size)
        gf2 = float(np.prod([1 - 0.5**power for power in range(1, size + 1)]))
        rows.append({"table": "squares", "size": size, "invertible": float((ranks == size).mean()), "over_gf2": gf2})
    return rows


def condition_rows(trials: int) -> list[Row]:
    def gaussian(random: np.random.Generator, size: int, more: int) -> np.ndarray:
        return random.standard_normal((size + more, size))

    def bits(random: np.random.Generator, size: int, more: int) -> np.ndarray:
        return random.integers(0, 2, (size + more, size)).astype(np.float64)

    def vandermonde(random: np.random.Generator, size: int, more: int) -> np.ndarray:
        points = random.choice(np.linspace(-1, 1, 2 * size), size, replace=False)
        return np.vander(points, size)

    def chebyshev(random: np.random.Generator, size: int, more: int) -> np.ndarray:
        nodes = np.cos((2 * np.arange(2 * size) + 1) * np.pi / (4 * size))
        return np.polynomial.chebyshev.chebvander(random.choice(nodes, size, replace=False), size - 1)

    def systematic(random: np.random.Generator, size: int, more: int) -> np.ndarray:
        whole = np.concatenate([np.eye(size), random.standard_normal((size, size))])
        return whole[random.choice(2 * size, size, replace=False)]

    rows = []
    for name, make, more in (
        ("square Gaussian", gaussian, 0),
        ("Gaussian, 2 rows more", gaussian, 2),
        ("Gaussian, 4 rows more", gaussian, 4),
        ("square 0/1, those with an inverse", bits, 0),
        ("half of an equispaced Vandermonde", vandermonde, 0),
        ("half of Chebyshev's basis and nodes", chebyshev, 0),
        ("half of a systematic Gaussian", systematic, 0),
    ):
        for size in (4, 8, 16, 32):
            random = np.random.default_rng([3, size])
            conditions = np.array([np.linalg.cond(make(random, size, more)) for _ in range(min(trials, 1000))])
            conditions = conditions[conditions < 1e15] if make is bits else conditions
            rows.append(
                {
                    "table": "conditions",
                    "matrix": name,
                    "size": size,
                    "median": float(np.median(conditions)),
                    "p99": float(np.quantile(conditions, 0.99)),
                }
            )
    return rows


def nonzero_rows(data: LabelledRows) -> list[Row]:
    """Numbers that are kept and are not zero, as a multiple of the data's: the ones in the last column left out."""
    parts = partitions_of(data, DEVICES, by_label=False).rows[:, :, :-1]
    rows = []
    for text in (
        "balanced:copies=3,extra=8",
        "rlnc:extra=10",
        "mds:extra=7",
        "balanced:copies=3",
        "replication:copies=3",
    ):
        code = drawn(text, 0)
        kept = sum(
            int(np.count_nonzero(np.tensordot(row[row != 0].astype(np.float32), parts[row != 0], axes=1)))
            for row in code.rows
        )
        rows.append(
            {"table": "nonzeros", "data": data.name, "code": text, "nonzeros": kept / int(np.count_nonzero(parts))}
        )
    return rows


def attack_rows(data: LabelledRows, most: int = 260) -> list[Row]:
    """Share of a device's rows that the coordinator knows whole, from products that it decodes anyway.

    It knows the weights of every round, so that each product of a row is an equation for the row's numbers: as many as
    there are columns are enough. Directions in which weights hardly move are left out, as precision demands, and
    numbers are rounded to 0 and 1, which a9a's are.
    """
    parts = partitions_of(data, DEVICES, by_label=False)
    rows = []
    for name, share, dtype, least in (
        ("full batch, float64", 1, np.float64, 1e-14),
        ("full batch, float32", 1, np.float32, 1e-6),
        ("mini-batches, float32", 16, np.float32, 1e-6),
    ):
        seen = weights_seen(parts, share, most)
        secret = parts.rows[3][: len(seen)]
        for count in range(10, most + 1, 10):
            guess = np.empty(secret.shape)
            shared: np.ndarray | None = None  # with full batches all rows see the same weights
            for place, (row, known) in enumerate(zip(secret, seen, strict=True)):
                if shared is None or share > 1:
                    shared = np.linalg.pinv(known[:count], rcond=least)
                product = (known[:count].astype(dtype) @ row.astype(dtype)).astype(np.float64)
                guess[place] = shared @ product
            equal = np.rint(guess) == secret
            rows.append(
                {
                    "table": "attack",
                    "data": data.name,
                    "training": name,
                    "rounds": count,
                    "rows_known": float(equal.all(axis=1).mean()),
                    "numbers_known": float(equal.mean()),
                }
            )
    return rows


def weights_seen(parts: Partitions, share: int, most: int) -> list[np.ndarray]:
    """Weights of the rounds in which each of a device's first rows took part: `[rounds, columns]`, `most` of each."""
    random = np.random.default_rng(4)
    loss, columns, secret = Logistic(), parts.rows.shape[2], 60
    weights, speed = np.zeros(columns), np.zeros(columns)
    seen: list[list[np.ndarray]] = [[] for _ in range(secret)]
    while min(map(len, seen)) < most:
        count = parts.rows.shape[1]
        some = np.arange(count) if share == 1 else np.sort(random.choice(count, count // share, replace=False))
        point = weights + 0.9 * speed
        for row in some[some < secret].tolist():
            seen[row].append(point)
        x, y = parts.rows[:, some].reshape(-1, columns), parts.labels[:, some].ravel()
        slopes = loss.slope((x @ point.astype(np.float32)).astype(np.float64), y)
        speed = 0.9 * speed - 0.25 * (slopes.astype(np.float32) @ x / max(1, int((y != 0).sum())))
        weights = weights + speed
    return [np.array(each[:most]) for each in seen]


def draw_attack(rows: list[Row], columns: int, path: Path) -> None:
    with drawing(3.0, left=0.7, right=0.3, top=0.35) as figure:
        panel = figure.subplots()
        for place, name in enumerate(dict.fromkeys(row["training"] for row in rows)):
            some = [row for row in rows if row["training"] == name]
            panel.plot(
                [row["rounds"] for row in some], [row["rows_known"] for row in some], color=PALETTE[place], label=name
            )
        panel.axvline(columns, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.text(columns + 2, 0.02, f"{columns} columns", fontsize=8)
        panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
        panel.set_xlabel("rounds that a row took part in")
        panel.set_ylabel("rows known whole")
        panel.grid(color=GREY, alpha=0.25, linewidth=0.5)
        panel.legend(loc="center right", fontsize=8)
        panel.set_title("What the coordinator learns of a device's rows", loc="left", fontsize=9, fontweight="bold")
    save(figure, path)


@click.command()
@click.option(
    "--data", multiple=True, type=click.Path(exists=True, path_type=Path), help="a9a and others, LIBSVM text."
)
@click.option("--trials", default=4000, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--figure", type=click.Path(path_type=Path))
def main(data: tuple[Path, ...], trials: int, json_path: Path | None, figure: Path | None) -> None:
    check_outputs(json=json_path, figure=figure)
    linear_codes._DRAWS = 4  # of which the best is kept; many designs are made
    sets = [read_rows(path) for path in data]
    rows = absence_rows(trials) + loss_rows(trials) + rlnc_rows() + square_rows(trials) + condition_rows(trials)
    for each in sets:
        rows += nonzero_rows(each)
    attacked = attack_rows(sets[0]) if sets else []
    rows += attacked
    table = ""
    for row in rows:
        if row["table"] != table:
            table = row["table"]
            print(f"\n{table}")
        print("  " + "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                                for key, value in row.items() if key != "table"))  # fmt: skip
    if json_path is not None:
        write_json(json_path, json_document({"data": [path.name for path in data], "trials": trials}, rows))
    if figure is not None and attacked:
        draw_attack(attacked, sets[0].rows.shape[1], figure)


if __name__ == "__main__":
    main()
