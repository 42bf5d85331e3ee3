"""A certificate comes back as it was written, and is refused when it does not hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evenkeel.errors import ConfigurationError
from evenkeel.promises.certificate import Certificate, bucket_of, check_promises, load_certificate
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Threshold

MADE_S = 1_800_000_000.0
THRESHOLDS = (
    Threshold(Promise("min_accuracy", 0.8), 0, 0.7, 5000, 0.3, 0.31, 0.19, 0.1),
    Threshold(Promise("min_accuracy", 0.82), 0, 0.9, 5000, 0.5, 0.51, 0.175, 0.05),
    Threshold(Promise("min_accuracy", 0.8), 2, 0.85, 5000, 0.45, 0.46, 0.19, 0.1),
    Threshold(Promise("min_accuracy", 0.9), 0, None, 5000),
)
CERTIFICATE = Certificate(
    "cascade", "light", "full", {"light": "onnx:aa", "full": "onnx:bb"}, "margin", 1.5, THRESHOLDS, MADE_S, MADE_S + 100
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    CERTIFICATE.save(tmp_path / "certificate.json")
    return tmp_path / "certificate.json"


def test_it_comes_back_as_it_was_written(path: Path) -> None:
    found = load_certificate(path, now_s=MADE_S + 1)
    assert found == CERTIFICATE
    assert found.id == CERTIFICATE.id


def test_it_gives_the_cheapest_threshold_that_keeps_a_promise() -> None:
    def threshold(kind: str, level: float, bucket: int = 0) -> float | None:
        found = CERTIFICATE.keeping(Promise(kind, level), bucket)  # type: ignore[arg-type]
        return None if found is None else found.threshold

    assert threshold("min_accuracy", 0.8) == 0.7
    assert threshold("min_accuracy", 0.75) == 0.7
    assert threshold("min_accuracy", 0.81) == 0.9
    assert threshold("min_accuracy", 0.8, 2) == 0.85
    assert threshold("min_accuracy", 0.81, 2) is None
    assert threshold("min_accuracy", 0.9) is None
    assert threshold("min_agreement", 0.5) is None


@pytest.mark.parametrize(("old", "new"), [("0.7", "0.6"), ("onnx:bb", "onnx:cc"), ('"margin"', '"max_probability"')])
def test_a_changed_one_is_refused(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match="was changed after it was made"):
        load_certificate(path, now_s=MADE_S + 1)


@pytest.mark.parametrize(
    ("now_s", "words"), [(MADE_S + 100, "expired 0.0 days ago"), (MADE_S - 1000, "1000 s after .* set the clock")]
)
def test_an_expired_one_and_one_from_the_future_are_refused(path: Path, now_s: float, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load_certificate(path, now_s=now_s)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"evenkeel_certificate": 2}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_certificate_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="certificate"):
        load_certificate(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_certificate(path.parent / "none.json")


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CERTIFICATE, thresholds=(replace(THRESHOLDS[0], threshold=float("inf")),)),
        replace(CERTIFICATE, thresholds=(replace(THRESHOLDS[0], bucket=17),)),
        replace(CERTIFICATE, temperature=-1.0),
        replace(CERTIFICATE, light="other"),
        replace(CERTIFICATE, use="guess"),  # type: ignore[arg-type]
    ],
)
def test_a_sealed_one_with_values_out_of_range_is_refused(path: Path, wrong: Certificate) -> None:
    wrong.save(path)
    with pytest.raises(ConfigurationError, match="certificate"):
        load_certificate(path, now_s=MADE_S)


def test_it_is_for_its_own_models_only() -> None:
    CERTIFICATE.check_models({"light": "onnx:aa", "full": "onnx:bb", "other": "onnx:cc"})
    with pytest.raises(ConfigurationError, match="made for another 'light'"):
        CERTIFICATE.check_models({"light": "onnx:ff", "full": "onnx:bb"})
    with pytest.raises(ConfigurationError, match="accurate model 'full', which is not served here"):
        CERTIFICATE.check_models({"light": "onnx:aa"})


def test_its_thresholds_are_plain_yaml() -> None:
    plain = yaml.safe_load(CERTIFICATE.plain_yaml())
    assert plain["certificate"] == CERTIFICATE.id
    assert [row["confidence_threshold"] for row in plain["thresholds"]] == [0.7, 0.9, 0.85]
    assert json.loads(json.dumps(plain)) == plain


def test_buckets_of_packet_loss() -> None:
    assert [bucket_of(loss) for loss in (0.0, 0.01, 0.02, 0.03, 0.1, 0.15, 0.6, 1.0)] == [0, 1, 1, 2, 3, 4, 5, 5]


def test_promises_are_given_once_each() -> None:
    with pytest.raises(ConfigurationError, match="no promise"):
        check_promises([])
    with pytest.raises(ConfigurationError, match="given twice"):
        check_promises([Promise("min_accuracy", 0.8), Promise("min_accuracy", 0.8, 0.9)])
