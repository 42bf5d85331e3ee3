"""Figures from records, as SVG for the report or PNG for pages. matplotlib is loaded only when one is drawn."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle, product
from math import ceil, floor, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evenkeel.errors import EvenkeelError
from evenkeel.estimates import quantile_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["codes", "colours", "fills", "latency_histograms", "save", "sources", "svg", "tail"]

Latencies = Mapping[str, ArrayLike]
_Floats = NDArray[np.float64]

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for doing nothing. All of them stand out on
# white and on near-black.
_GREY = "#8a8f98"
_INK = "#3b4048"  # text and axes; in SVG the surrounding page's own colour
_POLICIES = {
    "none": _GREY,
    "hedge": "#56b4e9",
    "collage": "#009e73",
    "collage+hedge": "#d55e00",
    "replicate": "#cc79a7",
}
_FURTHER = ("#e69f00", "#0072b2", "#b8a500", "#7f6bd0", "#5f9ea0", "#a0522d")
_SOURCES = {
    "exact": _GREY,
    "hedge": "#56b4e9",
    "collage": "#009e73",
    "decoded": "#0072b2",
    "edge": "#e69f00",
    "default": "#cc79a7",
    "failed": _INK,
}
_FILLS = ("#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#7f6bd0", "#b8a500", "#a0522d", "#5f9ea0")
_MARKS = ("o", "s", "^")
_LEGEND_COLUMNS = 4
_GRADIENT_COLUMNS = 7
_CODE_COLUMNS = 3
_CODE_MARKS = ("o", "s", "^", "D", "v", "P")
_SIZES = re.compile(r"(bits|levels|rank|ratio)=")
_NO_ERROR = 1e-10  # of float32: nothing to draw on a logarithmic scale
_COVERAGE = re.compile(r"accuracy_coverage_\d+")
_BINS = 120
_WIDTH = 9.6  # inches
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "evenkeel",
    "text.color": _INK,
    "text.parse_math": False,  # a policy may have any name
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


def colours(policies: Iterable[str]) -> dict[str, str]:
    """A colour for each policy: well-known policies always have theirs, others get one in turn."""
    further = cycle(_FURTHER)
    return {policy: _POLICIES.get(policy) or next(further) for policy in policies}


def latency_histograms(latencies_by_policy: Latencies) -> "Figure":
    """Stacked histograms of latency with an estimated density, one for each policy, on one axis of seconds.

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
    with _drawing(0.75 + 1.25 * len(seconds), left=0.6, top=0.25) as figure:
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
            panel.axvline(p99_s, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
            panel.set_title(policy, loc="left", fontsize=9, fontweight="bold", pad=3)
            told = f"mean {values.mean():.3f} s · sd {_sd(values):.3f} s · p99 {p99_s:.3f} s"
            panel.set_title(told, loc="right", fontsize=9, pad=3)
        panels[-1].set_xlabel("latency (s)")
        figure.supylabel("probability density (1/s, square-root scale)", x=0.004, ha="left", fontsize=9)
    return figure


def tail(latencies_by_policy: Latencies) -> "Figure":
    """Share of requests that take longer than a time, on a logarithmic scale, one line for each policy.

    Dotted lines mark p95, p99 and p99.9: where a policy crosses one, that is its quantile.

    Args:
        latencies_by_policy: milliseconds.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    seconds = _seconds(latencies_by_policy)
    palette = colours(latencies_by_policy)
    most = max(values.size for values in seconds.values())
    lowest = max(0.5 / most, 2e-5)
    with _drawing(3.9, left=0.8, right=0.5) as figure:
        panel: Axes = figure.subplots()
        panel.set_yscale("log")
        for policy, values in seconds.items():
            times, longer = _survival(values)
            panel.step(times, longer, where="post", color=palette[policy], linewidth=1.7, label=policy)
        for level, label in ((0.05, "p95"), (0.01, "p99"), (0.001, "p99.9")):
            if level > lowest:
                panel.axhline(level, color=_INK, linewidth=0.6, linestyle=(0, (1, 3)))
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


def sources(counts_by_policy: Mapping[str, Mapping[str, int]]) -> "Figure":
    """How the answers of each policy were known, as stacked bars of shares.

    Args:
        counts_by_policy: policy -> source -> number of requests, as `records.count_sources` gives them.

    Raises:
        EvenkeelError: there is nothing to draw.
    """
    counts = {policy: count for policy, count in counts_by_policy.items() if sum(count.values())}
    if not counts:
        raise EvenkeelError("there are no answers to draw a figure of")
    met = [source for source in _SOURCES if any(count.get(source) for count in counts.values())]
    # Labels are about .08 inches a letter.
    with _drawing(0.85 + 0.34 * len(counts), left=0.15 + 0.08 * max(map(len, counts)), top=0.35) as figure:
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


def fills(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Accuracy of fills against what they cost, against the confidence asked of them, and against how full groups are.

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
    styles = {row["method"]: (colour, mark) for row, (mark, colour) in zip(drawn, _fill_styles(), strict=False)}
    partly = [row for row in drawn if len(row.get("by_items", ())) > 1]
    legend = -(-(1 + len(drawn)) // _LEGEND_COLUMNS)
    with _drawing(4.0 + 0.2 * legend, left=0.6, top=0.2 + 0.2 * legend, right=0.15) as figure:
        panels: list[Axes] = list(figure.subplots(1, 3 if partly else 2, sharey=True, squeeze=False)[0])
        figure.subplots_adjust(wspace=0.08)
        for panel in panels:
            panel.axhline(100 * classifier["accuracy"], color=_GREY, linewidth=1.2, label=classifier["method"])
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


def codes(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Error of the mean against bits per coordinate, both on logarithmic scales, a panel for each kind of vectors.

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
    styles = _code_styles(families)
    lines, legend = -(-len(panels) // _CODE_COLUMNS), -(-len(families) // _CODE_COLUMNS)
    with _drawing(0.8 + 2.6 * lines + 0.19 * legend, left=0.75, top=0.3 + 0.19 * legend) as figure:
        grid = figure.subplots(lines, min(len(panels), _CODE_COLUMNS), sharex=True, sharey=True, squeeze=False)
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
                handles[family] = _code_line(panel, members, styles[family])
            told = [distribution, f"n={workers}", *([] if correlation is None else [f"ρ={correlation:.2g}"])]
            panel.set_title(" · ".join(told), loc="left", fontsize=9, fontweight="bold", pad=3)
            panel.grid(which="major", color=_GREY, alpha=0.25, linewidth=0.5)
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
            [handles[family] for family in shown], shown, loc="upper left", ncols=_CODE_COLUMNS, fontsize=8,
            handlelength=1.6,
        )  # fmt: skip
    return figure


def _family(code: str) -> str:
    """The code without the number that its settings differ in."""
    name, _, fields = code.partition(":")
    kept = [field for field in fields.split(",") if field and not _SIZES.match(field)]
    return f"{name} {', '.join(kept)}" if kept else name


def _code_styles(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Mark and colour: a colour for each code, a mark for each of its variants."""
    names = list(dict.fromkeys(family.partition(" ")[0] for family in families))
    names = [name for name in names if name not in ("fp32", "lloyd-max")]  # lines without marks
    styles, met = {}, dict.fromkeys(names, 0)
    for family in families:
        name = family.partition(" ")[0]
        if name in met:
            turn, place = divmod(names.index(name), len(_FILLS))
            styles[family] = (_CODE_MARKS[(met[name] + 3 * turn) % len(_CODE_MARKS)], _FILLS[place])
            met[name] += 1
        else:
            styles[family] = ("", _GREY)
    return styles


def _code_line(panel: "Axes", members: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> Any:
    """The settings of one code, joined; gives what stands for them in a legend."""
    mark, colour = style
    bits = [row["bits_per_coordinate"] for row in members]
    values = np.array([row["nmse"] for row in members])
    if values.max() < _NO_ERROR:
        return panel.axvline(bits[0], color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    if members[0]["code"].startswith("lloyd-max"):
        return panel.plot(bits, values, color=_INK, linewidth=1.0, linestyle=(0, (1, 2)))[0]
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


def gradients(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training loss by step and by second, and the time to the target, for each task and rate a row of panels.

    Losses are means over seeds, of stretches of steps; a second of theirs is the mean of the seeds' times. Whiskers of
    bars are 95 % intervals. A method that did not reach the target with every seed has no bar.

    Args:
        rows: of `evenkeel bench gradients`: each method's mean, and one row a seed.

    Raises:
        EvenkeelError: there are no rows.
    """
    groups = list(dict.fromkeys((row["task"], row["rate"]) for row in rows))
    if not groups:
        raise EvenkeelError("there are no trainings to draw a figure of")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    palette = dict(zip(methods, cycle((_GREY, *_FILLS)), strict=False))
    legend = -(-len(methods) // _GRADIENT_COLUMNS)
    top = 0.3 + 0.2 * legend
    with _drawing(0.5 + top + 2.6 * len(groups), left=0.6, top=top) as figure:
        panels = figure.subplots(len(groups), 3, squeeze=False)
        figure.subplots_adjust(wspace=0.22)
        for line, (task, rate) in zip(panels, groups, strict=True):
            own = [row for row in rows if (row["task"], row["rate"]) == (task, rate)]
            line[0].set_title(f"{task} at {rate}", loc="left", fontsize=9, fontweight="bold", pad=3)
            for method in dict.fromkeys(row["method"] for row in own):
                curves = [row["curve"] for row in own if row["method"] == method and "curve" in row]
                losses = np.mean([curve["loss"] for curve in curves], axis=0)
                for panel, axis in zip(line, ("step", "second"), strict=False):
                    places = np.mean([curve[axis] for curve in curves], axis=0)
                    panel.plot(places, losses, color=palette[method], linewidth=1.3, label=method)
            # A training that went astray must not squeeze the others.
            first = np.array([row["curve"]["loss"][0] for row in own if "curve" in row])
            top_loss = 1.25 * first[np.isfinite(first)].max(initial=1.0)
            for panel, label in zip(line, ("step", "second"), strict=False):
                panel.set_ylim(0, top_loss)
                panel.set_xlim(left=0)
                panel.set_xlabel(label)
            line[0].set_ylabel("training loss")
            line[1].tick_params(axis="y", labelleft=False)
            _target_bars(line[2], [row for row in own if "curve" not in row], palette)
        handles, labels = _first_of_each(panels[:, 0])
        figure.legend(handles, labels, loc="upper left", ncols=_GRADIENT_COLUMNS, fontsize=8, handlelength=1.2)
    return figure


def _target_bars(panel: "Axes", means: Sequence[Mapping[str, Any]], palette: Mapping[str, str]) -> None:
    places = np.arange(len(means))
    for place, row in zip(places, means, strict=True):
        value = row["seconds_to_target"]
        if value is None:
            panel.annotate("not reached", (0, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        low, high = row.get("seconds_to_target_low"), row.get("seconds_to_target_high")
        error = None if low is None or high is None else [[value - max(0.0, low)], [high - value]]
        panel.barh(place, value, height=0.62, color=palette[row["method"]], xerr=error, ecolor=_INK)
    panel.set_yticks(places, [row["method"] for row in means], fontsize=8)
    panel.set_ylim(len(means) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("seconds to the target")
    panel.tick_params(axis="y", length=0)


def _first_of_each(panels: Iterable["Axes"]) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each label once."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _fill_styles() -> "Iterator[tuple[str, str]]":
    """Marks and colours: all colours with the first mark, then with the next."""
    return cycle(product(_MARKS, _FILLS))


def _percents(row: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = row[key]
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return 100 * value, 100 * (value if low is None else low), 100 * (value if high is None else high)


def _banded(panel: "Axes", places: ArrayLike, bounds: _Floats, colour: str, mark: str) -> None:
    """A line with its band, from rows of value, low, high."""
    panel.plot(places, bounds[:, 0], color=colour, linewidth=1.5, marker=mark, markersize=3)
    panel.fill_between(places, bounds[:, 1], bounds[:, 2], color=colour, alpha=0.15, linewidth=0)


def svg(figure: "Figure", name: str) -> str:
    """The figure as an `<svg>` element to be put into a page: its text and axes take the page's colour and font.

    Args:
        figure: what to draw.
        name: goes before every id, so that several figures can share a page.
    """
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Only ids that something refers to are kept.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def save(figure: "Figure", path: str | Path) -> None:
    """Write the figure to a file, `.png` (two pixels a point) or `.svg`, on white.

    Raises:
        EvenkeelError: the file cannot be written, or has another ending.
    """
    import matplotlib

    if Path(path).suffix not in (".png", ".svg"):
        raise EvenkeelError(f"figure {path}: the file's name must end in .png or .svg")
    try:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(
                path, dpi=144, facecolor="white", metadata={"Date": None} if str(path).endswith("svg") else {}
            )
    except OSError as error:
        raise EvenkeelError(f"figure {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _drawing(
    height: float, *, left: float, right: float = 0.1, top: float = 0.1, bottom: float = 0.5
) -> "Iterator[Figure]":
    """A figure to draw on in our style, of a height and with margins in inches.

    The margins are fixed because matplotlib's own layout takes as long as all the drawing. No global state of
    matplotlib is left changed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=left / _WIDTH, right=1 - right / _WIDTH, top=1 - top / height, bottom=bottom / height, hspace=0.42
        )
        yield figure


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _seconds(latencies_by_policy: Latencies) -> dict[str, _Floats]:
    arrays = {policy: np.asarray(values, dtype=np.float64) / 1e3 for policy, values in latencies_by_policy.items()}
    arrays = {policy: values for policy, values in arrays.items() if values.size}
    if not arrays:
        raise EvenkeelError("there are no latencies to draw a figure of")
    return arrays


def _density(values: _Floats, end: float) -> tuple[_Floats, _Floats]:
    """Gaussian kernel estimate on 0..end, with Silverman's robust width; from fine bins, so that it costs little."""
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


def _survival(values: _Floats) -> tuple[_Floats, _Floats]:
    """Times and the shares of values above them; long samples are thinned, but not in the tail."""
    ordered = np.sort(values)
    longer = 1 - np.arange(1, ordered.size + 1) / ordered.size
    if ordered.size > 3000:
        body = np.linspace(0, ordered.size - 1001, 1000).astype(int)
        keep = np.concatenate((body, np.arange(ordered.size - 1000, ordered.size)))
        ordered, longer = ordered[keep], longer[keep]
    return np.concatenate(([0.0], ordered)), np.concatenate(([1.0], longer))


def _sd(values: _Floats) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def _root(heights: _Floats) -> _Floats:
    return np.sqrt(np.maximum(heights, 0.0))


def _round_down(value: float) -> float:
    """The value with one digit."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** np.floor(np.log10(value))
    return float(np.floor(value / unit) * unit)
