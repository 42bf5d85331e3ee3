"""Turns what schemes did into the rows of `evenkeel bench coded`, and rows into the pages that people read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

from evenkeel.arrays import Array, FloatArray
from evenkeel.bench.coded.data import LabelledRows
from evenkeel.bench.coded.fleet import FleetSettings
from evenkeel.bench.coded.schemes import Scheme, SizeOfRound
from evenkeel.figures.estimates import mean, share
from evenkeel.figures.tables import Column, Page, Row

__all__ = ["TrainedScheme", "notes_of", "pages_of", "row_of"]

_CURVE = ("rounds", "seconds", "objective", "accuracy")
_LABELS = (Column("code", "code"),)
_COLUMNS = (
    Column("round_ms", "round", "ms"),
    Column("times_quicker", "quicker", "x"),
    Column("accuracy", "accuracy", "%", factor=100),
    Column("objective", "objective"),
    Column("prompt", "in time", "% of rounds", factor=100),
    Column("setup_mb", "set-up", "MB", apart=True),
    Column("round_kb", "a round", "kB"),
    Column("repair_mb", "repair", "MB"),
    Column("total_mb", "all", "MB"),
    Column("gradient_error_text", "error", "of gradient"),
)


@dataclass(frozen=True, eq=False)
class TrainedScheme:
    """Holds what one scheme did.

    Attributes:
        seconds: of each round.
        bytes: of each round.
        prompt: of each round, whether it ended without a device that was away.
        repair_transfers: partitions moved after devices had left.
        step: the learning rate, as a share of what the curvature allows.
        curve: `[points, 4]`: rounds, seconds, objective, accuracy.
        gradient_error: the largest distance from the gradient in float64, as a share of the first gradient, of the
            rounds that were checked.
        coordinator_s: the median time of decoding, of a round.
    """

    seconds: FloatArray
    bytes: FloatArray
    prompt: Array
    repair_transfers: int
    step: float
    curve: FloatArray
    gradient_error: float
    coordinator_s: float


def row_of(
    data: LabelledRows,
    text: str,
    scheme: Scheme,
    setting: FleetSettings,
    size: SizeOfRound,
    found: TrainedScheme,
    partition_bytes: float,
) -> dict[str, Any]:
    """Gives the row of one scheme under one setting."""
    rounds = len(found.seconds)
    time, chance = mean(found.seconds), share(int(found.prompt.sum()), rounds)
    transfers = scheme.setup_transfers()
    return {
        "data": data.name,
        "code": text,
        "devices": size.partitions,
        "extra_devices": scheme.code.devices - size.partitions if scheme.code else 0,
        "absence": setting.absence,
        "bias": setting.bias,
        "delay": setting.slowness,
        "rounds": rounds,
        "round_s": time.value,
        "round_s_low": _finite(time.low),
        "round_s_high": _finite(time.high),
        "setup_transfers": transfers,
        "setup_bytes": transfers * partition_bytes,
        "round_bytes": float(found.bytes.mean()),
        "repair_transfers": found.repair_transfers,
        "repair_bytes": found.repair_transfers * partition_bytes,
        "objective": float(found.curve[-1, 2]),
        "accuracy": float(found.curve[-1, 3]),
        "decode_probability": chance.value,
        "decode_probability_low": _finite(chance.low),
        "decode_probability_high": _finite(chance.high),
        "step": found.step,
        "gradient_error": found.gradient_error,
        "coordinator_s": found.coordinator_s,
        "partition_rows": size.rows,
        "columns": size.columns,
        "product_s": size.times.product_s,
        "transpose_s": size.times.transpose_s,
        "curve": dict(zip(_CURVE, found.curve.T.tolist(), strict=True)),
    }


def pages_of(rows: Sequence[Row]) -> list[Page]:
    """Gives a page for each data set and setting."""
    pages = []
    for key, group in groupby(rows, lambda row: (row["data"], row["bias"], row["absence"], row["delay"])):
        some = list(group)
        waiting = next((row["round_s"] for row in some if row["code"] == "wait"), None)
        data, bias, absence, delay = key
        about = {
            "random": f"away {absence:g} of the rounds",
            "biased": f"one class away .8, others {absence:g} of the rounds",
            "permanent": f"three devices of one class leave for good, others away {absence:g} of the rounds",
        }[bias]
        slow = "slow for a round" if delay == "persistent" else "slow task by task"
        pages.append(Page([_line(row, waiting) for row in some], _LABELS, _COLUMNS, f"{data}: {about}; {slow}"))
    return pages


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Gives lines that say how the figures are to be read."""
    return [
        "round: mean time on virtual devices: products measured here, times drawn factors; no network unless --rate "
        "or --latency say so",
        "quicker: than waiting for all. in time: rounds that ended without a device that was away",
        "a device that is away replies at last, so that only drop, and who has lost a device for good, is not exact",
        "error: of the gradients, computed in float32, as a share of the first one",
        "set-up, a round, repair: bytes of all devices, both directions; all: of everything",
        "replication is hedged: a copy is asked for what is late",
        f"steps are tuned for accuracy: {_steps(rows)} of what the curvature allows; all exact schemes have one step",
    ]


def _line(row: Row, waiting: float | None) -> dict[str, Any]:
    moved = row["setup_bytes"] + row["rounds"] * row["round_bytes"] + row["repair_bytes"]
    error = row["gradient_error"]
    return {
        **row,
        "round_ms": row["round_s"] * 1e3,
        "times_quicker": waiting / row["round_s"] if waiting else None,
        "prompt": row["decode_probability"],
        "setup_mb": row["setup_bytes"] / 1e6,
        "round_kb": row["round_bytes"] / 1e3,
        "repair_mb": row["repair_bytes"] / 1e6,
        "total_mb": moved / 1e6,
        "gradient_error_text": f"{error:.0e}" if error else "–",
    }


def _steps(rows: Sequence[Row]) -> str:
    return ", ".join(f"{step:g}" for step in sorted({row["step"] for row in rows}))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
