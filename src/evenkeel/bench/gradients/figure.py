"""Draws the figure of trainings with compressed gradients: loss by step and by second, and the time to the target."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["gradients"]

_COLUMNS = 7
_STROKES = ("-", "--", ":")  # where colours do not suffice
_NAME_INCHES = 0.068  # of a letter


def gradients(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws training loss by step and by second, and time to the target; for each task and rate a row of panels.

    Losses are means over seeds, of stretches of steps; a second of theirs is the mean of the seeds' times. Whiskers of
    bars are 95 % intervals. A method that did not reach the target with every seed has no bar.

    Args:
        rows: of `evenkeel bench gradients`: each method's mean, and one row a seed.

    Raises:
        EvenkeelError: there are no rows.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    groups = list(dict.fromkeys((row["task"], row["rate"]) for row in rows))
    if not groups:
        raise EvenkeelError("there are no trainings to draw a figure of")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    looks = dict(
        zip(methods, cycle((colour, stroke) for stroke in _STROKES for colour in (GREY, *PALETTE)), strict=False)
    )
    legend = -(-len(methods) // _COLUMNS)
    top = 0.3 + 0.2 * legend
    with drawing(0.5 + top + 2.6 * len(groups), left=0.6, top=top) as figure:
        # The third column holds the names of methods.
        names = max(0.01, (_NAME_INCHES * max(map(len, methods)) - 0.85) / 2.5)
        panels = figure.subplots(len(groups), 4, squeeze=False, width_ratios=(1, 1, names, 1))
        figure.subplots_adjust(wspace=0.22)
        for panel in panels[:, 2]:
            panel.set_axis_off()
        for line, (task, rate) in zip(panels, groups, strict=True):
            own = [row for row in rows if (row["task"], row["rate"]) == (task, rate)]
            line[0].set_title(f"{task} at {rate}", loc="left", fontsize=9, fontweight="bold", pad=3)
            for method in dict.fromkeys(row["method"] for row in own):
                curves = [row["curve"] for row in own if row["method"] == method and "curve" in row]
                losses = np.mean([curve["loss"] for curve in curves], axis=0)
                for panel, axis in zip(line, ("step", "second"), strict=False):
                    places = np.mean([curve[axis] for curve in curves], axis=0)
                    colour, stroke = looks[method]
                    panel.plot(places, losses, color=colour, linestyle=stroke, linewidth=1.3, label=method)
            # A training that went astray must not squeeze the others.
            first = np.array([row["curve"]["loss"][0] for row in own if "curve" in row])
            top_loss = 1.25 * first[np.isfinite(first)].max(initial=1.0)
            for panel, label in zip(line, ("step", "second"), strict=False):
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_locator(NullLocator())
                panel.set_ylim(top=top_loss)
                panel.set_xlim(left=0)
                panel.set_xlabel(label)
            line[0].set_ylabel("training loss")
            line[1].tick_params(axis="y", labelleft=False)
            _target_bars(line[3], [row for row in own if "curve" not in row], looks)
        handles, labels = _first_of_each(panels[:, 0])
        figure.legend(handles, labels, loc="upper left", ncols=_COLUMNS, fontsize=8, handlelength=1.8)
    return figure


def _target_bars(panel: "Axes", means: Sequence[Mapping[str, Any]], looks: Mapping[str, tuple[str, str]]) -> None:
    places = np.arange(len(means))
    for place, row in zip(places, means, strict=True):
        value = row["seconds_to_target"]
        if value is None:
            said = f"by {row['reached']} of {row['seeds']} seeds" if row["reached"] else "not reached"
            panel.annotate(said, (0, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        low, high = row.get("seconds_to_target_low"), row.get("seconds_to_target_high")
        error = None if low is None or high is None else [[value - max(0.0, low)], [high - value]]
        panel.barh(place, value, height=0.62, color=looks[row["method"]][0], xerr=error, ecolor=INK)
    panel.set_yticks(places, [row["method"] for row in means], fontsize=8)
    panel.set_ylim(len(means) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("seconds to the target")
    panel.tick_params(axis="y", length=0)


def _first_of_each(panels: Iterable["Axes"]) -> tuple[list[Any], list[str]]:
    """Gives handles and labels of all panels, each label once."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
