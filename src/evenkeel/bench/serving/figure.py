"""Draws a serving comparison: histograms and tail of latency, and how answers were known."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from evenkeel.arrays import FloatArray
from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import GREY, INK, drawing
from evenkeel.figures.estimates import quantile_place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Latencies", "colours", "frontier", "latency_histograms", "sources", "tail"]

Latencies = Mapping[str, ArrayLike]

_POLICIES = {
    "none": GREY,
    "hedge": "#56b4e9",
    "collage": "#009e73",
    "collage+hedge": "#d55e00",
    "replicate": "#cc79a7",
}
_FURTHER = ("#e69f00", "#0072b2", "#b8a500", "#7f6bd0", "#5f9ea0", "#a0522d")
_SOURCES = {
    "exact": GREY,
    "hedge": "#56b4e9",
    "collage": "#009e73",
    "decoded": "#0072b2",
    "edge": "#e69f00",
    "default": "#cc79a7",
    "failed": INK,
}
_BINS = 120


def colours(policies: Iterable[str]) -> dict[str, str]:
    """Gives each policy a colour: well-known policies always have theirs, others get one in turn."""
    further = cycle(_FURTHER)
    return {policy: _POLICIES.get(policy) or next(further) for policy in policies}


def latency_histograms(latencies_by_policy: Latencies) -> "Figure":
    """Draws stacked histograms of latency with an estimated density, one for each policy, on one axis of seconds.

    After Figure 4 of "Collage Inference" (Narra et al. 2019). Unlike there the density's scale is a square root, since
    a slow mode of 2 % would be too flat to see.

    Args:
        latencies_by_policy: milliseconds; policies are drawn in this order, those without any are left out.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    seconds = _seconds(latencies_by_policy)
    palette = colours(latencies_by_policy)
    # The axis ends where nearly all of every policy is seen; one extreme request must not squeeze the rest.
    end_s = 1.06 * max(1e-6, *(float(np.quantile(values, 0.999)) for values in seconds.values()))
    edges = np.linspace(0, end_s, _BINS + 1)
    with drawing(0.75 + 1.25 * len(seconds), left=0.6, top=0.25) as figure:
        panels: list[Axes] = list(figure.subplots(len(seconds), 1, sharex=True, squeeze=False)[:, 0])
        for panel, (policy, values) in zip(panels, seconds.items(), strict=True):
            colour = palette[policy]
            counts, _ = np.histogram(values, edges)
            heights = counts / (values.size * (edges[1] - edges[0]))
            panel.set_yscale("function", functions=(_root, np.square))
            panel.stairs(heights, edges, fill=True, color=colour, alpha=0.45, linewidth=0)
            grid, density = _density(values, end_s)
            panel.plot(grid, density, color=colour, linewidth=1.3)
            top = 1.25 * max(float(heights.max()), float(density.max()))
            panel.set_ylim(0, top)
            panel.set_yticks([0, _round_down(top / 8), _round_down(top / 1.5)])
            panel.set_xlim(0, end_s)
            p99_s = float(np.sort(values)[quantile_place(values.size, 0.99)])
            panel.axvline(p99_s, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            panel.set_title(policy, loc="left", fontsize=9, fontweight="bold", pad=3)
            statistics = f"mean {values.mean():.3f} s · sd {_sd(values):.3f} s · p99 {p99_s:.3f} s"
            panel.set_title(statistics, loc="right", fontsize=9, pad=3)
        panels[-1].set_xlabel("latency (s)")
        figure.supylabel("probability density (1/s, square-root scale)", x=0.004, ha="left", fontsize=9)
    return figure


def tail(latencies_by_policy: Latencies) -> "Figure":
    """Draws the share of requests that take longer than a time, on a logarithmic scale, one line for each policy.

    Dotted lines mark p95, p99 and p99.9: where a policy crosses one, that is its quantile.

    Args:
        latencies_by_policy: milliseconds.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    seconds = _seconds(latencies_by_policy)
    palette = colours(latencies_by_policy)
    longest = max(values.size for values in seconds.values())
    lowest = max(0.5 / longest, 2e-5)
    with drawing(3.9, left=0.8, right=0.5) as figure:
        panel: Axes = figure.subplots()
        panel.set_yscale("log")
        for policy, values in seconds.items():
            times, longer = _survival(values)
            panel.step(times, longer, where="post", color=palette[policy], linewidth=1.7, label=policy)
        for level, label in ((0.05, "p95"), (0.01, "p99"), (0.001, "p99.9")):
            if level > lowest:
                panel.axhline(level, color=INK, linewidth=0.6, linestyle=(0, (1, 3)))
                panel.annotate(
                    label,
                    (1.0, level),
                    (3, 0),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        panel.set_ylim(lowest, 1.0)
        panel.set_xlim(0, 1.03 * max(1e-6, *(float(values.max()) for values in seconds.values())))
        panel.set_yticks([level for level in (1.0, 0.1, 0.01, 0.001, 0.0001) if level > lowest])
        panel.yaxis.set_major_formatter(lambda level, _: f"{100 * level:g} %")
        panel.yaxis.set_minor_locator(_no_ticks())
        panel.set_xlabel("latency (s)")
        panel.set_ylabel("requests that take longer")
        panel.legend(loc="upper right", fontsize=9, handlelength=1.4)
    return figure


def frontier(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the p99 against the share of approximate answers, beside that of who knows every draw and spends no more.

    Args:
        rows: of `bench serving`; those without `max_approximate` have no backups, and are drawn as levels.
    """
    lines: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["policy"], row["load"]), []).append(row)
    several = len({load for _, load in lines}) > 1
    palette = colours(f"{policy}, load {load}" if several else policy for policy, load in lines)
    with drawing(3.9, left=0.8, right=0.4, top=0.35) as figure:
        panel: Axes = figure.subplots()
        for (policy, load), line in lines.items():
            label = f"{policy}, load {load}" if several else policy
            colour = palette[label]
            if line[0].get("max_approximate") is None:
                panel.axhline(line[0]["p99_ms"], color=colour, linewidth=1.3, label=label)
                continue
            line.sort(key=lambda row: float(row["max_approximate"]))
            shares = [100 * row["approximate"] for row in line]
            panel.plot(shares, [row["p99_ms"] for row in line], color=colour, marker="o", linewidth=1.7, label=label)
            panel.plot(
                shares,
                [row["ideal_p99_ms"] for row in line],
                color=colour,
                marker=".",
                linewidth=1.0,
                linestyle=(0, (4, 3)),
                label=f"{label}, clairvoyant",
            )
            for share, row in zip(shares, line, strict=True):
                panel.annotate(
                    f"{100 * row['max_approximate']:g} %",
                    (share, row["p99_ms"]),
                    (4, 5),
                    textcoords="offset points",
                    fontsize=8,
                )
        panel.set_ylim(0)
        panel.set_xlabel("approximate answers (%); at each point, how many were allowed")
        panel.set_ylabel("p99 (ms)")
        figure.legend(loc="upper right", ncols=4, fontsize=8)
    return figure


def sources(counts_by_policy: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Draws how the answers of each policy were known, as stacked bars of shares.

    Args:
        counts_by_policy: policy -> source -> number of requests, as `rows.count_sources` gives them.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    counts = {policy: count for policy, count in counts_by_policy.items() if sum(count.values())}
    if not counts:
        raise EvenkeelError("there are no answers to draw a figure of")
    met = [source for source in _SOURCES if any(count.get(source) for count in counts.values())]
    # Labels are about .08 inches a letter.
    with drawing(0.85 + 0.34 * len(counts), left=0.15 + 0.08 * max(map(len, counts)), top=0.35) as figure:
        panel: Axes = figure.subplots()
        places = np.arange(len(counts))
        left = np.zeros(len(counts))
        for source in met:
            shares = np.array([100 * count.get(source, 0) / sum(count.values()) for count in counts.values()])
            bars = panel.barh(places, shares, left=left, height=0.62, color=_SOURCES[source], label=source)
            # A number that would not fit into its bar is left to the table.
            texts = [f"{value:.1f} %" if value >= 6 else "" for value in shares]
            panel.bar_label(bars, texts, label_type="center", fontsize=8, color="#101418")
            left += shares
        panel.set_yticks(places, list(counts))
        panel.invert_yaxis()
        panel.set_xlim(0, 100)
        panel.set_xlabel("answers (%)")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        figure.legend(loc="upper right", ncols=len(met), fontsize=8, handlelength=0.8, columnspacing=1.2)
    return figure


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _seconds(latencies_by_policy: Latencies) -> dict[str, FloatArray]:
    arrays = {policy: np.asarray(values, dtype=np.float64) / 1e3 for policy, values in latencies_by_policy.items()}
    arrays = {policy: values for policy, values in arrays.items() if values.size}
    if not arrays:
        raise EvenkeelError("there are no latencies to draw a figure of")
    return arrays


def _density(values: FloatArray, end: float) -> tuple[FloatArray, FloatArray]:
    """Estimates the density on 0..end with Gaussian kernels of Silverman's robust width; from fine bins, for speed."""
    spread = min(_sd(values), float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / 1.34)
    width = max(0.9 * spread * values.size**-0.2, end / 600)
    grid = np.linspace(0, end, 1201)
    step = grid[1]
    counts, _ = np.histogram(values, np.append(grid - step / 2, end + step / 2))
    reach = np.arange(-int(4 * width / step) - 1, int(4 * width / step) + 2) * step
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="full")
    begin = reach.size // 2
    return grid[::2], (density[begin : begin + grid.size] / (values.size * step))[::2]


def _survival(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gives times and the shares of values above them; thins long samples, but not in the tail."""
    ordered = np.sort(values)
    longer = 1 - np.arange(1, ordered.size + 1) / ordered.size
    if ordered.size > 3000:
        body = np.linspace(0, ordered.size - 1001, 1000).astype(int)
        keep = np.concatenate((body, np.arange(ordered.size - 1000, ordered.size)))
        ordered, longer = ordered[keep], longer[keep]
    return np.concatenate(([0.0], ordered)), np.concatenate(([1.0], longer))


def _sd(values: FloatArray) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def _root(heights: FloatArray) -> FloatArray:
    return np.sqrt(np.maximum(heights, 0.0))


def _round_down(value: float) -> float:
    """Rounds the value down to one digit."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** np.floor(np.log10(value))
    return float(np.floor(value / unit) * unit)
