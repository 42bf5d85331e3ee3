"""The text of /metrics: what Prometheus reads in it, and what its sums over gateways say."""

from collections import Counter

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.gateway.histogram import BOUNDS_S
from evenkeel.serving.gateway.stats import measure
from evenkeel.serving.metrics import Metrics
from gateway_helpers import Scene
from http_helpers import make_card


def served(scene, name="toy"):
    return ServedModel(name, "1", make_card(), scene.gateway)


def busy(items=3, **options):
    scene = Scene(**options)
    scene.slow(0)
    scene.send(items)
    scene.run()
    return scene


def families(*models, **options):
    return {one.name: one for one in text_string_to_metric_families(Metrics(models, **options)().decode())}


def samples(family):
    return {tuple(one.labels.values()): one.value for one in family.samples}


def test_prometheus_reads_every_line_of_it():
    model = served(busy())
    model.times.add(200, 0.0)
    text = Metrics([model], lambda: {("toy", "near"): {"sent": 3}}, Counter({200: 4}))().decode()
    found = list(text_string_to_metric_families(text))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert sum(len(one.samples) for one in found) == len(lines)
    assert all(one.documentation and one.type in ("counter", "gauge", "histogram") for one in found)
    assert text.count("# TYPE") == len({one.name for one in found})
    assert text.endswith("\n")


def test_each_metric_of_a_gateway_names_its_model():
    found = families(served(busy(), "a"), served(busy(items=2), "b"))
    assert samples(found["evenkeel_items"]) == {("a",): 3, ("b",): 2}
    own = {"evenkeel_build_info"}
    of_gateways = [one for one in found.values() if one.name.startswith("evenkeel_") and one.name not in own]
    assert all("model" in sample.labels for one in of_gateways for sample in one.samples)


def test_backups_are_there_with_their_kind_and_workers_with_their_address():
    scene = busy(replicas=2)
    scene.nodes[0].address = "tcp://10.0.0.7:7000"
    scene.fakes[-1].kill()
    found = families(served(scene))
    assert samples(found["evenkeel_backend_up"]) == {
        ("toy", "node0", "replica", "tcp://10.0.0.7:7000"): 1,
        ("toy", "node1", "replica", ""): 1,
        ("toy", "node2", "backup", ""): 0,
    }
    done = samples(found["evenkeel_backend_tasks"])
    assert sum(done.values()) >= 3


def test_a_histogram_is_cumulative_and_ends_with_the_count():
    (family,) = (families(served(busy(items=5)))[name] for name in ("evenkeel_item_duration_seconds",))
    by_source = {}
    for one in family.samples:
        by_source.setdefault(one.labels["source"], []).append(one)
    for group in by_source.values():
        buckets = [one for one in group if one.name.endswith("_bucket")]
        assert [float(one.labels["le"]) for one in buckets] == [*BOUNDS_S, float("inf")]
        values = [one.value for one in buckets]
        assert values == sorted(values)
        (count,) = (one.value for one in group if one.name.endswith("_count"))
        assert values[-1] == count > 0


def test_a_model_of_a_hostile_name_keeps_the_text_whole():
    name = 'a"} 1\nevil{x="\\'
    found = families(served(busy(), name))
    assert samples(found["evenkeel_items"]) == {(name,): 3}


def test_requests_are_there_by_status_and_responses_of_all_kinds():
    model = served(busy())
    for status in (200, 200, 503):
        model.times.add(status, 0.0)
    found = families(model, responses={404: 7})
    times = found["evenkeel_request_duration_seconds"].samples
    counts = {one.labels["code"]: one.value for one in times if one.name.endswith("_count")}
    assert counts == {"200": 2, "503": 1}
    assert samples(found["evenkeel_http_responses"]) == {("404",): 7}


@pytest.mark.parametrize("seed", range(3))
def test_what_three_gateways_expose_adds_up_to_the_p99_of_all_within_a_bucket(seed):
    """As Prometheus computes it: histogram_quantile(.99, sum by (le) (evenkeel_item_duration_seconds_bucket))."""
    generator = np.random.default_rng(seed)
    added, everything = Counter(), []
    for number, scale in enumerate((0.004, 0.02, 0.1)):
        scene = busy()
        scene.stats.latencies.clear()
        for source in ("exact", "collage"):
            seconds = scale * generator.lognormal(0, 0.8, 300 * (number + 1))
            everything.extend(seconds)
            for each in seconds:
                measure(scene.stats.latencies, source, float(each))
        for one in families(served(scene))["evenkeel_item_duration_seconds"].samples:
            if one.name.endswith("_bucket"):
                added[float(one.labels["le"])] += one.value
    bounds = sorted(added)
    rank = 0.99 * added[float("inf")]
    bucket = next(i for i, bound in enumerate(bounds) if added[bound] >= rank)
    true = np.quantile(everything, 0.99, method="inverted_cdf")
    assert bounds[bucket - 1] < true <= bounds[bucket]


def test_no_model_is_no_error():
    assert "evenkeel_build_info" in families()
