"""Draws the figure of aggregation: time against infinite memory's, a panel for each question."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any

from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["aggregation"]

_COLUMNS = 2
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
_LABELS = {
    "load": "load: all windows over the slots",
    "regime": "regime",
    "skew": "skew of computing times",
    "rate": "links, Gbit/s (known models)",
    "jobs": "jobs",
    "workers": "workers of a job",
    "loss": "loss on each link",
}


def aggregation(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws mean job completion times over infinite memory's, on a logarithmic scale, by what is varied.

    Args:
        rows: of `evenkeel bench aggregation`.

    Raises:
        EvenkeelError: there are none.
    """
    if not rows:
        raise EvenkeelError("there is nothing to draw a figure of")
    questions = list(dict.fromkeys(row["question"] for row in rows))
    policies = [each for each in dict.fromkeys(row["policy"] for row in rows) if each != "unlimited"]
    lines = -(-len(questions) // _COLUMNS)
    with drawing(0.8 + 2.7 * lines, left=0.65, top=0.6, bottom=0.55) as figure:
        grid = figure.subplots(lines, min(len(questions), _COLUMNS), squeeze=False, sharey=True)
        figure.subplots_adjust(wspace=0.06, hspace=0.5)
        handles: dict[str, Any] = {}
        for panel, question in zip(grid.flat, questions, strict=False):
            some = [row for row in rows if row["question"] == question]
            values = list(dict.fromkeys(row["value"] for row in some))
            if question in ("load", "rate", "jobs", "workers", "loss"):
                values.sort(key=float)
            for place, policy in enumerate(policies):
                times = {row["value"]: row["jct_over_infinite"] for row in some if row["policy"] == policy}
                handles[policy] = panel.plot(
                    range(len(values)), [times.get(value, nan) for value in values], marker=_MARKS[place % len(_MARKS)],
                    linestyle="" if question == "regime" else "-", markersize=5, linewidth=1.2,
                    color=GREY if policy == "ps" else PALETTE[place % len(PALETTE)],
                )[0]  # fmt: skip
            panel.axhline(1.0, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
            panel.set_yscale("log", base=2)
            panel.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            panel.minorticks_off()
            crowded = question == "regime" and len(values) > 4
            panel.set_xticks(range(len(values)), [each.replace(" ", "\n", 1) if crowded else each for each in values])
            panel.set_xlim(-0.4, len(values) - 0.6)
            panel.tick_params(labelbottom=True, axis="x", labelsize=7 if crowded else 9)
            panel.set_xlabel(_LABELS[question])
            panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)
        for panel in grid.flat[len(questions) :]:
            panel.set_visible(False)
        for panel in grid[:, 0]:
            panel.set_ylabel("mean JCT, x infinite memory")
        figure.legend(list(handles.values()), list(handles), loc="upper left", ncols=8, fontsize=8, handlelength=1.6)
    return figure
