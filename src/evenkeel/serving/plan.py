"""Plans serving: what fills and hedges would do for service times that were recorded, and what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evenkeel.delays.laws import Delay
from evenkeel.errors import ConfigurationError
from evenkeel.figures.records import RequestRecord
from evenkeel.serving.gateway.policy import Policy, preset
from evenkeel.serving.ideal import ideal_quantile
from evenkeel.serving.simulate import Fleet, arrivals, simulate

__all__ = ["ServingInputs", "ServingOption", "ServingPlan", "plan_serving"]

_GAIN = 1.15  # of the p99, by which an option must be better than a cheaper one to be recommended
_APPROXIMATE = ("collage", "collage+hedge")


@dataclass(frozen=True)
class ServingInputs:
    """Holds what the plan is made from.

    Attributes:
        replicas: workers with the classifier, without those that an option adds.
        load: share of their time that the requests ask for.
        backups: numbers of backups to try.
        costs: of one pass of a backup with one, up to four and up to nine items, relative to a replica's.
        agreement: share of the fills that have the classifier's label.
        max_approximate: largest share of answers that may be approximate.
        requests: how many are simulated for each option.
    """

    replicas: int = 9
    load: float = 0.5
    backups: tuple[int, ...] = (1, 2)
    costs: tuple[float, float, float] = (1.0, 0.6, 0.6)
    agreement: float = 0.9
    max_approximate: float = 1.0
    requests: int = 20_000

    def __post_init__(self) -> None:
        """Refuses what cannot be planned.

        Raises:
            ConfigurationError: a number is out of its range.
        """
        for name, low, high in (
            ("replicas", 1, 10_000),
            ("load", 0.01, 0.99),
            ("agreement", 0.0, 1.0),
            ("max_approximate", 0.0, 1.0),
            ("requests", 1000, 10_000_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigurationError(f"{name}: must be from {low:g} to {high:g}, found {getattr(self, name):g}")
        if not all(1 <= number <= 1000 for number in self.backups):
            raise ConfigurationError(f"backups: must be from 1 to 1000, found {', '.join(map(str, self.backups))}")
        if not all(0 < cost <= 100 for cost in self.costs):
            raise ConfigurationError(f"costs: must be above 0, found {', '.join(f'{cost:g}' for cost in self.costs)}")


@dataclass(frozen=True)
class ServingOption:
    """Describes one way to serve, and what the simulation says of it; times in milliseconds, shares from 0 to 1."""

    policy: str
    backups: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    approximate: float
    wrong: float  # of all answers, that differ from the classifier's
    hedged: float
    extra_nodes: float  # as a share of the replicas
    extra_work: float  # passes beyond one an item, in passes of a replica
    ideal_p99_ms: float  # what a policy that knows everything could reach with the same shares

    @property
    def name(self) -> str:
        """Gives what it is called in a table."""
        return f"{self.policy}, {self.backups} backup{'s' * (self.backups > 1)}" if self.backups else self.policy


@dataclass(frozen=True)
class ServingPlan:
    """Holds the options, cheapest first, and which of them is recommended."""

    options: list[ServingOption] = field(default_factory=list)

    @property
    def recommended(self) -> ServingOption:
        """Gives the cheapest option that none of the dearer ones clearly beats."""
        chosen = self.options[0]
        for option in self.options[1:]:
            if chosen.p99_ms / option.p99_ms >= _GAIN:
                chosen = option
        return chosen

    @property
    def sentence(self) -> str:
        """Says what to do."""
        none, best = self.options[0], self.recommended
        if best is none:
            return (
                f"Nothing is to be gained: the p99 is {none.p99_ms:,.1f} ms without redundancy, and no option makes it "
                f"{_GAIN - 1:.0%} better."
            )
        sure = "" if not best.approximate else f"; {best.approximate:.1%} of the answers are approximate"
        return (
            f"Recommended: {best.name}. The p99 falls from {none.p99_ms:,.1f} to {best.p99_ms:,.1f} ms "
            f"({none.p99_ms / best.p99_ms:.1f} times), for {best.extra_nodes:.0%} more nodes and "
            f"{best.extra_work:.0%} more passes{sure}."
        )


def plan_serving(
    delay: Delay, inputs: ServingInputs, progress: Callable[[str], object] = lambda name: None
) -> ServingPlan:
    """Simulates the options for service times that follow `delay`; `progress` is called with each one's name."""
    wanted = [("none", 0), ("hedge", 0), *((name, count) for count in inputs.backups for name in _APPROXIMATE)]
    options = []
    for name, backups in wanted:
        policy = preset(name, max_approximate=inputs.max_approximate)
        options.append(_option(policy, backups, delay, inputs))
        progress(name)
    return ServingPlan(options)


def _option(policy: Policy, backups: int, delay: Delay, inputs: ServingInputs) -> ServingOption:
    fleet = Fleet(inputs.replicas, backups, costs=inputs.costs, agreement=inputs.agreement)
    times_s = arrivals(inputs.load * inputs.replicas / delay.mean_s, inputs.requests, seed=0)
    records, stats = simulate(policy, delay, times_s, fleet)
    p50, p99, p999 = np.percentile([record.latency_ms for record in records], [50, 99, 99.9])
    approximate = _share(records, lambda record: record.source not in ("exact", "hedge"))
    hedged = stats.hedges / len(records)
    best_s = ideal_quantile(
        delay, 0.99, hedges=hedged, approximate=approximate, fill_cost=min(inputs.costs), items=inputs.requests
    )
    return ServingOption(
        policy.name,
        backups,
        float(p50),
        float(p99),
        float(p999),
        approximate,
        _share(records, lambda record: record.label != record.truth),
        hedged,
        backups / inputs.replicas,
        stats.extra_passes / len(records),
        best_s * 1e3,
    )


def _share(records: Sequence[RequestRecord], holds: Callable[[RequestRecord], Any]) -> float:
    return sum(map(bool, map(holds, records))) / len(records)
