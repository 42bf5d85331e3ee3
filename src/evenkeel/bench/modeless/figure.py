"""Draws what lost packets cost by transport, and the P99 of whole systems that are as right as promised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, PALETTE, drawing
from evenkeel.figures.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["modeless"]

_TICKS_MS = (50, 100, 200, 500, 1000)
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")


def modeless(rows: Sequence[Row]) -> "Figure":
    """Draws accuracy by loss, by round trip, and the P99 of systems by loss.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    losses = [row for row in rows if row["kind"] == "loss"]
    systems = [row for row in rows if row["kind"] == "system"]
    if not losses or not systems:
        raise EvenkeelError("there is nothing to draw a figure of")
    methods = list(dict.fromkeys(row["method"] for row in losses))
    style = {name: (PALETTE[place % len(PALETTE)], _MARKS[place]) for place, name in enumerate(methods)}
    with drawing(6.2, left=0.6, top=0.75, bottom=0.5) as figure:
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(wspace=0.46, hspace=0.45)
        handles = {}
        for panel, burst in zip(grid[0], (1.0, 3.0), strict=True):
            for name in methods:
                some = [row for row in losses if row["method"] == name and row["burst"] == burst]
                colour, mark = style[name]
                handles[name] = panel.plot(
                    [100 * row["loss"] for row in some], [100 * row["accuracy"] for row in some],
                    marker=mark, color=colour, markersize=5, linewidth=1.2,
                )[0]  # fmt: skip
            panel.axhline(100 * losses[0]["whole_accuracy"], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            panel.set_title("each packet by itself" if burst == 1 else "three in a row on average", fontsize=9)
            panel.set_xlabel("packets lost, %")
            panel.set_ylabel("right in time, %")
            panel.set_ylim(0, 100)
        trips = [row for row in rows if row["kind"] == "round trip"]
        for name in dict.fromkeys(row["method"] for row in trips):
            some = [row for row in trips if row["method"] == name]
            colour, mark = style[name]
            grid[1][0].plot(
                [row["ratio"] for row in some], [100 * row["accuracy"] for row in some],
                marker=mark, color=colour, markersize=5, linewidth=1.2,
            )  # fmt: skip
        grid[1][0].set_title("20 % lost", fontsize=9)
        grid[1][0].set_xlabel("round trip / deadline")
        grid[1][0].set_ylabel("right in time, %")
        _bars(grid[1][1], systems)
        figure.legend(list(handles.values()), list(handles), loc="upper left", ncols=4, fontsize=8, handlelength=1.6)
    return figure


def _bars(panel: "Axes", systems: Sequence[Row]) -> None:
    first = [row for row in systems if row["rate"] == systems[0]["rate"] and row["policy"] != "always edge"]
    names = list(dict.fromkeys((row["policy"], row["transport"]) for row in first))
    losses = list(dict.fromkeys(row["loss"] for row in first))
    for place, name in enumerate(names):
        for number, loss in enumerate(losses):
            row = next(one for one in first if (one["policy"], one["transport"]) == name and one["loss"] == loss)
            panel.barh(
                place + 0.25 * (number - 1), row["p99_ms"], 0.22, color=PALETTE[number] if row["reached"] else "none",
                edgecolor=PALETTE[number],
            )  # fmt: skip
    short = {"always data centre": "data centre", "random offload": "random", "certified threshold": "certified",
             "INFaaS-like": "INFaaS-like"}  # fmt: skip
    texts = [short[policy] + {"none": ""}.get(way, f", {way}") for policy, way in names]
    panel.set_yticks(range(len(names)), [text.replace("concealment", "conc.") for text in texts], fontsize=6.5)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xticks(_TICKS_MS, [str(each) for each in _TICKS_MS])
    panel.minorticks_off()
    panel.set_xlabel("P99, ms; empty: not as right as promised")
    shown = ", ".join(f"{loss:.0%}" for loss in losses)
    panel.set_title(f"{systems[0]['rate']}: {shown} lost, from above", fontsize=9)
