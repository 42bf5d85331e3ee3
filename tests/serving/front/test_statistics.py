"""The protocol's statistics and configuration, as a client of Triton's reads them."""

import time

import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.front.statistics import model_configuration, model_statistics
from gateway_helpers import Scene
from http_helpers import FakeGateway, images, make_card, serving

PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


def served(scene=None):
    return ServedModel("toy", "1", make_card(), FakeGateway() if scene is None else scene.gateway)


def test_a_model_that_was_never_asked_has_zeros():
    found = model_statistics(served())
    assert found["last_inference"] == found["inference_count"] == found["execution_count"] == 0
    assert found["inference_stats"] == {part: {"count": 0, "ns": 0} for part in PARTS}


def test_items_and_passes_are_counted_with_what_they_took():
    scene = Scene("none", replicas=1, backups=0)
    scene.send(3)
    scene.run()
    found = model_statistics(served(scene))
    assert (found["inference_count"], found["execution_count"]) == (3, 3)
    # One after the other, a second each.
    assert found["inference_stats"]["queue"] == {"count": 3, "ns": pytest.approx(3e9)}
    assert found["inference_stats"]["compute_infer"] == {"count": 3, "ns": pytest.approx(3e9)}


def test_requests_are_successes_or_failures():
    model = served()
    for status in (200, 200, 400, 503, 499):
        model.times.add(status, time.monotonic() - 1)
    found = model_statistics(model)["inference_stats"]
    assert found["success"] == {"count": 2, "ns": pytest.approx(2e9, rel=0.1)}
    assert found["fail"] == {"count": 3, "ns": pytest.approx(3e9, rel=0.1)}


def test_the_configuration_names_what_goes_in_and_out_without_the_batch_axis():
    found = model_configuration(served(Scene()))
    assert found["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [4, 5, 3]}]
    outputs = {each["name"]: each for each in found["output"]}
    assert outputs["scores"] == {"name": "scores", "data_type": "TYPE_FP32", "dims": [3]}
    assert outputs["label"] == {"name": "label", "data_type": "TYPE_STRING", "dims": [1], "reshape": {"shape": []}}
    assert found["instance_group"][0]["count"] == 3
    assert found["max_batch_size"] > 1


def test_tritonclient_reads_both():
    with serving() as server, tritonclient.http.InferenceServerClient(server.address) as client:
        tensor = tritonclient.http.InferInput("images", [2, 4, 5, 3], "UINT8")
        tensor.set_data_from_numpy(images(2))
        began_ms = time.time() * 1e3
        client.infer("toy", [tensor])
        for found in (
            client.get_inference_statistics("toy"),
            client.get_inference_statistics("toy", "1"),
            client.get_inference_statistics(),
        ):
            (stats,) = found["model_stats"]
            assert (stats["name"], stats["version"]) == ("toy", "1")
            assert stats["inference_stats"]["success"]["count"] == 1
            assert 0 < stats["inference_stats"]["success"]["ns"] < 10e9
            assert began_ms - 1 <= stats["last_inference"] <= time.time() * 1e3 + 1
        assert client.get_model_config("toy")["name"] == "toy"
        assert client.get_model_config("toy", "1")["platform"] == client.get_model_metadata("toy")["platform"]
        extensions = client.get_server_metadata()["extensions"]
        assert {"statistics", "model_configuration"} <= set(extensions)
        with pytest.raises(InferenceServerException, match="unknown model"):
            client.get_inference_statistics("other")
        with pytest.raises(InferenceServerException, match="no version"):
            client.get_model_config("toy", "7")
