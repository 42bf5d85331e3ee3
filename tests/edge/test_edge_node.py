"""The configuration of an edge node: a cascade whose replica is a data centre."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evenkeel.edge.node import read_edge_config
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import card_path
from evenkeel.promises.certificate import Certificate
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Threshold
from evenkeel.serving.nodes import known_digests

LEAST = {"light": "light.json", "data_centre": "http://10.0.0.5:8000"}


def test_an_edge_node_is_a_cascade_with_a_data_centre(tmp_path: Path) -> None:
    config = read_edge_config({**LEAST, "deadline": "300ms", "certificate": "c.json", "port": 9000}, tmp_path)
    assert (config.policy.name, config.policy.degrade, config.policy.deadline_s) == ("cascade", True, 0.3)
    assert config.certificate == tmp_path / "c.json"
    assert (config.replicas.urls, config.replicas.count, config.backups.count) == (("http://10.0.0.5:8000",), 0, 1)
    assert [(code.settings.name, code.model) for code in config.codes] == [("cascade", tmp_path / "light.json")]
    assert config.port == 9000


def test_an_edge_node_reaches_its_data_centre_with_keys_and_certificates_and_guards_itself(tmp_path: Path) -> None:
    raw = {"remote_tls": {"ca": "ca.pem"}, "remote_credentials": {"bearer_file": "key"}, "keys": {"file": "keys"}}
    config = read_edge_config({**LEAST, "data_centre": "https://10.0.0.5", **raw}, tmp_path)
    assert config.remote_tls is not None
    assert config.remote_tls.ca == tmp_path / "ca.pem"
    assert config.remote_credentials.bearer_file == tmp_path / "key"
    assert config.keys.file == tmp_path / "keys"


def test_what_an_edge_node_may_change() -> None:
    raw = {**LEAST, "data_centre": ["tcp://10.0.0.5:7000", "http://10.0.0.6"], "on_miss": "reject", "light_workers": 2}
    config = read_edge_config({**raw, "policy": {"min_confidence": 0.7}})
    assert (config.replicas.addresses, config.replicas.urls) == (("tcp://10.0.0.5:7000",), ("http://10.0.0.6",))
    assert read_edge_config({**LEAST, "data_centre": "udp://10.0.0.5:7000"}).replicas.links == ("udp://10.0.0.5:7000",)
    assert (config.policy.degrade, config.policy.min_confidence, config.backups.count) == (False, 0.7, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"light": None}, "light: expected a text"),
        ({"light": "resnet"}, r"light: expected a model card"),
        ({"data_centre": "10.0.0.5"}, r"data_centre\[0\]: expected unix"),
        ({"data_centre": 3}, "data_centre: expected an address"),
        ({"light_workers": -1}, "light_workers.count: expected a whole number"),
        ({"replicas": 2}, "replicas: an edge node's follow from data_centre"),
        ({"codes": []}, "codes: an edge node's follow from light"),
        ({"policy": "hedge"}, "policy: an edge node's is cascade, found 'hedge'"),
        ({"on_miss": "panic"}, "on_miss: must be degrade or reject"),
        ({"on_miss": "reject", "policy": {"on_miss": "reject"}}, "is given twice"),
        ({"promises": {"misses": 0.1}}, "need policy.certificate"),
        ({"promises": {"misses": 2}, "certificate": "c"}, "promises.misses: expected a number from 0 to 1"),
        ({"ligth": "x"}, "ligth: unknown field; known are light, data_centre, "),
    ],
)
def test_what_is_wrong_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_edge_config({**LEAST, **changes})


@pytest.mark.parametrize("missing", ["light", "data_centre"])
def test_what_is_missing_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{missing}: is missing"):
        read_edge_config({name: value for name, value in LEAST.items() if name != missing})
    with pytest.raises(ConfigurationError, match="expected fields"):
        read_edge_config([])


def test_the_accurate_models_file_need_not_be_here_its_certificate_says_which_it_is(tmp_path: Path) -> None:
    accurate = replace(load_card(card_path("cifar10-base")), name="accurate", file="elsewhere.onnx")
    save_card(accurate, tmp_path / "accurate.json")
    light = card_path("cifar10-base")
    promise = Threshold(Promise("min_agreement", 0.9), 0, 0.7, 5000, 0.3, 0.31, 0.09, 0.1)
    names = {"cifar10-base": "onnx:aa", "accurate": "onnx:bb", "another": "onnx:cc"}
    now_s = time.time()
    Certificate(
        "cascade", "cifar10-base", "accurate", names, "margin", 1.0, (promise,), now_s, now_s + 1000
    ).save(tmp_path / "c.json")  # fmt: skip
    raw = {"model": "accurate.json", "light": light.stem, "data_centre": "http://dc", "certificate": "c.json"}
    known = known_digests(read_edge_config(raw, tmp_path))
    assert set(known) == {"accurate", "cifar10-base"}
    assert known["accurate"] == "onnx:bb"
    assert known["cifar10-base"] != "onnx:aa"  # what is here is looked at
