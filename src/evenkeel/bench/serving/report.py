"""Writes the report of a comparison: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evenkeel.bench.serving.figure import Latencies, colours, latency_histograms, sources, tail
from evenkeel.bench.serving.rows import measured, name, settings
from evenkeel.errors import ConfigurationError
from evenkeel.figures.drawing import svg
from evenkeel.figures.tables import Row, interval_text, value_text
from evenkeel.files import why_unwritten, write_whole

__all__ = ["headline", "write_report"]

_PREFERRED = ("collage+hedge", "collage")

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --soft: #646b75; --line: #dfe2e6; --tint: #f3f5f4;
  --mark: #00805e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e7e9eb; --soft: #9aa1ab; --line: #30353b; --tint: #1c2024; --mark: #3cc79d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 3.5rem 1.75rem 5rem; }
.kicker { margin: 0 0 .6rem; color: var(--soft); font-size: .875rem; }
h1 { margin: 0; max-width: 24ch; font-size: clamp(1.9rem, 4.2vw, 2.75rem); line-height: 1.14; letter-spacing: -.02em;
  font-weight: 650; text-wrap: balance; }
h1 b { color: var(--mark); font-weight: inherit; white-space: nowrap; }
.lead { max-width: 44rem; margin: 1.1rem 0 0; color: var(--soft); font-size: 1.0625rem; }
h2 { margin: 3.25rem 0 .35rem; font-size: 1.1875rem; letter-spacing: -.01em; font-weight: 650; }
p { max-width: 44rem; margin: .35rem 0 1rem; }
.note { color: var(--soft); font-size: .9375rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem; }
.figures { width: 100%; margin-top: 1rem; }
th { font-weight: 600; text-align: left; }
.figures th, .figures td { padding: .55rem .55rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
.figures td, .figures thead th + th { text-align: right; }
.figures thead th { vertical-align: bottom; font-size: .8125rem; line-height: 1.3; border-bottom-color: var(--soft); }
.figures thead small { display: block; font-weight: 400; color: var(--soft); font-size: inherit; }
.figures td small { display: block; color: var(--soft); font-size: .75rem; line-height: 1.35; }
.figures th:first-child, .figures td:first-child { padding-left: 0; }
.figures th:last-child, .figures td:last-child { padding-right: 0; }
.figures tbody th { white-space: normal; min-width: 8.5rem; }
.figures tbody th small { display: block; font-weight: 400; color: var(--soft); font-size: .75rem; }
.figures .best { background: var(--tint); }
.figures th span { white-space: nowrap; }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .5em; }
figure { margin: 1rem 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 38rem; height: auto; }
figure svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1.5rem; margin: .75rem 0 0;
  font-size: .9375rem; font-variant-numeric: tabular-nums; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: .75rem 0 0; padding: .9rem 1.1rem; background: var(--tint); border-radius: .5rem; overflow-x: auto;
  font: .875rem/1.5 ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 3.5rem; }
"""


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    latencies_by_policy: Latencies,
    arguments: Mapping[str, Any],
    machine: Mapping[str, Any],
    *,
    command: str,
    sources_by_policy: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Writes one self-contained HTML file: the result as a sentence, table, figures, and the command to repeat it.

    Args:
        path: where to.
        rows: with the keys of `rows.summarise`.
        latencies_by_policy: milliseconds of the answered requests, for the figures.
        arguments: of the run.
        machine: what `records.machine` gives.
        command: the command line that makes this report again.
        sources_by_policy: what `rows.count_sources` gives for each policy; without it that figure is left out.

    Raises:
        ConfigurationError: the file cannot be written.
        EvenkeelError: no latencies.
    """
    page = _page(rows, latencies_by_policy, arguments, machine, command, sources_by_policy)
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise ConfigurationError(
            f"report {path} cannot be written: {why_unwritten(error)}; or choose another file"
        ) from error


def headline(rows: Sequence[Row]) -> str:
    """Says the result in one plain sentence: p99 of doing nothing beside p99 of the best that coding does."""
    baseline, best = _compared(rows)
    if baseline is None or best is None:
        return "Latencies as measured"
    before, after = baseline["p99_ms"], best["p99_ms"]
    change = f"p99 {_ms(before)} → {_ms(after)}"
    factor = before / after if after else 1.0
    if factor >= 1.05:
        return f"{change}: {factor:.1f} times shorter with {best['policy']}"
    if factor <= 1 / 1.05:
        return f"{change}: {1 / factor:.1f} times longer with {best['policy']}"
    return f"{change}: no difference with {best['policy']}"


def _page(
    rows: Sequence[Row],
    latencies_by_policy: Latencies,
    arguments: Mapping[str, Any],
    machine: Mapping[str, Any],
    command: str,
    sources_by_policy: Mapping[str, Mapping[str, int]] | None,
) -> str:
    change, colon, rest = headline(rows).partition(":")
    title = f"<b>{escape(change)}</b>{colon}{escape(rest)}" if colon else escape(change)
    figures = [
        _figure(
            "How long requests take",
            "The tail is what redundancy is for. The density's scale is a square root, so that a slow mode of a few "
            "percent can be seen; the dashed line is the 99th percentile.",
            svg(latency_histograms(latencies_by_policy), "histograms"),
            "Histograms of latency, one for each policy",
        ),
        _figure(
            "How many take longer",
            "Where a line crosses a dotted one, that is its quantile. Lower and further left is better.",
            svg(tail(latencies_by_policy), "tail"),
            "Share of requests that take longer than a time, one line for each policy",
        ),
    ]
    if sources_by_policy:
        figures.append(
            _figure(
                "How the answers are known",
                "An exact answer, or a hedge's, comes from the user's own model. Every other says that it does not.",
                svg(sources(sources_by_policy), "sources"),
                "Shares of the answers by source, one bar for each policy",
            )
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(headline(rows))} · evenkeel</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<p class="kicker">evenkeel · {escape(_setting(rows))}</p>
<h1>{title}</h1>
{_lead(rows)}
<h2>Every figure, with its 95 % interval</h2>
{_table(rows, colours(latencies_by_policy))}
{"".join(figures)}
<h2>How it was measured</h2>
<p>Requests are sent at times drawn in advance, whether or not earlier ones have been answered, and a latency counts
from the time at which its request was <em>meant</em> to be sent. Every policy gets the same arrivals, the same items
and the same delays: the same piece of work takes the same time under each of them.</p>
<p class="note">Intervals: between order statistics for quantiles, Student's for means, from the fourth moment for
standard deviations, Wilson's for shares, Poisson for extra load. They take requests as independent, which neighbours
under load are not quite. Latencies are of answered requests; extra load is tasks beyond one an item; a fill is an
answer taken from a backup.</p>
<div class="pair">
<div><h2>Arguments</h2>{_list(arguments)}</div>
<div><h2>Machine</h2>{_list(_readable(machine))}</div>
</div>
<h2>To get this again</h2>
<pre>{escape(command)}</pre>
</main>
</body>
</html>
"""


def _compared(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Gives the rows that the headline compares: nothing done, and coding (else the shortest tail), at one setting."""
    known = [row for row in rows if row.get("p99_ms") is not None]
    baseline = next((row for row in known if row["policy"] == "none"), known[0] if known else None)
    if baseline is None:
        return None, None
    alike = [row for row in known if row is not baseline and settings(row) == settings(baseline)]
    for policy in _PREFERRED:
        for row in alike:
            if row["policy"] == policy:
                return baseline, row
    return baseline, min(alike, key=lambda row: float(row["p99_ms"]), default=None)


def _lead(rows: Sequence[Row]) -> str:
    baseline, best = _compared(rows)
    if baseline is None or best is None:
        return ""
    parts = [
        f"99 of 100 requests were answered within {_ms(best['p99_ms'])} with {best['policy']}, and within "
        f"{_ms(baseline['p99_ms'])} with {'no redundancy' if baseline['policy'] == 'none' else baseline['policy']}."
    ]
    if best.get("filled") is not None and best["filled"] > 0:
        part = f"{100 * best['filled']:.1f} % of the answers came from a backup"
        if best.get("fill_accuracy") is not None:
            part += f"; of the approximate ones among them {100 * best['fill_accuracy']:.0f} % were right"
        parts.append(part + ".")
    if best.get("accuracy") is not None and baseline.get("accuracy") is not None:
        parts.append(
            f"Of all answers {100 * best['accuracy']:.1f} % were right, against {100 * baseline['accuracy']:.1f} %."
        )
    return f'<p class="lead">{escape(" ".join(parts))}</p>'


def _setting(rows: Sequence[Row]) -> str:
    """Says what all rows have in common."""
    if not rows:
        return "no requests"
    shared = [text for key, text in settings(rows[0]).items() if all(settings(row).get(key) == text for row in rows)]
    counts = {row.get("requests") for row in rows}
    if len(counts) == 1:
        shared.append(f"{counts.pop():,} requests each")
    return " · ".join(shared)


def _table(rows: Sequence[Row], palette: Mapping[str, str]) -> str:
    columns = measured(rows)
    heads = "".join(
        f'<th scope="col">{escape(each.heading)}<small>{escape(each.unit)}</small></th>' for each in columns
    )
    _, best = _compared(rows)
    lines = []
    for row in rows:
        cells = "".join(
            f"<td>{escape(value_text(row, each))}<small>{escape(interval_text(row, each))}</small></td>"
            for each in columns
        )
        policy, comma, differs = name(row, rows).partition(", ")
        dot = palette.get(str(row["policy"]))
        mark = f'<span class="dot" style="background:{dot}"></span>' if dot else ""
        label = f"<span>{mark}{escape(policy)}</span>" + (f"<small>{escape(differs)}</small>" if comma else "")
        lines.append(f'<tr{" class=best" if row is best else ""}><th scope="row">{label}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="figures"><thead><tr><th scope="col">policy</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(title: str, text: str, drawing: str, label: str) -> str:
    return (
        f'<h2>{escape(title)}</h2><p class="note">{escape(text)}</p>'
        f'<figure role="img" aria-label="{escape(label)}">{drawing}</figure>'
    )


def _list(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(_value(value))}</dd>"
        for key, value in values.items()
    )
    return f"<dl>{items}</dl>"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _readable(machine: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(machine)
    if isinstance(shown.get("memory_bytes"), int):
        shown = {
            ("memory" if key == "memory_bytes" else key): (
                f"{value / 2**30:.0f} GiB" if key == "memory_bytes" else value
            )
            for key, value in shown.items()
        }
    return shown


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
