"""The fuzzer runs, and finds what is wrong."""

import importlib.util
import random
from pathlib import Path

import pytest

from evenkeel.serving.http.reader import RequestReader

PATH = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["requests", "frames", "replies"])
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
