"""Draws the figure of `evenkeel demo edge`: accuracy against cost, the tail of latency, images that came in part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evenkeel.arrays import PixelArray
from evenkeel.figures.drawing import GREY, INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DecodedImage", "demo_figure"]


@dataclass(frozen=True)
class DecodedImage:
    """Holds an image, uint8 `[height, width, 3]`, on its way over a link that loses packets.

    Attributes:
        label: its class.
        sent: as it was.
        came: as it was decoded, grey where nothing arrived.
        filled: the same, with the holes concealed.
        lost: share of it that did not arrive.
    """

    label: str
    sent: PixelArray
    came: PixelArray
    filled: PixelArray
    lost: float


def demo_figure(
    rows: Sequence[Mapping[str, Any]],
    latencies_ms: Mapping[str, Sequence[float]],
    promised: float,
    deadline_ms: float,
    images: Sequence[DecodedImage],
) -> "Figure":
    """Draws the contenders.

    Args:
        rows: of the demo.
        latencies_ms: of each contender's answers.
        promised: accuracy.
        deadline_ms: of each request.
        images: to look at.
    """
    colours = dict(zip(latencies_ms, (GREY, PALETTE[1], PALETTE[0], PALETTE[3]), strict=True))
    with drawing(6.3, left=0.75, right=0.2, top=0.35, bottom=0.1) as figure:
        grid = figure.add_gridspec(2, 1, height_ratios=(2.5, 3.0), hspace=0.28)
        above = grid[0].subgridspec(1, 2, wspace=0.2)
        _draw_costs(figure.add_subplot(above[0]), rows, promised, colours)
        _draw_tails(figure.add_subplot(above[1]), latencies_ms, deadline_ms, colours)
        below = grid[1].subgridspec(3, len(images), wspace=0.04, hspace=0.06)
        for column, image in enumerate(images):
            for row, (name, pixels) in enumerate(
                (("sent", image.sent), ("arrived", image.came), ("filled", image.filled))
            ):
                panel = figure.add_subplot(below[row, column])
                panel.imshow(pixels, interpolation="nearest")
                panel.set_xticks([])
                panel.set_yticks([])
                panel.spines[:].set_visible(False)
                if not column:
                    panel.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
                if not row:
                    panel.set_title(f"{image.label}, −{image.lost:.0%}", fontsize=8, pad=3)
    return figure


def _draw_costs(panel: "Axes", rows: Sequence[Mapping[str, Any]], promised: float, colours: Mapping[str, str]) -> None:
    panel.set_title("right within the deadline, %", loc="left", fontsize=9, fontweight="bold", pad=4)
    panel.axhline(100 * promised, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    panel.annotate(
        f"promised {promised:g}",
        (1.08, 100 * promised),
        (0, 2),
        textcoords="offset points",
        fontsize=7,
        va="bottom",
        ha="right",
        color=INK,
    )
    for number, row in enumerate(rows):
        value, low, high = (100 * row[key] for key in ("right", "right_low", "right_high"))
        colour = colours[row["who"]]
        panel.errorbar([row["cost"]], [value], [[value - low], [high - value]], color=colour, marker="o", capsize=2)
        # Those with a light model stand close to each other: their names stand at different heights.
        place = {0: low, 2: high}.get(number, value)
        side = -1 if row["cost"] > 0.6 else 1
        panel.annotate(row["who"], (row["cost"], place), (9 * side, -3), textcoords="offset points", fontsize=8,
                       color=colour, ha="left" if side > 0 else "right")  # fmt: skip
    panel.set_xlim(0, 1.1)
    panel.set_xlabel("cost of an answer, in passes of the full model")
    panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)


def _draw_tails(
    panel: "Axes", latencies_ms: Mapping[str, Sequence[float]], deadline_ms: float, colours: Mapping[str, str]
) -> None:
    panel.set_title("answers that take longer, %", loc="left", fontsize=9, fontweight="bold", pad=4)
    for name, values in latencies_ms.items():
        times = np.sort(np.asarray(values, dtype=np.float64))
        longer = 100 * (1 - np.arange(len(times)) / max(len(times), 1))
        panel.step(times, longer, where="post", color=colours[name], linewidth=1.4, label=name)
    panel.axvline(deadline_ms, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    panel.annotate("deadline", (deadline_ms, 100), (-3, -2), textcoords="offset points", fontsize=7, ha="right",
                   va="top", color=INK)  # fmt: skip
    panel.set_yscale("log")
    panel.set_xscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    panel.set_ylim(0.2, 110)
    panel.set_xlabel("ms")
    panel.legend(loc="lower left", fontsize=8, handlelength=1.4)
    panel.grid(which="major", color=GREY, alpha=0.25, linewidth=0.5)
