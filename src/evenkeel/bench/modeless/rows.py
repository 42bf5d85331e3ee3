"""Turns what was measured into the pages of `evenkeel bench modeless`."""

from collections.abc import Sequence
from itertools import groupby

from evenkeel.figures.tables import Column, Page, Row

__all__ = ["notes_of", "pages_of"]

_ACCURACY = Column("accuracy", "right in time", "%", 100.0)
_ANSWERED = Column("answered", "answered in time", "%", 100.0)
_TIMES = (Column("p50_ms", "P50", "ms"), Column("p95_ms", "P95", "ms"), Column("p99_ms", "P99", "ms"))
_BYTES = Column("bytes", "sent", "bytes")
_OURS, _WAY = "certified threshold", "NACK + concealment"


def pages_of(rows: Sequence[Row]) -> list[Page]:
    """Gives the tables for people."""
    pages = []
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("loss", "round trip", "policy", "system")}
    for (burst, loss), group in groupby(of["loss"], lambda row: (row["burst"], row["loss"])):
        how = "each by itself" if burst == 1 else f"{burst:g} in a row on average"
        pages.append(Page(list(group), (Column("method", "transport"),), (_ACCURACY, _ANSWERED, *_TIMES, _BYTES),
                          f"{loss:.0%} of the packets lost, {how}"))  # fmt: skip
    if of["round trip"]:
        pages.append(Page(of["round trip"], (Column("ratio", "round trip / deadline"), Column("method", "transport")),
                          (_ACCURACY, *_TIMES, _BYTES), "20 % lost: the round trip against the deadline"))  # fmt: skip
    for level, group in groupby(of["policy"], lambda row: row["level"]):
        columns = (
            Column("missed", "broken", "%", 100.0), Column("promised", "promised", "%", 100.0),
            Column("accuracy", "accuracy", "%", 100.0), Column("offload", "offload", "%", 100.0),
        )  # fmt: skip
        pages.append(Page(list(group), (Column("policy", "policy"),), columns, f"accuracy {level:g} promised"))
    for (rate, loss), group in groupby(of["system"], lambda row: (row["rate"], row["loss"])):
        lines = [{**row, "deadline": "none" if row["deadline_ms"] is None else f"{row['deadline_ms']:.0f}",
                  "reached": "yes" if row["reached"] else "NO"} for row in group]  # fmt: skip
        shown = (
            Column("reached", "as right as promised"), _ACCURACY, Column("deadline", "deadline", "ms"), *_TIMES,
            Column("edge_p99_ms", "P99 edge", "ms"), Column("data_centre_p99_ms", "P99 data centre", "ms"),
            Column("offload", "offload", "%", 100.0), _BYTES, Column("resident_bytes", "resident", "MB", 1e-6),
            Column("swaps", "swaps", "%", 100.0),
        )  # fmt: skip
        title = f"{rate}, {loss:.0%} lost in bursts: whole systems, each with its shortest deadline"
        pages.append(Page(lines, (Column("policy", "policy"), Column("transport", "transport")), shown, title))
    return pages


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Says what the figures come to: the headline, and where sending again is enough."""
    notes = []
    systems = [row for row in rows if row["kind"] == "system"]
    for (rate, loss), each in groupby(systems, lambda row: (row["rate"], row["loss"])):
        group = list(each)
        ours = next(row for row in group if (row["policy"], row["transport"]) == (_OURS, _WAY))
        others = [row for row in group if row["policy"] != _OURS and row["reached"]]
        if not ours["reached"]:
            notes.append(f"{rate}, {loss:.0%} lost: the certified cascade is not as right as promised in any deadline")
            continue
        best = min(others, key=lambda row: row["p99_ms"], default=None)
        nack = next(row for row in group if (row["policy"], row["transport"]) == (_OURS, "NACK"))
        said = (
            "no other system is as right"
            if best is None
            else f"{best['p99_ms'] / ours['p99_ms']:.1f} x lower than of {best['policy']} ({best['transport']})"
        )
        same = f"{nack['p99_ms'] / ours['p99_ms']:.2f} x lower than over NACK alone" if nack["reached"] else (
            "over NACK alone it is not as right")  # fmt: skip
        notes.append(f"{rate}, {loss:.0%} lost: P99 of the certified cascade {ours['p99_ms']:.0f} ms, {said}; {same}")
    trips = [row for row in rows if row["kind"] == "round trip"]
    for ratio, each in groupby(trips, lambda row: row["ratio"]):
        right = {row["method"]: 100 * row["accuracy"] for row in each}
        gain = right[_WAY] - right["NACK"]
        alone = right["NACK"] - right["concealment"]
        wins = f"NACK {alone:+.1f} points against concealment alone"
        notes.append(f"round trip {ratio:g} of the deadline: both {gain:+.1f} points against NACK alone; {wins}")
    for row in rows:
        if row["kind"] == "model":
            notes.append(
                f"{row['model']}: {row['accuracy']:.2%} right, {row['pass_ms']:.2f} ms an image, "
                f"{row['load_ms']:.0f} ms to load, {row['bytes'] / 1e6:.2f} MB"
            )
    return notes
