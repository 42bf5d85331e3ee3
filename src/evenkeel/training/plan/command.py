"""Runs `evenkeel plan training`."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from evenkeel.errors import ConfigurationError
from evenkeel.figures.outputs import Outputs, arguments_of
from evenkeel.figures.publish import publish
from evenkeel.figures.tables import Column, Page
from evenkeel.text_values import read_duration_s, read_quantity, read_rate_bps
from evenkeel.training.plan.advice import rate_text, time_text
from evenkeel.training.plan.plan import Plan, PlanInputs, make_plan, on_a_group, read_code_times, read_matrix
from evenkeel.training.plan.timing import NetworkLink, Prediction, Step, ddp_segments, require_time

__all__ = ["PlanArguments", "run_plan"]

_CODE = Column("code", "code")
_COLUMNS = (
    Column("server_ms", "param. server", "ms"),
    Column("synchronous_ms", "synchronous", "ms"),
    Column("layer_wise_ms", "layer-wise", "ms"),
    Column("pipelined_ms", "pipelined", "ms"),
    Column("sent_mb", "sent", "MB", apart=True),
    Column("code_ms", "encode + decode", "ms"),
    Column("break_even_mbps", "break-even", "Mbit/s"),
)


@dataclass(frozen=True)
class PlanArguments:
    """Holds the options of `evenkeel plan training`; `--help` says what each one means."""

    parameters: str
    forward: str
    backward: str
    update: str
    segments: int | None
    rate: str | None
    workers: int | None
    latency: str
    sync: str
    adding: float
    matrices: tuple[str, ...]
    convolutions: str | None
    code_times: tuple[str, ...]
    backend: str
    budget: str
    outputs: Outputs


def run_plan(arguments: PlanArguments) -> None:
    """Runs `evenkeel plan training`; on a group only its first rank shows the plan."""
    wanted = _wanted(arguments)
    arguments.outputs.check()
    plan = _plan(arguments, wanted)
    if plan is None:
        return
    Console().print("\n".join(_about(plan)) + "\n", highlight=False, markup=False, soft_wrap=True)
    publish(
        [Page(_lines(plan.predictions), [_CODE], _COLUMNS)],
        _rows(plan),
        arguments_of(arguments),
        arguments.outputs,
        notes=["", plan.recommendation.sentence],
        further={"recommendation": plan.recommendation.sentence},
    )


def _wanted(arguments: PlanArguments) -> PlanInputs:
    count = read_quantity(arguments.parameters, "parameters")
    convolutions = arguments.convolutions
    return PlanInputs(
        Step(
            forward_s=_time_s(arguments.forward, "forward"),
            backward_s=_time_s(arguments.backward, "backward"),
            update_s=_time_s(arguments.update, "update"),
            parameters=count,
            segments=ddp_segments(count) if arguments.segments is None else arguments.segments,
        ),
        matrices=tuple(matrix for text in arguments.matrices for matrix in read_matrix(text)),
        convolutions=read_quantity(convolutions, "convolutions") if convolutions is not None else 0,
        code_times_ns=dict(read_code_times(text) for text in arguments.code_times),
    )


def _plan(arguments: PlanArguments, wanted: PlanInputs) -> Plan | None:
    """Gives the plan for the link that is assumed, or for the one that this group measures now."""
    if arguments.rate is not None:
        if arguments.workers is None:
            raise ConfigurationError("workers: say how many with --workers; the link is assumed, as --rate is given")
        require_time("adding", arguments.adding)
        link = NetworkLink(
            alpha_s=_time_s(arguments.latency, "latency"),
            beta_s_per_byte=8 / read_rate_bps(arguments.rate, "rate"),
            gamma_s_per_byte=arguments.adding * 1e-9,
            sync_s=_time_s(arguments.sync, "sync"),
        )
        return make_plan(link, arguments.workers, wanted)
    if arguments.workers is not None:
        raise ConfigurationError("rate: say it with --rate, as --workers is given; or leave both out, and measure")
    if not os.environ.get("RANK"):
        raise ConfigurationError(
            "no link: assume one with --workers and --rate, or measure it: start this under torchrun or "
            "`evenkeel lab run`"
        )
    return on_a_group(wanted, arguments.backend, read_duration_s(arguments.budget, "budget"))


def _time_s(text: str, option: str) -> float:
    seconds = read_duration_s(text, option)
    require_time(option, seconds)
    return seconds


def _about(plan: Plan) -> list[str]:
    link, step = plan.link, plan.step
    how = "measured" if plan.measured else "assumed"
    timed = f"{', '.join(plan.timed_codes)} as measured, others " if plan.timed_codes else ""
    return [
        f"{plan.workers} workers, {how}: {rate_text(link.rate_bps)}, {time_text(link.alpha_s)} a message, "
        f"{time_text(link.sync_s)} a meeting, {link.gamma_s_per_byte * 1e9:.2g} ns to add a byte",
        f"{step.parameters / 1e6:.3g} M parameters in {step.segments} segments; {time_text(step.compute_s)} a step "
        "with a network that costs nothing",
        f"times of codes: {timed}assumed (--code-times)",
    ]


def _lines(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Gives a line for each code: the step under each schedule, and what else depends on the code alone."""
    lines = []
    for code in dict.fromkeys(row.code for row in predictions):
        by = {row.schedule: row for row in predictions if row.code == code}
        usual = by["layer-wise"]
        lines.append(
            {
                "code": code,
                "server_ms": by["parameter server"].step_s * 1e3,
                "synchronous_ms": by["synchronous"].step_s * 1e3,
                "layer_wise_ms": usual.step_s * 1e3,
                "pipelined_ms": by["pipelined"].step_s * 1e3,
                "sent_mb": usual.sent_bytes / 1e6,
                "code_ms": (usual.encode_s + usual.decode_s) * 1e3,
                "break_even_mbps": None if usual.is_plain else usual.break_even_bps / 1e6,
            }
        )
    return lines


def _rows(plan: Plan) -> list[dict[str, Any]]:
    shared = {"workers": plan.workers, **asdict(plan.link), "measured": plan.measured}
    return [
        {
            **{name: value for name, value in asdict(row).items() if name != "harm"},
            # JSON has no infinity: null says that every slower and every faster link gains.
            "break_even_bps": row.break_even_bps if math.isfinite(row.break_even_bps) else None,
            "recommended": row == plan.recommendation.prediction,
            **shared,
        }
        for row in plan.predictions
    ]
