"""Certifying from what two models say: splits, buckets of loss, temperature, and what the test split says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.edge.both_models import BothModels, read_audited, read_recorded
from evenkeel.edge.certifying import certify_all, temperature_of
from evenkeel.errors import ConfigurationError
from evenkeel.promises.promise import Promise

CLASSES = 5


def both(count: int, seed: int = 0, loss: bool = False) -> BothModels:
    """A light model that knows less the more of an item was lost, and says so; an accurate one that is right in .93."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    lost = random.choice([0.0, 0.3], count) if loss else np.zeros(count)
    logits = random.normal(0, 1.0, (count, CLASSES))
    logits[np.arange(count), labels] += random.uniform(0.5, 7.0, count) * (1 - lost)
    wrong = random.random(count) < 0.07
    accurate = np.where(wrong, (labels + 1) % CLASSES, labels)
    return BothModels(logits, ScoreForm(CLASSES), logits.argmax(axis=1), accurate, labels, lost if loss else None)


def test_each_promise_has_a_threshold_and_the_test_split_bears_it_out() -> None:
    promises = [Promise("min_accuracy", 0.92), Promise("max_accuracy_drop", 0.02), Promise("min_agreement", 0.88)]
    found = certify_all(both(20_000), promises)
    assert [each.found.promise for each in found.thresholds] == promises
    for each in found.thresholds:
        assert each.found.certified
        assert 0 < each.found.offload < each.found.offload_high < 1
        assert each.found.n == 12_000
    accuracy, drop, agreement = found.thresholds
    assert accuracy.high >= 0.92
    assert drop.low <= 0.02
    assert agreement.high >= 0.88
    assert found.sizes == {"tuning": 4000, "calibration": 12_000, "test": 4000}
    # A drop is decided where both differ, of what the light model may answer: the rest need not be labelled.
    assert drop.examined < 0.5 * drop.found.n
    assert accuracy.examined == accuracy.found.n


def test_more_loss_needs_a_higher_threshold() -> None:
    found = certify_all(both(40_000, loss=True), [Promise("min_agreement", 0.88)])
    assert [each.found.bucket for each in found.thresholds] == [0, 5]
    clear, lossy = (each.found for each in found.thresholds)
    assert clear.threshold is not None
    assert lossy.threshold is not None
    assert lossy.offload > clear.offload + 0.05


def test_the_temperature_is_found() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (20_000, CLASSES))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = (chances.cumsum(axis=1) > random.random((20_000, 1))).argmax(axis=1)
    assert temperature_of(logits * 3, classes) == pytest.approx(3.0, rel=0.06)


def test_what_shows_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="tuning split has 80 images; at least 100"):
        certify_all(both(400), [Promise("min_agreement", 0.9)])
    few_lossy = both(2000, loss=True)
    few_lossy = few_lossy.take(np.concatenate([np.flatnonzero(few_lossy.loss == 0), [0]]))
    unlabelled = replace(both(2000), labels=None)
    with pytest.raises(ConfigurationError, match="cannot be shown without labels"):
        certify_all(unlabelled, [Promise("min_accuracy", 0.9)])
    one_class = replace(both(2000), accurate=np.zeros(2000, np.int64))
    with pytest.raises(ConfigurationError, match="the accurate model answers class 0 for every image"):
        one_class.check()


def test_a_drop_needs_labels_only_where_the_models_differ() -> None:
    whole, drop = both(8000), Promise("max_accuracy_drop", 0.02)
    assert whole.labels is not None
    partly = replace(whole, labels=np.where(whole.light == whole.accurate, -1, whole.labels))
    partly.check([drop])
    ours, all_known = (certify_all(each, [drop], score="margin").thresholds[0].found for each in (partly, whole))
    # The temperature is chosen by the labels, or by the accurate model's answers: thresholds differ, not what is sent.
    assert ours.offload == pytest.approx(all_known.offload, abs=0.05)
    with pytest.raises(ConfigurationError, match=r"items have no label and need one, numbers \d+, .*\.\.\."):
        partly.check([Promise("min_accuracy", 0.8)])
    none = replace(whole, labels=np.full(8000, -1))
    with pytest.raises(ConfigurationError, match="need one"):
        none.check([drop])
    none.check([Promise("min_agreement", 0.9)])


def test_recorded_answers_are_read_and_checked(tmp_path: Path) -> None:
    path, given = tmp_path / "answers.npz", both(50, loss=True)
    arrays = {"light": given.scores, "accurate": given.accurate, "labels": given.labels, "loss": given.loss}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    found = read_recorded(path)
    assert np.array_equal(found.light, given.light)
    assert np.array_equal(found.loss, given.loss)  # type: ignore[arg-type]
    for name, wrong, words in (
        ("light", given.scores[:, :1], "finite scores"),
        ("light", np.full((50, 5), np.nan), "finite scores"),
        ("accurate", given.accurate[:9], "accurate must have one number"),
        ("labels", given.scores[:, 0], "labels must have one number"),
        ("loss", np.full(50, 1.5), "between 0 and 1"),
        ("light", np.array([object()]), "no npz file of plain arrays"),
    ):
        np.savez(path, **{**arrays, name: wrong})  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=words):
            read_recorded(path)
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ConfigurationError, match="no npz file"):
        read_recorded(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_recorded(tmp_path / "none.npz")


def test_audited_answers_are_read_and_what_is_none_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "audits.jsonl"
    lines = [json.dumps({"score": 0.5 + place / 4000, "agree": place % 20 != 0}) for place in range(2000)]
    path.write_text("\n".join([*lines, "{", "[]", '{"score": 7, "agree": true}', '{"score": 0.4, "agr']))
    found, skipped = read_audited(path)
    assert (len(found), skipped) == (2000, 4)
    (each,) = certify_all(found, [Promise("min_agreement", 0.92)]).thresholds
    assert each.found.threshold == 0.0  # nineteen of twenty agree, whatever the score
    path.write_text("")
    with pytest.raises(ConfigurationError, match="holds none"):
        read_audited(path)
