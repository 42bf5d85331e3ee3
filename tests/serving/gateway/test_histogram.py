"""Histograms: each duration in its bucket, and sums of several that tell the quantiles of all."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.serving.gateway.histogram import BOUNDS_S, Histogram, total
from evenkeel.serving.gateway.policy import preset
from gateway_helpers import Scene, Trigger, answer


def histogram_of(seconds):
    histogram = Histogram()
    for each in seconds:
        histogram.add(float(each))
    return histogram


def test_bounds_are_steps_of_at_most_two_over_what_inference_takes():
    ratios = np.array(BOUNDS_S[1:]) / np.array(BOUNDS_S[:-1])
    assert ratios.min() > 1.3
    assert ratios.max() <= 2
    assert BOUNDS_S[0] <= 0.0005
    assert BOUNDS_S[-1] == 10
    # Prometheus finds a series again by the text of its bound.
    assert len({f"{bound:g}" for bound in BOUNDS_S}) == len(BOUNDS_S)


@pytest.mark.parametrize(("seconds", "bucket"), [(0, 0), (0.000125, 0), (0.000126, 1), (10, -2), (10.1, -1), (1e9, -1)])
def test_a_bound_belongs_to_the_bucket_below_it_as_prometheus_has_it(seconds, bucket):
    counts = histogram_of([seconds]).counts
    assert counts[bucket] == sum(counts) == 1


def test_an_empty_histogram_has_no_quantile():
    assert Histogram().quantile(0.99) is None
    assert histogram_of([20.0]).quantile(0.5) == (10.0, float("inf"))


@given(st.lists(st.floats(1e-5, 30), min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_that_is_given(seconds, q):
    low, high = histogram_of(seconds).quantile(q)
    assert low < np.quantile(seconds, q, method="inverted_cdf") <= high


@given(st.lists(st.lists(st.floats(1e-5, 30), max_size=100), min_size=3, max_size=3).filter(any))
def test_a_sum_of_gateways_is_the_histogram_of_all_their_durations(gateways):
    added = total(map(histogram_of, gateways))
    everything = [seconds for one in gateways for seconds in one]
    assert added.counts == histogram_of(everything).counts
    assert added.sum_s == pytest.approx(sum(everything))


@pytest.mark.parametrize("seed", range(5))
def test_three_unequal_gateways_added_give_the_p99_of_all_within_a_bucket(seed):
    generator = np.random.default_rng(seed)
    gateways = [
        generator.exponential(0.004, 20_000),
        np.where(generator.random(5_000) < 0.05, 0.4, 0.01) * generator.lognormal(0, 0.3, 5_000),
        generator.pareto(1.5, 300) * 0.02,  # few requests, and a p99 far from that of all
    ]
    low, high = total(map(histogram_of, gateways)).quantile(0.99)
    true = np.quantile(np.concatenate(gateways), 0.99, method="inverted_cdf")
    assert low < true <= high


def test_a_gateway_measures_each_answer_by_its_source_and_what_its_tasks_took():
    scene = Scene(replicas=1)
    scene.send(3)  # one after the other: each takes a second
    scene.run()
    stats = scene.stats
    assert sum(times.count for times in stats.latencies.values()) == 3
    assert stats.sources == {source: scene.sources.count(source) for source in set(scene.sources)}
    assert stats.service_times.count == scene.gateway.replicas.all[0].done
    assert stats.service_times.sum_s == pytest.approx(stats.service_times.count)  # a second each
    assert stats.pass_times.count == sum(stats.passes.values()) == scene.gateway.backups[0].done


def test_a_task_behind_others_waits_as_long_as_they_take():
    scene = Scene("none", replicas=1, backups=0)
    scene.send(3)
    scene.run()
    assert scene.stats.queue_times.sum_s == pytest.approx(0 + 1 + 2)
    assert scene.stats.service_times.sum_s == pytest.approx(3)


def test_an_error_is_measured_too():
    scene = Scene("none", replicas=1, backups=0, deadline_s=0.5)
    scene.send()
    scene.run()
    assert scene.stats.latencies["error"].sum_s == pytest.approx(0.5)
    assert scene.stats.sources == {}


def test_what_a_fill_saved_is_the_time_until_its_exact_reply():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=1.5)))
    scene.backup._answer = lambda model, inputs: answer(model, inputs)
    scene.slow(0, 1, 2)
    scene.send(3)
    scene.run()
    saved = scene.stats.saved_times
    assert saved.count == scene.stats.fills_compared == 3
    assert saved.sum_s == pytest.approx(sum(10 - latency for latency in scene.latencies))
