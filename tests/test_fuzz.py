"""The fuzzer runs, and finds what is wrong."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from evenkeel.http2.grpc import GrpcMessageReader
from evenkeel.serving.front.items import ItemReader
from evenkeel.serving.grpc.app import GrpcApp
from evenkeel.serving.http.reader import RequestReader

PATH = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.close_services()


@pytest.mark.parametrize("target", ["requests", "grpc", "frames", "replies"])
def test_each_target_reads_what_it_makes(fuzz, target):
    inputs = {fuzz.TARGETS[target](random.Random(f"{target}-{seed}")) for seed in range(40)}
    assert len(inputs) > 20


def look(fuzz) -> None:
    for seed in range(40):
        fuzz.fuzz_requests(random.Random(seed))


def test_a_reader_that_loses_a_byte_is_found(fuzz, monkeypatch):
    plain = RequestReader.on_body
    monkeypatch.setattr(RequestReader, "on_body", lambda reader, part: plain(reader, part[:-1] or part))
    with pytest.raises(fuzz.Wrong, match=r"h11 reads|cut otherwise"):
        look(fuzz)


def test_a_reader_that_sees_another_request_is_found(fuzz, monkeypatch):
    plain = fuzz.read_by_h11
    monkeypatch.setattr(fuzz, "read_by_h11", lambda data: [(m, t + b"?", b) for m, t, b in plain(data)])
    with pytest.raises(fuzz.Wrong, match="h11 reads"):
        look(fuzz)


def look_at_grpc(fuzz) -> None:
    fuzz.close_services()  # what an earlier test broke stays broken
    for seed in range(60):
        fuzz.fuzz_grpc(random.Random(seed))


def test_a_grpc_reader_that_loses_a_message_is_found(fuzz, monkeypatch):
    plain = GrpcMessageReader.feed

    def feed(reader, data):
        found = plain(reader, data)
        return found[:1] if len(data) > 200 else found

    monkeypatch.setattr(GrpcMessageReader, "feed", feed)
    with pytest.raises(fuzz.Wrong, match="depend on its frames"):
        look_at_grpc(fuzz)


def test_a_call_that_is_kept_after_its_client_left_is_found(fuzz, monkeypatch):
    monkeypatch.setattr(GrpcApp, "gone", lambda app, ask: None)
    with pytest.raises(fuzz.Wrong, match="afterwards there are still"):
        look_at_grpc(fuzz)


def test_an_unexpected_error_is_found(fuzz, monkeypatch):
    monkeypatch.setattr(ItemReader, "read", lambda reader, request: 1 / 0)
    with pytest.raises(fuzz.Wrong, match="b'13'"):
        look_at_grpc(fuzz)


def test_a_request_that_is_taken_for_an_earlier_one_is_found(fuzz, monkeypatch):
    monkeypatch.setattr("evenkeel.oip.grpc.aligned", lambda body, dtype, count, start: np.zeros(count, dtype))
    with pytest.raises(fuzz.Wrong, match=r"read again|was answered"):
        look_at_grpc(fuzz)
