"""Runs `evenkeel plan coding`."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from rich.console import Console

from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.progress import bars
from evenkeel.figures.publish import publish
from evenkeel.figures.tables import Column, Page
from evenkeel.text_values import read_quantity
from evenkeel.training.plan.coding import FAMILIES, CodingInputs, CodingOption, CodingPlan, bytes_text, plan_coding
from evenkeel.training.plan.coding_figure import coding_figure

__all__ = ["CodingArguments", "run_plan_coding"]

_LABELS = (Column("shown", "code"),)
_COLUMNS = (
    Column("exact", "exact", "%", factor=100),
    Column("setup_partitions", "set-up", "partitions"),
    Column("setup_bytes", "set-up", "MB", factor=1e-6),
    Column("round_bytes", "round", "MB", factor=1e-6),
    Column("total_bytes", "total", "MB", factor=1e-6),
    Column("total_broadcast_bytes", "broadcast", "MB", factor=1e-6),
    Column("break_even_text", "break-even", "rounds"),
    Column("storage", "storage", "x", apart=True),
    Column("storage_most", "fullest", "x"),
    Column("compute", "compute", "x"),
    Column("nonzeros", "nonzeros", "x"),
    Column("tolerance_text", "any loss of", "devices"),
    Column("condition_median", "condition", "median"),
    Column("condition_p99", "condition", "p99"),
)


@dataclass(frozen=True)
class CodingArguments:
    """Holds the options of `evenkeel plan coding`; `--help` says what each one means."""

    devices: int
    absence: float
    success: float
    rounds: int
    samples: str
    features: str
    density: float
    room: float | None
    outputs: Outputs


def run_plan_coding(arguments: CodingArguments) -> None:
    """Runs `evenkeel plan coding`."""
    arguments.outputs.check()
    inputs = CodingInputs(
        arguments.devices,
        arguments.absence,
        arguments.success,
        arguments.rounds,
        read_quantity(arguments.samples, "samples"),
        read_quantity(arguments.features, "features"),
        arguments.density,
        float("inf") if arguments.room is None else arguments.room,
    )
    with bars(Console(stderr=True), 24) as progress:
        task = progress.add_task("codes", total=len(FAMILIES))
        plan = plan_coding(inputs, lambda family: progress.update(task, advance=1, description=family))
    Console().print("\n".join(_about(inputs)) + "\n", highlight=False, markup=False, soft_wrap=True)
    rows = [_row(option, plan) for option in plan.options]
    publish(
        [Page([row | _shown(row, inputs) for row in rows], _LABELS, _COLUMNS)],
        rows,
        arguments_of(arguments),
        arguments.outputs,
        notes=["", *_notes(plan), "", plan.sentence],
        further={"recommendation": plan.sentence, "left_out": list(plan.left_out)},
        draw=lambda: coding_figure(plan),
    )


def _about(inputs: CodingInputs) -> list[str]:
    sparse = f", {inputs.density:.3g} of it not zero" if inputs.density < 1 else ""
    return [
        f"{inputs.devices} devices, each away in {inputs.absence:g} of the rounds; exact in {inputs.success:g} of them",
        f"a partition: {inputs.rows} rows x {inputs.features} columns{sparse}, "
        f"{bytes_text(inputs.partition_bytes(inputs.density))}",
    ]


def _notes(plan: CodingPlan) -> list[str]:
    notes = [
        "exact: share of the rounds in which the gradient can be computed; its interval is among the rows for machines",
        "set-up: partitions that travel to other devices, in units of all partitions",
        "total: set-up and all rounds, both directions; broadcast: the same where one transmission is heard by all",
        "a plain round sends the model down and gradients up; a coded one the products as well, and where someone is "
        "missing, new values for the blocks from which what is missing follows, and their gradients",
        "break-even: up to so many rounds it moves less than the cheapest hedged replication",
        "storage: partitions' worth that a device keeps; hedged replication computes only the copy that is needed",
    ]
    if plan.left_out:
        notes.append(f"not exact often enough at any size: {', '.join(plan.left_out)}")
    return notes


def _row(option: CodingOption, plan: CodingPlan) -> dict[str, Any]:
    chance, rounds = option.found.probability, plan.inputs.rounds
    return {
        "family": option.family,
        "code": option.code,
        "devices": plan.inputs.devices,
        "extra_devices": option.extra_devices,
        "absence": plan.inputs.absence,
        "decode_probability": chance.value,
        "decode_probability_low": chance.low,
        "decode_probability_high": chance.high,
        "losses_counted": option.found.counted,
        "tolerance": option.found.tolerance,
        "condition_median": option.found.condition_median if isfinite(option.found.condition_median) else None,
        "condition_p99": option.found.condition_p99 if isfinite(option.found.condition_p99) else None,
        "setup_transfers": option.setup_transfers,
        "setup_bytes": option.setup_bytes,
        "setup_broadcast_bytes": option.setup_broadcast_bytes,
        "round_bytes": option.round_bytes,
        "round_broadcast_bytes": option.round_broadcast_bytes,
        "rounds": rounds,
        "total_bytes": option.total_bytes(rounds),
        "total_broadcast_bytes": option.total_broadcast_bytes(rounds),
        # None says that it always moves less.
        "break_even_rounds": option.break_even_rounds,
        "storage": option.storage,
        "storage_most": option.storage_most,
        "compute": option.compute,
        "nonzeros": option.nonzeros,
        "recommended": option is plan.recommended,
    }


def _shown(row: dict[str, Any], inputs: CodingInputs) -> dict[str, Any]:
    """Gives what the table has besides."""
    rounds = row["break_even_rounds"]
    return {
        "exact": row["decode_probability"],
        "shown": row["code"] or "none: wait for all",
        "setup_partitions": row["setup_transfers"] / inputs.devices,
        "break_even_text": "always" if rounds is None else f"{rounds:.0f}" if rounds else "–",
        "tolerance_text": str(row["tolerance"]),
    }
