"""Draws the figure of `evenkeel certify`: accuracy against offload, and where the promises are kept."""

from typing import TYPE_CHECKING, Any

import numpy as np

from evenkeel.edge.certifying import Certified, Tested
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing
from evenkeel.promises.certificate import BUCKETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["certified_figure"]


def certified_figure(certified: Certified) -> "Figure":
    """Draws what is right, and what agrees, against the share that goes to the accurate model."""
    fills = any(each.found.promise.kind == "min_fill_agreement" for each in certified.thresholds)
    labelled = certified.labelled and not fills
    with drawing(4.0, left=0.75, right=0.2, top=0.75, bottom=0.6) as figure:
        panels = figure.subplots(1, 2 if labelled else 1, squeeze=False)[0]
        figure.subplots_adjust(wspace=0.2)
        if labelled:
            _panel(panels[0], certified, "right answers, %", labelled=True)
        _panel(
            panels[-1],
            certified,
            "light answers that the accurate model would give, %"
            if fills
            else "answers that the accurate model would give, %",
            labelled=False,
        )
        handles, names = panels[0].get_legend_handles_labels()
        if len(panels) > 1:
            more = panels[1].get_legend_handles_labels()
            for handle, name in zip(*more, strict=True):
                if name not in names:
                    handles.append(handle)
                    names.append(name)
        figure.legend(handles, names, loc="upper left", ncols=3, fontsize=8, handlelength=1.8)
    return figure


def _panel(panel: "Axes", certified: Certified, title: str, *, labelled: bool) -> None:
    fills = any(each.found.promise.kind == "min_fill_agreement" for each in certified.thresholds)
    for place, (bucket, curve) in enumerate(certified.curves.items()):
        offload = 1 - curve.local / curve.n
        bad = curve.errors if labelled and curve.errors is not None else curve.apart
        among = np.maximum(curve.local, 1) if fills and not labelled else curve.n
        good = 1 - bad / among
        colour = PALETTE[place % len(PALETTE)]
        name = f"loss up to {BUCKETS[bucket]:.0%}" if len(certified.curves) > 1 else "on the test images"
        panel.plot(100 * offload, 100 * good, color=colour, linewidth=1.3, label=name)
        if labelled or not fills:
            panel.plot([0, 100], [100 * good[0], 100 * good[-1]], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)),
                       label="sent at random" if not place else None)  # fmt: skip
        for each in certified.thresholds:
            if each.found.bucket == bucket and each.found.promise.needs_labels is labelled:
                _mark(panel, each, good[-1], np.interp(each.test_offload, offload, good), colour)
    panel.set_xlabel("answers of the accurate model, %")
    panel.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=4)
    panel.set_xlim(0, 100)
    panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)


def _mark(panel: "Axes", each: Tested, accurate: Any, good: Any, colour: str) -> None:
    """Draws the line that a promise sets, and the point at which its certified threshold works."""
    promise = each.found.promise
    floor = float(accurate) - promise.level if promise.kind == "max_accuracy_drop" else promise.level
    panel.axhline(100 * floor, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="promised")
    words = f"{promise.kind.replace('_', ' ')} {promise.level:g}"
    if not each.found.certified:
        panel.annotate(f"{words}: not certifiable", (99, 100 * floor), fontsize=7, va="bottom", ha="right", color=INK)
        return
    panel.plot([100 * each.test_offload], [100 * float(good)], marker="o", color=colour, markersize=6,
               linestyle="none", label="certified threshold")  # fmt: skip
    panel.axvline(100 * each.found.offload_high, color=colour, linewidth=0.6, linestyle=(0, (1, 3)),
                  label="bound of its offload")  # fmt: skip
    panel.annotate(words, (99, 100 * floor), fontsize=7, va="bottom", ha="right", color=INK)
