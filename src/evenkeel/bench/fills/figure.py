"""Draws the figure of fills: how right they are against what they cost and how sure they are."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from evenkeel.arrays import FloatArray
from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, PALETTE, drawing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["fills"]

_MARKS = ("o", "s", "^")
_LEGEND_COLUMNS = 4
_COVERAGE = re.compile(r"accuracy_coverage_\d+")


def fills(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the accuracy of fills against their cost, the confidence that they must have, and how full groups are.

    The first row is the classifier itself, drawn as a line across. Whiskers and bands are 95 % intervals. The third
    panel is there when a row has `by_items`.

    Args:
        rows: of `evenkeel bench fills`.

    Raises:
        EvenkeelError: no row but the classifier's has an accuracy.
    """
    classifier, drawn = rows[0], [row for row in rows[1:] if row["accuracy"] is not None]
    if not drawn:
        raise EvenkeelError("there are no fills with labels to draw a figure of")
    styles = {row["method"]: (colour, mark) for row, (mark, colour) in zip(drawn, _styles(), strict=False)}
    partly = [row for row in drawn if len(row.get("by_items", ())) > 1]
    legend = -(-(1 + len(drawn)) // _LEGEND_COLUMNS)
    with drawing(4.0 + 0.2 * legend, left=0.6, top=0.2 + 0.2 * legend, right=0.15) as figure:
        panels: list[Axes] = list(figure.subplots(1, 3 if partly else 2, sharey=True, squeeze=False)[0])
        figure.subplots_adjust(wspace=0.08)
        for panel in panels:
            panel.axhline(100 * classifier["accuracy"], color=GREY, linewidth=1.2, label=classifier["method"])
        for row in drawn:
            colour, mark = styles[row["method"]]
            value, low, high = _percents(row, "accuracy")
            panels[0].errorbar(
                row["cost"], value, [[value - low], [high - value]], fmt=mark, markersize=5, color=colour,
                elinewidth=1.2, label=f"{row['method']} (N={row['images_per_backup']})",
            )  # fmt: skip
            covered = [(int(key.rsplit("_", 1)[1]), key) for key in row if _COVERAGE.fullmatch(key)]
            bounds = np.array([_percents(row, key) for _, key in covered])
            _banded(panels[1], [percent for percent, _ in covered], bounds, colour, mark)
        for row in partly:
            bounds = np.array([_percents(entry, "accuracy") for entry in row["by_items"]])
            items = [entry["items"] for entry in row["by_items"]]
            _banded(panels[2], items, bounds, *styles[row["method"]])
        panels[0].set_xlim(0, 1.12 * max(row["cost"] for row in drawn))
        panels[0].set_xlabel("cost (passes of the classifier)")
        panels[0].set_ylabel("fills right (%)")
        panels[1].invert_xaxis()  # stricter to the right
        panels[1].set_xlabel("fills that are sure enough (%)")
        if partly:
            panels[2].set_xlabel("items in the group")
            panels[2].locator_params(axis="x", integer=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", ncols=_LEGEND_COLUMNS, fontsize=8, handlelength=1.2)
    return figure


def _styles() -> "Iterator[tuple[str, str]]":
    """Gives marks and colours: all colours with the first mark, then with the next."""
    return cycle(product(_MARKS, PALETTE))


def _percents(row: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = row[key]
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return 100 * value, 100 * (value if low is None else low), 100 * (value if high is None else high)


def _banded(panel: "Axes", places: ArrayLike, bounds: FloatArray, colour: str, mark: str) -> None:
    """Draws a line with its band, from rows of value, low, high."""
    panel.plot(places, bounds[:, 0], color=colour, linewidth=1.5, marker=mark, markersize=3)
    panel.fill_between(places, bounds[:, 1], bounds[:, 2], color=colour, alpha=0.15, linewidth=0)
