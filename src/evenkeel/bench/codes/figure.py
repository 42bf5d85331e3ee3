"""Draws the figure of codes: error of the mean against bits."""

import re
from collections.abc import Mapping, Sequence
from math import ceil, floor, log2
from typing import TYPE_CHECKING, Any

import numpy as np

from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["codes"]

_COLUMNS = 3
_MARKS = ("o", "s", "^", "D", "v", "P")
_SIZES = re.compile(r"(bits|levels|rank|ratio)=")
_NO_ERROR = 1e-10  # of float32: nothing to draw on a logarithmic scale


def codes(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the error of the mean against bits per coordinate, on logarithmic scales, a panel for each kind of vectors.

    Settings of one code that differ in one number alone (bits, levels, rank) are joined by a line. Whiskers are 95 %
    intervals. What has no error to speak of (float32) is a line upwards.

    Args:
        rows: of `evenkeel bench codes`.

    Raises:
        EvenkeelError: there are none.
    """
    rows = [row for row in rows if row["nmse"] is not None]
    if not rows:
        raise EvenkeelError("there are no errors to draw a figure of")
    panels: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["distribution"], row["workers"], row["correlation"]), []).append(row)
    families = list(dict.fromkeys(_family(row["code"]) for row in rows))
    styles = _styles(families)
    lines, legend = -(-len(panels) // _COLUMNS), -(-len(families) // _COLUMNS)
    with drawing(0.8 + 2.6 * lines + 0.19 * legend, left=0.75, top=0.3 + 0.19 * legend) as figure:
        grid = figure.subplots(lines, min(len(panels), _COLUMNS), sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(wspace=0.06, hspace=0.2)
        handles: dict[str, Any] = {}
        bits = [row["bits_per_coordinate"] for row in rows]
        ticks = [2.0**power for power in range(floor(log2(min(bits))), ceil(log2(max(bits))) + 1)]
        for panel, ((distribution, workers, correlation), some) in zip(grid.flat, panels.items(), strict=False):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            for family in dict.fromkeys(_family(row["code"]) for row in some):
                members = sorted(
                    (row for row in some if _family(row["code"]) == family), key=lambda row: row["bits_per_coordinate"]
                )
                handles[family] = _line(panel, members, styles[family])
            title = [distribution, f"n={workers}", *([] if correlation is None else [f"ρ={correlation:.2g}"])]
            panel.set_title(" · ".join(title), loc="left", fontsize=9, fontweight="bold", pad=3)
            panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)
        for panel in grid.flat[len(panels) :]:
            panel.set_visible(False)
        for panel in list(grid.flat[: len(panels)])[-grid.shape[1] :]:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("bits per coordinate and rank")
        for panel in grid[:, 0]:
            panel.yaxis.set_major_formatter(lambda error, _: f"{error:g}")
            panel.set_ylabel("NMSE of the mean")
        shown = [family for family in families if family in handles]
        figure.legend(
            [handles[family] for family in shown], shown, loc="upper left", ncols=_COLUMNS, fontsize=8,
            handlelength=1.6,
        )  # fmt: skip
    return figure


def _family(code: str) -> str:
    """Names the code without the number that its settings differ in."""
    outer, plus, inner = code.partition("+")
    name, _, fields = outer.partition(":")
    kept = [field for field in fields.split(",") if field and not _SIZES.match(field)]
    return f"{name} {', '.join(kept)}{plus}{inner}".rstrip()


def _styles(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Gives the mark and the colour of each family: a colour for each code, a mark for each of its variants."""
    names = list(dict.fromkeys(family.partition(" ")[0] for family in families))
    names = [name for name in names if name not in ("fp32", "lloyd-max")]  # lines without marks
    styles, met = {}, dict.fromkeys(names, 0)
    for family in families:
        name = family.partition(" ")[0]
        if name in met:
            turn, place = divmod(names.index(name), len(PALETTE))
            styles[family] = (_MARKS[(met[name] + 3 * turn) % len(_MARKS)], PALETTE[place])
            met[name] += 1
        else:
            styles[family] = ("", GREY)
    return styles


def _line(panel: "Axes", members: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> Any:
    """Draws the settings of one code, joined by a line; gives what stands for them in a legend."""
    mark, colour = style
    bits = [row["bits_per_coordinate"] for row in members]
    values = np.array([row["nmse"] for row in members])
    if values.max() < _NO_ERROR:
        return panel.axvline(bits[0], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    if members[0]["code"].startswith("lloyd-max"):
        return panel.plot(bits, values, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))[0]
    low = np.array(
        [value if row.get("nmse_low") is None else row["nmse_low"] for row, value in zip(members, values, strict=True)]
    )
    high = np.array(
        [
            value if row.get("nmse_high") is None else row["nmse_high"]
            for row, value in zip(members, values, strict=True)
        ]
    )
    return panel.errorbar(
        bits, values, [np.minimum(values - low, 0.9 * values), high - values], fmt=mark, linestyle="-", linewidth=1.1,
        markersize=4, color=colour, elinewidth=0.9,
    )  # fmt: skip
