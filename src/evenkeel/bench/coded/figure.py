"""Draws the figure of `evenkeel bench coded`: objective and accuracy by round and by second."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coded_figure"]

_PANELS = (("rounds", "objective"), ("seconds", "objective"), ("rounds", "accuracy"), ("seconds", "accuracy"))
_EARLY = 6  # the point of a curve from which on it is shown whole
_HEADS = {"rounds": "round", "seconds": "second"}


def coded_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws a line of panels for each data set and setting: objective and accuracy, by round and by second.

    Raises:
        EvenkeelError: there are no rows.
    """
    if not rows:
        raise EvenkeelError("there are no rows to draw a figure of")
    settings = [
        (key, list(group))
        for key, group in groupby(rows, lambda row: (row["data"], row["bias"], row["absence"], row["delay"]))
    ]
    codes = list(dict.fromkeys(row["code"] for row in rows))
    coded = [code for code in codes if code not in ("wait", "drop")]
    styles = {code: (PALETTE[place % len(PALETTE)], "-") for place, code in enumerate(coded)}
    styles |= {"wait": (GREY, "-"), "drop": (INK, "--")}
    legend = -(-len(codes) // 4)
    with drawing(0.6 + 2.0 * len(settings) + 0.19 * legend, left=0.75, right=0.25, top=0.5 + 0.19 * legend) as figure:
        grid = figure.subplots(len(settings), len(_PANELS), squeeze=False)
        figure.subplots_adjust(wspace=0.5, hspace=0.62)
        handles: dict[str, Any] = {}
        for line, ((data, bias, absence, delay), some) in zip(grid, settings, strict=True):
            for panel, (along, what) in zip(line, _PANELS, strict=True):
                for row in some:
                    colour, stroke = styles[row["code"]]
                    handles[row["code"]] = panel.plot(
                        row["curve"][along], row["curve"][what], color=colour, linestyle=stroke, linewidth=1.1
                    )[0]
                _finish(panel, some, along, what)
            line[0].set_title(
                f"{data} · {bias} {absence:g} · slow {delay}", loc="left", fontsize=9, fontweight="bold", pad=4
            )
        figure.legend([handles[code] for code in codes], codes, loc="upper left", ncols=4, fontsize=8, handlelength=1.6)
    return figure


def _finish(panel: "Axes", rows: Sequence[Mapping[str, Any]], along: str, what: str) -> None:
    """Cuts the axes to where schemes differ: who waits for all would squeeze all others to the left."""
    ends = sorted(row["curve"]["seconds"][-1] for row in rows)
    if along == "seconds":
        panel.set_xlim(0, 1.3 * ends[(len(ends) - 1) // 2])
    last = [row["curve"][what][-1] for row in rows]
    early = [row["curve"][what][min(_EARLY, len(row["curve"][what]) - 1)] for row in rows]
    if what == "accuracy":
        low, high = min(*last, *early), max(*last, *early)
        panel.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
        panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    else:
        panel.set_ylim(0.9 * min(last), 1.1 * max(*last, *early))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.locator_params(axis="x", nbins=4)
    panel.locator_params(axis="y", nbins=5)
    panel.set_xlabel(_HEADS[along])
    panel.set_ylabel(what)
    panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)
