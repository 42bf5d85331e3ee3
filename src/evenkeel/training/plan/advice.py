"""Recommends a code and a schedule, of those predicted, and says why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evenkeel.training.plan.timing import Prediction

__all__ = ["Recommendation", "rate_text", "recommend", "time_text"]

_WORTH_IT = 1.1  # less than a tenth is within what the model leaves out


@dataclass(frozen=True)
class Recommendation:
    """Says what to do, and in a sentence why."""

    prediction: Prediction
    sentence: str


def recommend(predictions: Sequence[Prediction]) -> Recommendation:
    """Chooses what to use among `predict`'s rows, and says why.

    Only what can be had is advised. Where several are within a tenth of the fastest, the least invasive one is taken;
    where that is plain DDP, the advice is to do nothing.
    """
    plain = next(row for row in predictions if row.is_plain)
    offered = [row for row in predictions if row.available]
    best = min(offered, key=lambda row: row.step_s)
    near = [row for row in offered if row.step_s <= best.step_s * _WORTH_IT]
    chosen = min(near, key=lambda row: (row.harm, row.step_s))
    waiting = f"waits {plain.wait_s / plain.step_s if plain.step_s else 0:.0%} of it for the network"
    plain_time = time_text(plain.step_s)
    if chosen.is_plain:
        sentence = f"Do nothing: plain DDP takes {plain_time} a step and {waiting}; "
        if best.is_plain:
            return Recommendation(chosen, sentence + "nothing here is faster.")
        sentence += (
            f"the fastest here, {_title(best)}, would gain {best.speedup - 1:.0%}, within what a model can miss."
        )
        return Recommendation(chosen, sentence)
    sentence = (
        f"Use {_title(chosen)}: {time_text(chosen.step_s)} a step, {chosen.speedup:.1f}x faster than plain DDP, "
        f"which takes {plain_time} and {waiting}."
    )
    if math.isfinite(chosen.break_even_bps):
        sentence += f" On links above {rate_text(chosen.break_even_bps)} it would lose."
    if chosen.schedule == "pipelined":
        sentence += " Its steps use the gradient of the step before: attach it with look_ahead, and check the accuracy."
    return Recommendation(chosen, sentence)


def _title(row: Prediction) -> str:
    return row.code if row.schedule == "layer-wise" else f"{row.code}, {row.schedule}"


def time_text(seconds: float) -> str:
    """Writes seconds or milliseconds, with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def rate_text(bps: float) -> str:
    """Writes bits a second, with three digits."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bps >= size:
            return f"{bps / size:.3g} {unit}"
    return f"{bps / 1e3:.3g} kbit/s"
