"""Makes the predictions of `evenkeel plan training`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import read_number, unknown
from evenkeel.training.plan.advice import Recommendation, recommend
from evenkeel.training.plan.code_costs import bf16, gradiveq, low_rank, power_sgd, thc
from evenkeel.training.plan.measure import group_from_environment, measure_link
from evenkeel.training.plan.timing import CodeCost, NetworkLink, Prediction, Step, fp32, predict

__all__ = ["Plan", "PlanInputs", "codes_of", "make_plan", "on_a_group", "read_code_times", "read_matrix"]

_RANKS = (1, 4)
_TIMED = ("bf16", "thc", "gradiveq", "lowrank", "powersgd")
_MATRIX = re.compile(r"(?:(\d+)\*)?(\d+)x(\d+)")


@dataclass(frozen=True)
class PlanInputs:
    """Holds what a plan is made from: what is known of the model."""

    step: Step
    matrices: tuple[tuple[int, int], ...] = ()  # weights seen as matrices, for LowRank and PowerSGD, else left out
    convolutions: int = 0  # their parameters, for GradiVeQ; it is left out without
    code_times_ns: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # encode, decode a parameter
    measured: tuple[CodeCost, ...] = ()  # instead of those of the same name


@dataclass(frozen=True)
class Plan:
    """Holds all predictions for one link, and what to do."""

    link: NetworkLink
    workers: int
    measured: bool  # whether the link was, or was assumed
    step: Step
    timed_codes: tuple[str, ...]  # whose times are no assumptions
    predictions: tuple[Prediction, ...]
    recommendation: Recommendation


def codes_of(wanted: PlanInputs, workers: int) -> list[CodeCost]:
    """Holds every code of which something can be said."""
    parameters, times = wanted.step.parameters, wanted.code_times_ns
    codes = [
        fp32(parameters),
        bf16(parameters, *times.get("bf16", ())),
        thc(parameters, workers, 4, 17, *times.get("thc", ())),
    ]
    if wanted.convolutions:
        codes.append(gradiveq(parameters, wanted.convolutions, 8.0, *times.get("gradiveq", ())))
    if wanted.matrices:
        codes.append(low_rank(parameters, workers, wanted.matrices, 16, 4, 17, *times.get("lowrank", ())))
        codes += [power_sgd(parameters, wanted.matrices, rank, *times.get("powersgd", ())) for rank in _RANKS]
    measured = {code.name: code for code in wanted.measured}
    return [measured.get(code.name, code) for code in codes]


def make_plan(link: NetworkLink, workers: int, wanted: PlanInputs, *, measured: bool = False) -> Plan:
    """Predictions of every code under every schedule on this link, and the advice that follows."""
    predictions = predict(link, workers, wanted.step, codes_of(wanted, workers))
    timed = (*wanted.code_times_ns, *(code.name for code in wanted.measured))
    return Plan(link, workers, measured, wanted.step, timed, tuple(predictions), recommend(predictions))


def on_a_group(wanted: PlanInputs, backend: str, budget_s: float) -> Plan | None:
    """Makes the plan for the group that torchrun's variables name, measured now; None on all ranks but the first."""
    with group_from_environment(backend) as rank:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if backend == "nccl" else "cpu"
        found = measure_link(device=device, budget_s=budget_s)
        if "thc" not in wanted.code_times_ns:
            from evenkeel.coding.sums.error_feedback import ErrorFeedback
            from evenkeel.coding.sums.thc import THC
            from evenkeel.training.plan.measure_code import measure_code

            code = ErrorFeedback(THC(bits=4))
            cost = measure_code(code, wanted.step.parameters, found.link, name="thc:bits=4", device=device)
            wanted = replace(wanted, measured=(cost,))
    return make_plan(found.link, found.workers, wanted, measured=True) if rank == 0 else None


def read_matrix(text: str) -> list[tuple[int, int]]:
    """Reads `512x4608`, or `4*512x4608` for four of them."""
    found = _MATRIX.fullmatch(text.strip())
    if not found or not int(found[2]) or not int(found[3]):
        raise ConfigurationError(f"matrix must be of the form 512x4608 or 4*512x4608, found {text!r}")
    return [(int(found[2]), int(found[3]))] * int(found[1] or 1)


def read_code_times(text: str) -> tuple[str, tuple[float, float]]:
    """Reads `thc=6,5`: nanoseconds a parameter to encode and to decode."""
    name, equals, rest = text.partition("=")
    parts = rest.split(",")
    if not equals or len(parts) != 2:
        raise ConfigurationError(f"code-times must be of the form thc=6,5 (nanoseconds a parameter), found {text!r}")
    if name not in _TIMED:
        raise unknown("code", name, _TIMED)
    encode_ns, decode_ns = (read_number(part, f"code-times of {name}") for part in parts)
    return name, (encode_ns, decode_ns)
