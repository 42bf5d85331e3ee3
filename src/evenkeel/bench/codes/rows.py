"""Turns measured codes into the rows of `evenkeel bench codes`, and rows into the pages that people read."""

from collections.abc import Sequence
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING, Any

from evenkeel.bench.codes.traffic import TOPOLOGIES
from evenkeel.figures.estimates import mean
from evenkeel.figures.tables import Column, Page, Row

if TYPE_CHECKING:
    from evenkeel.bench.codes.peers import MeasuredCode

__all__ = ["notes_of", "pages_of", "row_of"]

_LABELS = (Column("code", "code"), Column("topology", "way"), Column("bits", "bits"))


def row_of(
    code: str,
    distribution: str,
    workers: int,
    correlation: float | None,
    results: Sequence["MeasuredCode"],
    *,
    length: int,
    found: float | None,
) -> dict[str, Any]:
    """Gives the row of one code on one kind of vectors.

    Args:
        code: its name.
        distribution: what the vectors are.
        workers: how many vectors are averaged.
        correlation: the one that was given; None: the one that was found.
        results: one for each seed.
        length: of the vectors.
        found: the correlation between the vectors; None for a single worker.
    """
    nmse = mean([result.nmse for result in results])
    bits = sum(result.traffic.bits for result in results) / len(results) / length
    return {
        "code": code,
        "workers": workers,
        "correlation": _rounded(found if correlation is None else correlation),
        "distribution": distribution,
        "bits_per_coordinate": _rounded(bits),
        "nmse": _rounded(nmse.value),
        "nmse_low": _rounded(max(nmse.low, 0.0)),
        "nmse_high": _rounded(nmse.high),
        "topology": results[0].traffic.topology,
        "correlation_found": _rounded(found),
        "seeds": len(results),
        "length": length,
    }


def pages_of(rows: Sequence[Row]) -> list[Page]:
    """Gives a page for each distribution and number of workers: a line for each code, a column for each correlation."""
    pages = []
    for (distribution, workers), group in groupby(rows, lambda row: (row["distribution"], row["workers"])):
        some = list(group)
        correlations = list(dict.fromkeys(row["correlation"] for row in some))
        columns = [
            Column(f"nmse {place}", "NMSE" if correlation is None else f"NMSE, ρ={correlation:.2g}", relative=True)
            for place, correlation in enumerate(correlations)
        ]
        lines: dict[str, dict[str, Any]] = {}
        for row in some:
            line = lines.setdefault(
                row["code"],
                {"code": row["code"], "topology": row["topology"], "bits": f"{row['bits_per_coordinate']:.2f}"},
            )
            column = columns[correlations.index(row["correlation"])]
            line |= {column.key: row["nmse"], f"{column.key}_high": row["nmse_high"]}
        title = f"{distribution}, {workers} worker{'s' if workers > 1 else ''}"
        pages.append(Page(list(lines.values()), _LABELS, columns, title))
    return pages


def notes_of(rows: Sequence[Row], codes: Sequence[str], *, recorded: bool) -> list[str]:
    """Gives lines that say how the figures are to be read.

    Args:
        rows: of all codes.
        codes: their names.
        recorded: whether some of the vectors were recorded.
    """
    notes = [
        "NMSE: squared error of the mean, as a share of its squared norm; one round, without error feedback",
        "bits: that a rank sends for each coordinate, both directions, scales and padding counted",
    ]
    used = {row["topology"] for row in rows}
    notes += [f"{name}: {meaning}" for name, meaning in TOPOLOGIES.items() if name in used]
    names = {code.partition("+")[0].partition(":")[0] for code in codes}
    if recorded:
        notes.append("recorded gradients are the same for every seed: intervals are over the codes' randomness alone")
    if "thc-public" in names:
        notes.append(
            "thc-public: the defects of the authors' public code, as read: all ranks round with the same noise, and "
            "one norm for the whole vector"
        )
    if "gradiveq" in names:
        notes.append(
            "gradiveq: bits are the average of the first 500 rounds, 10 to learn from; NMSE is of coded rounds"
        )
    if "lowrank" in names:
        notes.append(
            "lowrank: bits are the average of a round and the next, of the other side; error feedback, without which "
            "it is not meant to be used, is what brings the rest of the gradient in later rounds"
        )
    if names & {"gradiveq", "lowrank", "powersgd"}:
        notes.append(
            "gradiveq, lowrank, powersgd: where there are convolutions or matrices, after the means of earlier rounds"
        )
    if "lloyd-max" in names:
        notes.append(
            "lloyd-max: no code, but the limit of unbiased rounding of each rank's vector by itself, no scales"
        )
    return notes


def _rounded(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else float(f"{value:.6g}")
