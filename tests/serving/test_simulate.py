"""What the policies give under the laws of lateness: whole runs of the gateway on a virtual clock.

Equal seeds give equal figures on every machine, so the bounds are those that the project promises, without a margin
for noise. Ideal simulations of the same policy (systems/collage.md, 1f) give the ratios in brackets.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest

from evenkeel.delays.laws import Constant, Delay, FleetSlowdown, MarkovBursts, Pareto, PersistentSlow, TwoMode
from evenkeel.serving.gateway.policy import preset
from evenkeel.serving.simulate import Fleet, arrivals, simulate

TWO_MODE = TwoMode(seed=1)
BIG = Fleet(replicas=36, backups=4)
CHEAP = Fleet(costs=(1.0, 0.42, 0.55))


class Figures:
    def __init__(self, records, stats):
        latencies_ms = np.array([record.latency_ms for record in records])
        self.p99, self.p999 = np.percentile(latencies_ms, [99, 99.9])
        self.mean, self.sd = latencies_ms.mean(), latencies_ms.std()
        self.stats = stats
        self.items = len(records)
        self.hedges = stats.hedges / self.items
        self.fills = sum(stats.fills.values()) / self.items
        self.approximate = stats.sources.get("collage", 0) / self.items
        assert all(record.status == 200 for record in records)


@cache
def figures(policy, delay, load, requests=15_000, fleet=Fleet(), batch=1, seed=0):
    times_s = arrivals(load * fleet.replicas / delay.mean_s, requests, seed, batch=batch)
    return Figures(*simulate(preset(policy), delay, times_s, fleet, seed=seed))


@pytest.mark.parametrize(("load", "ratio"), [(0.3, 3.0), (0.5, 3.0), (0.7, 2.8)])  # 3.3, 3.3, 3.1
def test_collage_and_hedge_hide_stragglers_at_every_load(load, ratio):
    none, ours = figures("none", TWO_MODE, load), figures("collage+hedge", TWO_MODE, load)
    assert none.p99 / ours.p99 >= ratio
    assert none.p999 / ours.p999 >= 2.0  # 2.3, 2.4, 2.1
    assert none.sd / ours.sd >= 2.3  # 2.7, 2.6, 2.6
    assert ours.mean < none.mean
    assert ours.hedges <= 0.05
    assert 0.04 <= ours.fills <= 0.18  # .06, .08, .17
    assert ours.approximate <= 0.17
    assert not ours.stats.ejections


def test_collage_and_hedge_beat_hedging_alone():
    hedge, ours = figures("hedge", TWO_MODE, 0.5), figures("collage+hedge", TWO_MODE, 0.5)
    assert hedge.p99 / ours.p99 >= 1.5  # 1.7
    assert hedge.hedges <= 0.1001


@pytest.mark.parametrize("load", [0.3, 0.5])
def test_at_low_load_most_fills_come_from_the_small_grids(load):
    fills = figures("collage+hedge", TWO_MODE, load).stats.fills
    assert fills["replicate"] + fills["collage2x2"] > 0.6 * sum(fills.values())


def test_fills_agree_with_late_exact_replies_as_often_as_the_backup_is_right():
    stats = figures("collage+hedge", TWO_MODE, 0.7).stats
    assert stats.fills_compared > 500
    assert stats.fills_agreed / stats.fills_compared == pytest.approx(Fleet().agreement, abs=0.03)


def test_a_large_fleet_with_several_backups_repairs_even_the_999th_request():
    none, ours = figures("none", TWO_MODE, 0.5, fleet=BIG), figures("collage+hedge", TWO_MODE, 0.5, fleet=BIG)
    assert none.p999 / ours.p999 >= 3.0  # 3.4
    assert ours.hedges <= 0.05


def test_a_replica_that_is_slow_for_good_is_ejected_and_coding_does_no_harm():
    law = PersistentSlow(slow_workers=(4,))
    none, ours = figures("none", law, 0.5, 6_000), figures("collage+hedge", law, 0.5, 6_000)
    assert none.stats.ejections == ours.stats.ejections == {"slow": 1}
    assert ours.p99 <= 1.05 * none.p99
    assert ours.hedges <= 0.05


def test_a_backup_that_is_slow_for_good_does_no_harm():
    law = PersistentSlow(slow_workers=(9,))
    none, ours = figures("none", law, 0.5, 6_000), figures("collage+hedge", law, 0.5, 6_000)
    assert ours.p99 <= 1.05 * none.p99
    assert ours.hedges <= 0.05


def test_when_the_whole_fleet_is_slow_there_is_no_storm_and_no_harm():
    law = FleetSlowdown(TWO_MODE, factor=3.0, from_s=20.0, to_s=80.0)
    none, ours = figures("none", law, 0.3, 4_000), figures("collage+hedge", law, 0.3, 4_000)
    assert ours.p99 <= 1.05 * none.p99
    assert ours.hedges <= 0.05
    assert ours.stats.retries <= 0.01 * ours.items


def test_even_a_fleet_far_too_slow_gets_a_bounded_number_of_copies():
    law = FleetSlowdown(TWO_MODE, factor=20.0, from_s=20.0, to_s=40.0)
    none, ours = figures("none", law, 0.3, 4_000), figures("collage+hedge", law, 0.3, 4_000)
    assert ours.p99 <= 1.05 * none.p99
    assert ours.hedges <= 0.05
    assert ours.stats.retries <= 0.25 * ours.items


@pytest.mark.parametrize("spell_s", [1.0, 10.0])
def test_slow_spells_are_hidden_whether_short_or_long(spell_s):
    law = MarkovBursts(spell_s=spell_s, seed=2)
    none, ours = figures("none", law, 0.5, 6_000), figures("collage+hedge", law, 0.5, 6_000)
    assert none.p999 / ours.p999 >= 2.0
    assert ours.p99 < none.p99


def test_no_healthy_replica_is_called_slow_under_a_heavy_tail_and_the_tail_is_cut():
    none, ours = figures("none", Pareto(seed=3), 0.3, 6_000), figures("collage+hedge", Pareto(seed=3), 0.3, 6_000)
    assert "slow" not in ours.stats.ejections
    # Silent ones are back when they speak; one may still be out at the end.
    assert sum(ours.stats.ejections.values()) - ours.stats.readmissions <= 1
    assert none.p99 / ours.p99 >= 2.0


def test_batches_of_nine_as_in_the_paper():
    none = figures("none", TWO_MODE, 0.5, 6_000, batch=9)
    ours = figures("collage+hedge", TWO_MODE, 0.5, 6_000, batch=9)
    assert none.p99 / ours.p99 >= 1.47  # what the paper claims
    assert ours.hedges <= 0.1001


def test_equal_seeds_give_equal_runs_and_policies_see_the_same_delays():
    times_s = arrivals(30.0, 300, seed=5)
    first, _ = simulate(preset("collage+hedge"), TWO_MODE, times_s, seed=5)
    second, _ = simulate(preset("collage+hedge"), TWO_MODE, times_s, seed=5)
    assert first == second
    none, _ = simulate(preset("none"), TWO_MODE, times_s[:1], seed=5)
    hedge, _ = simulate(preset("hedge"), TWO_MODE, times_s[:1], seed=5)
    assert none == hedge


def test_every_request_has_a_record_even_one_that_is_refused():
    fleet = Fleet(replicas=1, backups=0, max_outstanding=2)
    records, stats = simulate(preset("none"), Constant(1.0), [0.0, 0.1, 0.2, 5.0], fleet)
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert [record.status for record in records] == [200, 200, 503, 200]
    assert "queues are full" in records[2].error
    assert stats.shed == 1


def test_nothing_sent_is_nothing_recorded():
    records, stats = simulate(preset("none"), TWO_MODE, [])
    assert records == []
    assert stats.items == 0


def test_arrivals_are_poisson_or_come_in_batches():
    times = arrivals(50.0, 20_000, seed=1)
    assert len(times) / times[-1] == pytest.approx(50.0, rel=0.03)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    batches = arrivals(50.0, 20_000, seed=1, batch=9)
    assert len(batches) == 20_000
    assert len(batches) / batches[-1] == pytest.approx(50.0, rel=0.06)
    assert (np.diff(batches[:18]) > 0).sum() == 1


@dataclass(frozen=True)
class TwoNormals(Delay):
    """A body of 5 +- 2 ms, and stragglers of 50 +- 20 ms."""

    slow_share: float

    def draw(self, key, worker, now_s):
        slow, place = ((Pareto(seed=seed).draw(key, 0, 0.0) / 0.1) ** -1.5 for seed in (8, 9))
        mean, sd = (0.05, 0.02) if slow < self.slow_share else (0.005, 0.002)
        return max(mean + sd * NormalDist().inv_cdf(place), mean / 20)

    @property
    def mean_s(self):
        return 0.005 + self.slow_share * 0.045


TENTH = TwoMode(slow_share=0.1)


@pytest.mark.parametrize(
    ("law", "p99_ms", "p999_ms"),
    [
        (TWO_MODE, 220, 350),
        (TwoMode(slow_share=0.06), 310, 470),
        (TENTH, 400, 610),
        (TwoMode(slow_share=0.2), 620, 760),
        (TwoNormals(0.05), 14, 25),
        (TwoNormals(0.1), 20, 44),
        (MarkovBursts(duty=0.1), 270, 420),
        (Pareto(), 670, 1150),
    ],
)
def test_the_slow_mode_is_found_whatever_its_share(law, p99_ms, p999_ms):
    """With a trigger at p95 they were 219, 665, 711, 744, 27, 54, 454 and 832 ms."""
    # Of twenty thousand items twenty lie above p99.9: with a tenth of stragglers it was 527 to 656 in five runs.
    runs = [figures("collage+hedge", law, 0.5, 20_000, CHEAP, seed=seed) for seed in range(4 if law == TENTH else 1)]
    assert np.mean([run.p99 for run in runs]) <= p99_ms
    assert np.mean([run.p999 for run in runs]) <= p999_ms
    assert np.mean([run.hedges for run in runs]) <= 0.1001
    assert np.mean([run.approximate for run in runs]) <= (0.11 if law != TwoMode(slow_share=0.2) else 0.16)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05])
def test_no_more_answers_are_approximate_than_the_budget_allows(share):
    law = TwoMode(slow_share=0.1)
    policy = preset("collage+hedge", max_approximate=share)
    records, stats = simulate(policy, law, arrivals(0.5 * 9 / law.mean_s, 4_000, seed=0))
    approximate = sum(record.source not in ("exact", "hedge") for record in records)
    assert approximate <= (1 + share * len(records) if share else 0)
    assert all(record.status == 200 for record in records)
    assert stats.fills  # exact ones at least
    assert Figures(records, stats).p99 <= 0.95 * figures("none", law, 0.5, 4_000).p99


def test_while_no_approximate_answer_may_be_given_backups_make_exact_passes():
    law = TwoMode(slow_share=0.1)
    times_s = arrivals(0.5 * 9 / law.mean_s, 4_000, seed=0)
    runs = {}
    for share in (0.02, 1.0):
        records, stats = simulate(preset("collage+hedge", max_approximate=share), law, times_s)
        runs[share] = (stats, sum(record.source == "collage" for record in records))
    (few, given), (free, _) = runs.values()
    assert given >= 0.019 * 4_000, "what may be given is"
    assert few.passes["replicate"] > 1.3 * free.passes["replicate"]
    assert few.fills["replicate"] > free.fills["replicate"]
