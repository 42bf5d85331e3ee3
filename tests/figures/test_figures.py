import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from evenkeel.bench.fills.figure import fills
from evenkeel.bench.serving.figure import colours, latency_histograms, sources, tail
from evenkeel.errors import EvenkeelError
from evenkeel.figures.drawing import save, svg


@pytest.fixture(scope="module")
def latencies():
    random = np.random.default_rng(0)
    body = random.lognormal(np.log(138), 0.2, 4000)
    late = body.copy()
    late[::40] = random.normal(700, 50, 100)
    return {"none": late, "collage+hedge": np.minimum(late, 220.0)}


@pytest.fixture(scope="module")
def histograms(latencies):
    return latency_histograms(latencies)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def test_histograms_are_stacked_on_one_axis_with_their_figures(histograms, latencies):
    panels = histograms.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["none", "collage+hedge"]
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert panels[-1].get_xlabel() == "latency (s)"
    none = latencies["none"] / 1e3
    p99_s = np.quantile(none, 0.99, method="inverted_cdf")
    assert panels[0].get_title(loc="right") == (
        f"mean {none.mean():.3f} s · sd {none.std(ddof=1):.3f} s · p99 {p99_s:.3f} s"
    )


def test_histogram_and_density_are_densities(histograms):
    for panel in histograms.axes:
        (stairs,) = [patch for patch in panel.patches if hasattr(patch, "get_data")]
        heights, edges, _ = stairs.get_data()
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1.0, abs=0.01)
        grid, density = panel.lines[0].get_data()
        assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=0.03)
        # The estimate follows the histogram where there is much of it.
        middle = grid[np.argmax(density)]
        assert 0.12 < middle < 0.23


def test_the_density_shows_the_slow_mode(histograms):
    grid, density = histograms.axes[0].lines[0].get_data()
    assert density[np.abs(grid - 0.7).argmin()] > 20 * density[np.abs(grid - 0.45).argmin()]


def test_the_tail_is_the_share_that_takes_longer():
    figure = tail({"none": np.arange(1, 1001, dtype=float)})
    times, longer = figure.axes[0].lines[0].get_data()
    for at_s, expected in ((0.0, 1.0), (0.1, 0.9), (0.9, 0.1), (0.99, 0.01)):
        assert longer[np.searchsorted(times, at_s, side="right") - 1] == pytest.approx(expected)
    assert {"p95", "p99"} <= set(texts(figure))
    assert "p99.9" in texts(figure)
    assert "p99.9" not in texts(tail({"none": np.arange(300.0)})), "too few requests to show it"


def test_a_long_tail_is_thinned_but_keeps_its_end():
    values = np.random.default_rng(0).exponential(100, 50_000)
    times, longer = tail({"none": values}).axes[0].lines[0].get_data()
    assert len(times) < 2500
    assert times[-1] == values.max() / 1e3
    for level in (0.5, 0.05, 0.01, 0.001):
        crossed = times[np.argmax(longer <= level)]
        assert crossed == pytest.approx(np.quantile(values, 1 - level) / 1e3, rel=0.02)


def test_sources_fill_each_bar():
    figure = sources({"none": {"exact": 10}, "collage": {"exact": 6, "collage": 3, "failed": 1}, "idle": {}})
    bars = [patch for patch in figure.axes[0].patches if patch.get_width() > 0]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(200.0)
    assert sorted(bar.get_width() for bar in bars) == pytest.approx([10, 30, 60, 100])
    assert "30.0 %" in texts(figure)


def test_svg_is_one_element_that_asks_for_nothing(histograms, latencies):
    drawn = [svg(histograms, "a"), svg(tail(latencies), "b"), svg(sources({"none": {"exact": 3}}), "c")]
    ids = [found for text in drawn for found in re.findall(r' id="([^"]+)"', text)]
    assert len(ids) == len(set(ids)), "several figures can share a page"
    for text in drawn:
        ElementTree.fromstring(text)
        assert text.startswith("<svg")
        assert "currentColor" in text
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(ids)
        assert not re.search(r'(href|src)="(?!#)', text)
        assert not re.search(r"<svg [^>]*width=", text)


def test_svg_is_the_same_every_time(latencies):
    assert svg(tail(latencies), "t") == svg(tail(latencies), "t")


def test_names_are_shown_as_they_are():
    name = '<b>$x_1$ & "more"</b>'
    figure = tail({name: [1.0, 2.0]})
    root = ElementTree.fromstring(svg(figure, "t"))
    assert name in ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_figures_are_saved(tmp_path, histograms):
    save(histograms, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").resize((200, 100)).getcolors(20_000)) > 20, "not blank"
    save(histograms, tmp_path / "figure.svg")
    ElementTree.parse(tmp_path / "figure.svg")


def test_a_figure_that_cannot_be_saved_is_told(tmp_path, histograms):
    with pytest.raises(EvenkeelError, match=r"must end in \.png or \.svg"):
        save(histograms, tmp_path / "figure.gif")
    with pytest.raises(EvenkeelError, match="cannot be written: No such file"):
        save(histograms, tmp_path / "none" / "figure.png")


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [7.0] * 50, list(range(10))])
def test_odd_samples_are_drawn(values):
    svg(latency_histograms({"none": values, "empty": []}), "h")
    svg(tail({"none": values}), "t")


@pytest.mark.parametrize("figure", [latency_histograms, tail, sources])
def test_nothing_to_draw_is_told(figure):
    with pytest.raises(EvenkeelError, match="to draw a figure of"):
        figure({})


def test_a_policy_keeps_its_colour():
    few, many = colours(["none", "collage"]), colours(["none", "hedge", "mine", "collage", "other"])
    assert few["collage"] == many["collage"]
    assert len(set(many.values())) == 5


def test_matplotlib_is_loaded_only_when_drawing():
    code = "import sys, evenkeel.bench.serving.report; print('matplotlib' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def fill_row(method, items, cost, accuracy, **more):
    row = {"method": method, "images_per_backup": items, "cost": cost, "accuracy": accuracy}
    for percent, gain in ((100, 0.0), (90, 0.03), (70, 0.06)):
        row[f"accuracy_coverage_{percent}"] = accuracy + gain
        row[f"accuracy_coverage_{percent}_low"] = accuracy + gain - 0.01
        row[f"accuracy_coverage_{percent}_high"] = accuracy + gain + 0.01
    return row | {"accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01} | more


def test_fills_are_drawn_against_cost_and_confidence(tmp_path):
    by_items = [{"items": 1, "accuracy": 0.9}, {"items": 2, "accuracy": 0.88}]
    rows = [fill_row("classifier", 1, 1.0, 0.93), fill_row("collage3x3", 9, 0.5, 0.86, by_items=by_items)]
    rows.append(fill_row("berrut9+1", 9, 1.0, 0.55))
    figure = fills(rows)
    assert len(figure.axes) == 3
    gate = figure.axes[1]
    assert gate.xaxis_inverted()
    (line,) = [line for line in gate.lines if len(line.get_xdata()) == 3 and line.get_ydata()[0] == 86]
    assert line.get_xdata().tolist() == [100, 90, 70]
    assert line.get_ydata().tolist() == pytest.approx([86, 89, 92])
    assert [line for line in gate.lines if set(line.get_ydata()) == {93}]
    assert "collage3x3 (N=9)" in texts(figure)
    assert len(fills(rows[::2]).axes) == 2  # nothing partly filled
    save(figure, tmp_path / "fills.png")
    with Image.open(tmp_path / "fills.png") as picture:
        assert picture.size[0] > 1000
    with pytest.raises(EvenkeelError, match="no fills with labels"):
        fills(rows[:1])


def test_methods_beyond_the_colours_get_another_mark():
    rows = [fill_row("classifier", 1, 1.0, 0.93)]
    rows += [fill_row(f"method{place}", 2, 0.1 * place, 0.8) for place in range(1, 14)]
    lines = [line for line in fills(rows).axes[1].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 13
