"""Draws the figure of `evenkeel plan coding`: what reliability costs to set up, and what all rounds move."""

from typing import TYPE_CHECKING, Any

import numpy as np

from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing
from evenkeel.training.plan.coding import CodingPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coding_figure"]

_LEAST = 1e-5  # chance of a round that is not exact, below which nothing is drawn
_MARKS = "osD^vPX*<>"


def coding_figure(plan: CodingPlan) -> "Figure":
    """Draws failed rounds against set-up, bytes against rounds, and storage and computing of each code."""
    families = [option.family for option in plan.options if option.code]
    names = list(dict.fromkeys([*plan.sweep, *families]))
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}
    marks = {name: _MARKS[place % len(_MARKS)] for place, name in enumerate(names)}
    lines = -(-len(names) // 3)
    with drawing(4.1 + 0.19 * lines, left=0.7, top=0.35 + 0.19 * lines, bottom=0.55) as figure:
        first, second, third = figure.subplots(1, 3)
        figure.subplots_adjust(wspace=0.34)
        handles = _reliability(first, plan, colours, marks)
        _bytes_by_round(second, plan, colours)
        _storage(third, plan, colours)
        figure.legend(handles, names, loc="upper left", ncols=3, fontsize=8, handlelength=1.6)
    return figure


def _title(panel: "Axes", text: str) -> None:
    panel.set_title(text, loc="left", fontsize=9, fontweight="bold", pad=4)
    panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)


def _reliability(panel: "Axes", plan: CodingPlan, colours: dict[str, str], marks: dict[str, str]) -> list[Any]:
    handles: list[Any] = []
    for family, points in plan.sweep.items():
        seen = sorted(points, key=lambda point: point[0])
        transfers = [count / plan.inputs.devices for count, _ in seen]
        failed = [max(1 - chance.value, _LEAST) for _, chance in seen]
        handles += panel.plot(
            transfers, failed, marker=marks[family], markersize=3.5, linewidth=1.0, color=colours[family]
        )
    panel.set_yscale("log")
    panel.axhline(1 - plan.inputs.success, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    panel.set_xlabel("partitions that travel to set up, in units of all")
    panel.set_ylabel("rounds that are not exact")
    panel.set_xlim(left=0)
    panel.yaxis.set_major_formatter(lambda share, _: f"{share:g}")
    _title(panel, "What reliability costs")
    return handles


def _bytes_by_round(panel: "Axes", plan: CodingPlan, colours: dict[str, str]) -> None:
    rounds = np.linspace(0, plan.inputs.rounds, 50)
    for option in plan.options:
        total = (option.setup_bytes + rounds * option.round_bytes) / 1e6
        style: dict[str, Any] = (
            {"color": colours[option.family]} if option.code else {"color": GREY, "linestyle": (0, (4, 3))}
        )
        panel.plot(rounds, total, linewidth=1.2, **style)
    panel.set_xlabel("rounds")
    panel.set_ylabel("megabytes, all devices, unicast")
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, plan.inputs.rounds)
    _title(panel, "What is moved (grey: no code)")


def _storage(panel: "Axes", plan: CodingPlan, colours: dict[str, str]) -> None:
    options = [option for option in plan.options if option.code]
    places = np.arange(len(options))[::-1]
    panel.barh(places + 0.2, [option.storage_most for option in options], 0.36,
               color=[colours[option.family] for option in options])  # fmt: skip
    panel.barh(places - 0.2, [option.compute for option in options], 0.36, alpha=0.45,
               color=[colours[option.family] for option in options])  # fmt: skip
    panel.set_yticks([])
    for place, option in zip(places, options, strict=True):
        panel.text(max(option.storage_most, option.compute) + 0.08, place, option.code, va="center", fontsize=7.5)
    widest = max((max(option.storage_most, option.compute) for option in options), default=1.0)
    panel.set_xlim(0, 1.75 * widest)
    panel.set_xlabel("partitions kept (full), passes (pale)")
    _title(panel, "Storage and computing")
