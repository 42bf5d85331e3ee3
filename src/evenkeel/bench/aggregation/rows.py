"""Turns simulated cells into the pages of `evenkeel bench aggregation`."""

from collections.abc import Sequence
from itertools import groupby

from evenkeel.figures.tables import Column, Page, Row

__all__ = ["notes_of", "pages_of"]

_TITLES = {
    "load": "load {value}: windows over slots",
    "regime": "{value}",
    "skew": "skew {value}: coefficient of variation of computing times",
    "rate": "links of {value} Gbit/s, jobs of known models",
    "jobs": "{value} jobs",
    "workers": "{value} workers a job",
    "loss": "loss {value}",
}
_COLUMNS = (
    Column("jct", "mean JCT", "x infinite"),
    Column("p95", "p95 JCT", "x infinite"),
    Column("share", "in switch", "%"),
    Column("server", "to servers", "MB"),
    Column("evictions", "evictions", "a fragment"),
    Column("useful", "useful", "% of slots"),
    Column("waiting", "waiting", "% of slots"),
    Column("fair", "fairness", "Jain"),
)


def pages_of(rows: Sequence[Row]) -> list[Page]:
    """Gives a page for each cell, with a line for each policy."""
    pages = []
    for (question, value), group in groupby(rows, lambda row: (row["question"], row["value"])):
        lines = [
            {
                "policy": row["policy"],
                "jct": f"{row['jct_over_infinite']:.3f}",
                "p95": f"{row['p95_over_infinite']:.3f}",
                "share": f"{100 * row['in_switch_share']:.1f}",
                "server": f"{row['server_bytes'] / 1e6:.0f}",
                "evictions": f"{row['evictions_per_fragment']:.3f}",
                "useful": f"{100 * row['slots_useful_share']:.1f}",
                "waiting": f"{100 * row['slots_waiting_share']:.1f}",
                "fair": f"{row['fairness']:.3f}",
            }
            for row in group
        ]
        pages.append(Page(lines, (Column("policy", "policy"),), _COLUMNS, _TITLES[question].format(value=value)))
    return pages


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Gives lines that say where preemption does not pay, and where `assoc` is not the best."""
    notes = [
        "JCT: job completion time, as a multiple of the same jobs' with infinite memory; every sum was checked",
        "ring: computed by formula, hence only without loss and with one switch",
    ]
    for (question, value), group in groupby(rows, lambda row: (row["question"], row["value"])):
        times = {row["policy"]: row["jct_over_infinite"] for row in group if row["policy"] != "unlimited"}
        if {"esa", "atp-free"} <= times.keys() and times["esa"] > times["atp-free"]:
            loss = 100 * (times["esa"] / times["atp-free"] - 1)
            notes.append(f"{question} {value}: preemption does not pay: esa takes {loss:.1f} % longer than atp-free")
        best = min(times, key=lambda policy: times[policy])
        if "assoc" in times and times["assoc"] > times[best] / 0.98:
            more = 100 * (times["assoc"] / times[best] - 1)
            notes.append(f"{question} {value}: assoc takes {more:.1f} % more than {best}")
    return notes
