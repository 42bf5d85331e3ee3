"""Counts for the gateway, in plain numbers, so that counting is free on the hot path; `metrics.py` exposes them."""

from dataclasses import dataclass, field

from evenkeel.serving.gateway.histogram import Histogram

__all__ = ["FAILED", "Stats", "count", "measure"]

FAILED = "error"  # stands for the source of an answer where there is none


@dataclass(slots=True)
class Stats:
    """Holds counters since the start. Everything only grows."""

    items: int = 0  # taken in
    shed: int = 0  # refused: queues full or nobody ready
    failed: int = 0  # ended in an error
    abandoned: int = 0  # given up because their user went away
    deadlines: int = 0  # reached their deadline
    # From an item's acceptance to its answer, by how that is known, or to its error.
    latencies: dict[str, Histogram] = field(default_factory=dict)

    queue_times: Histogram = field(default_factory=Histogram)  # from sending a task to a replica until that began it
    service_times: Histogram = field(default_factory=Histogram)  # of replicas' tasks
    pass_times: Histogram = field(default_factory=Histogram)  # of backups' tasks

    copies: int = 0  # extra copies sent at once
    hedges: int = 0
    hedges_won: int = 0
    budget_exhausted: int = 0  # hedges that were due but not paid for
    cancels: int = 0  # tasks cancelled because another answer was first
    lost_attempts: int = 0  # replica tasks that ended in an error
    retries: int = 0  # attempts that replace lost or stalled ones

    passes: dict[str, int] = field(default_factory=dict)  # spare tasks by code
    grouped: dict[str, int] = field(default_factory=dict)  # items in them, by code
    backup_cost: float = 0.0  # of those passes, in replica passes
    lost_passes: int = 0
    fills: dict[str, int] = field(default_factory=dict)  # answers taken from a spare, by code
    fills_over_budget: int = 0  # approximate ones that had to wait for their share of the answers
    unsure_fills: int = 0  # not used: less sure than required
    fills_compared: int = 0  # whose exact reply came later
    fills_agreed: int = 0
    saved_times: Histogram = field(default_factory=Histogram)  # from a fill until its exact reply
    escalated: int = 0  # items of which the light model was not sure
    audits: int = 0  # items that both models answered, chosen at random
    audits_agreed: int = 0
    code_errors: int = 0  # groups that could not be encoded

    bad_replies: int = 0  # replies of a wrong shape, or not finite
    ejections: dict[str, int] = field(default_factory=dict)  # by reason
    readmissions: int = 0
    probes: int = 0

    @property
    def sources(self) -> dict[str, int]:
        """Counts answers by how they are known."""
        return {source: times.count for source, times in self.latencies.items() if source != FAILED}

    @property
    def extra_passes(self) -> float:
        """Gives the work beyond one pass an item, in replica passes."""
        return self.copies + self.hedges + self.retries + self.probes + self.backup_cost


def count(counts: dict[str, int], name: str, number: int = 1) -> None:
    """Adds to a counter of several."""
    counts[name] = counts.get(name, 0) + number


def measure(times: dict[str, Histogram], name: str, seconds: float) -> None:
    """Adds a duration to a histogram of several."""
    histogram = times.get(name)
    if histogram is None:
        histogram = times[name] = Histogram()
    histogram.add(seconds)
