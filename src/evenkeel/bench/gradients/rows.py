"""Turns the records of `evenkeel bench gradients` into rows, and rows into the pages that people read.

There is a row for each seed, and one of the means over seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evenkeel.bench.gradients.cells import BASELINE, PIPE_WARM_SHARE
from evenkeel.figures.estimates import mean
from evenkeel.figures.tables import Column, Page

__all__ = ["ALL_SEEDS", "figures_of", "mean_row", "pages_of", "rows_of"]

ALL_SEEDS = "mean"
_POINTS = 100  # of a curve
_AVERAGED = (
    "seconds_to_target",
    "speed_up",
    "final_accuracy",
    "accuracy_change",
    "step_s",
    "steady_step_s",
    "bytes_per_step",
    "steady_bytes_per_step",
    "resent_bytes_per_step",
    "encode_s",
    "add_s",
    "decode_s",
    "comm_share",
    "compute_s",
    "aggregate_s",
    "aggregate_cut",
    "seconds",
    "peak_bytes",
)

_METHOD = Column("method", "method")
_COLUMNS = (
    Column("seconds_to_target", "to target", "s"),
    Column("speed_up", "faster", "times"),
    Column("final_accuracy", "accuracy", "%", 100.0),
    Column("step_s", "step", "ms", 1e3),
    Column("aggregate_s", "aggregating", "ms", 1e3),
    Column("aggregate_cut", "cut", "times"),
    Column("bytes_per_step", "sent", "MB", 1e-6, apart=True),
    Column("encode_s", "encode", "ms", 1e3),
    Column("add_s", "add", "ms", 1e3),
    Column("decode_s", "decode", "ms", 1e3),
    Column("peak_bytes", "memory", "MB", 1e-6),
)

Record = Mapping[str, Any]


def rows_of(records: Sequence[Record], tolerance: float) -> list[dict[str, Any]]:
    """Gives the rows of one task at one rate: for each method one a seed, with curves, and before them their mean.

    Args:
        records: of the same task and rate, the baseline's among them for every seed.
        tolerance: of the target below the baseline's final accuracy with the same seed, as a share.
    """
    baselines = {record["cell"]["seed"]: record for record in records if record["cell"]["method"] == BASELINE}
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(record["cell"]["method"] for record in records):
        own = [record for record in records if record["cell"]["method"] == method]
        by_seed = [figures_of(record, baselines[record["cell"]["seed"]], tolerance) for record in own]
        rows += [mean_row(by_seed), *by_seed]
    return rows


def figures_of(record: Record, baseline: Record, tolerance: float) -> dict[str, Any]:
    """Gives the row of one training, beside the baseline's with the same seed.

    `step_s` and `bytes_per_step` are means over all steps, those included that a method does not compress; `steady_`
    are medians. Both count what TCP had to send again, which is `resent_bytes_per_step`. `comm_share` is the share of a
    step that neither computation nor the code's work explains: what of the communication was not hidden. `aggregate_s`
    is what a mean step takes beyond computation, coding included, and `aggregate_cut` the baseline's over this one's.
    `speed_up` is the baseline's time to the target over this one's.
    """
    steps = len(record["times_s"])
    times_s, sent = np.array([0.0, *record["times_s"]]), np.array([0.0, *record["sent_bytes"]])
    target = baseline["evaluations"][-1][1] - tolerance
    to_target_s, reference_s = _seconds_to(record, target), _seconds_to(baseline, target)
    step_s = float(times_s[-1] / steps)
    work_s = {
        name: None if record[name] is None else record[name] / steps for name in ("encode_s", "add_s", "decode_s")
    }
    known_s = record["compute_s"] + sum(value or 0.0 for value in work_s.values())
    counted = record["counted_bytes"]
    resent = record.get("resent_bytes")  # unknown in records of versions that did not count it
    aggregate_s, reference_aggregate_s = _aggregate_s(record), _aggregate_s(baseline)
    return {
        **record["cell"],
        "workers": record["training"]["workers"],
        "steps": steps,
        "batch": record["training"]["batch"],
        "parameters": record["parameters"],
        "target_accuracy": target,
        "seconds_to_target": to_target_s,
        "speed_up": reference_s / to_target_s if to_target_s and reference_s else None,
        "final_accuracy": record["evaluations"][-1][1],
        "accuracy_change": record["evaluations"][-1][1] - baseline["evaluations"][-1][1],
        "seconds": float(times_s[-1]),
        "step_s": step_s,
        "steady_step_s": float(np.median(np.diff(times_s))),
        "bytes_per_step": float(sent[-1] / steps),
        "steady_bytes_per_step": float(np.median(np.diff(sent))),
        "resent_bytes_per_step": None if resent is None else resent / steps,
        "counted_bytes_per_step": None if counted is None else counted / steps,
        **work_s,
        "compute_s": record["compute_s"],
        "comm_share": max(0.0, 1 - known_s / step_s),
        "aggregate_s": aggregate_s,
        "aggregate_cut": reference_aggregate_s / aggregate_s if aggregate_s else None,
        "local_nmse": record["local_nmse"],
        "peak_bytes": record["peak_bytes"],
        "link_bps": record["link"].get("there_bps"),
        "curve": _curve(record),
        "evaluations": [
            {"step": step, "second": float(times_s[step]), "accuracy": accuracy}
            for step, accuracy in record["evaluations"]
        ],
    }


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gives means over seeds, each with `_low` and `_high`; None where a seed has no figure.

    `reached` says how many seeds came to the target.
    """
    row = {key: rows[0][key] for key in ("task", "method", "rate", "workers", "steps", "batch", "parameters")}
    row |= {
        "seed": ALL_SEEDS,
        "seeds": len(rows),
        "reached": sum(each["seconds_to_target"] is not None for each in rows),
    }
    for key in _AVERAGED:
        values = [each[key] for each in rows]
        if any(value is None for value in values):
            row[key] = None
            continue
        found = mean(values)
        row[key] = found.value
        if len(rows) > 1:
            row |= {f"{key}_low": found.low, f"{key}_high": found.high}
    return row


def pages_of(rows: Sequence[dict[str, Any]], sources: Mapping[str, str], tolerance: float) -> list[Page]:
    """Gives a page for each task and rate: a line for each method, with its means over seeds.

    Args:
        rows: of all tasks and rates.
        sources: where the data of each task come from.
        tolerance: of the target below the baseline's accuracy, in points.
    """
    pages = []
    for task, rate in dict.fromkeys((row["task"], row["rate"]) for row in rows):
        means = [row for row in rows if (row["task"], row["rate"], row["seed"]) == (task, rate, ALL_SEEDS)]
        columns = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in means)]
        title = f"{task} at {rate}: {_about(means, sources[task])}"
        pages.append(Page(means, [_METHOD], columns, title, list(_notes(means, tolerance))))
    return pages


def _about(means: Sequence[dict[str, Any]], source: str) -> str:
    """Says what is trained, and how much of the baseline's step is communication."""
    base = next(row for row in means if row["method"] == BASELINE)
    step_s, compute_s = base["step_s"], base["compute_s"]
    ratio = max(0.0, step_s - compute_s) / compute_s
    return (
        f"{base['parameters'] / 1e6:.2f} M parameters, {base['workers']} workers with {base['batch']} examples each, "
        f"{base['steps']} steps, data: {source}. A step of fp32 takes {1e3 * step_s:.0f} ms, "
        f"{1e3 * compute_s:.0f} ms of it computation: communication is {base['comm_share']:.0%} of it, "
        f"{ratio:.2g} times the computation"
    )


def _notes(means: Sequence[dict[str, Any]], tolerance: float) -> Iterator[str]:
    seeds = means[0]["seeds"]
    yield (
        f"target: the final accuracy of fp32 with the same seed, less {tolerance:g} points; "
        + (f"means over {seeds} seeds, intervals: 95 %" if seeds > 1 else "one seed: no intervals")
    )
    yield "aggregating: what a step takes beyond computation, coding included; cut: fp32's over this one's"
    yield "sent: by a rank in a step, as the kernel counts it"
    methods = " ".join(row["method"] for row in means)
    if "pipe" in methods:
        yield f"pipe: after the first {PIPE_WARM_SHARE:.0%} of the steps each applies the average of the one before"
    if "pipe-ahead" in methods:
        yield "pipe-ahead: as pipe, but a rank's gradients are of the weights where its own one before would lead"
    if "powersgd" in methods:
        yield "powersgd: torch's hook, compressing from the third step on; its coding is not timed on its own"
    for row in means:
        if row["reached"] < row["seeds"]:
            yield f"{row['method']}: {row['reached']} of {row['seeds']} seeds reached the target"
        elif row["method"] != BASELINE and row["speed_up"] is not None and row["speed_up"] < 1:
            yield f"{row['method']} loses here: {1 / row['speed_up']:.2f} times the time of fp32"


def _aggregate_s(record: Record) -> float:
    """Gives the seconds of a mean step that computation does not explain."""
    times_s = record["times_s"]
    return max(0.0, float(times_s[-1]) / len(times_s) - float(record["compute_s"]))


def _seconds_to(record: Record, target: float) -> float | None:
    """Finds when the test accuracy reached the target, on a line between the two evaluations around it."""
    before_s, before = 0.0, None
    for step, accuracy in record["evaluations"]:
        now_s = record["times_s"][step - 1]
        if accuracy >= target:
            if before is None or accuracy == before:
                return float(now_s)
            return float(before_s + (now_s - before_s) * (target - before) / (accuracy - before))
        before_s, before = now_s, accuracy
    return None


def _curve(record: Record) -> dict[str, list[float]]:
    """Gives losses by step and second, in at most so many stretches of neighbouring steps."""
    steps = len(record["losses"])
    stretches = np.array_split(np.arange(steps), min(steps, _POINTS))
    losses, times_s = np.array(record["losses"]), np.array(record["times_s"])
    found = [float(losses[stretch].mean()) for stretch in stretches]
    return {
        "step": [int(stretch[-1]) + 1 for stretch in stretches],
        "second": [float(times_s[stretch[-1]]) for stretch in stretches],
        "loss": [value if math.isfinite(value) else math.nan for value in found],
    }
