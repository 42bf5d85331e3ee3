"""Fills, measured with models whose answers are known by heart."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.bench.fills.measure import NO_ANSWER, Fills, MeasuredBackup, collect, from_scores, same_class_groups
from evenkeel.bench.fills.rows import Truth, cost_fields, fill_fields, gate_fields, partial_fields
from evenkeel.coding.answers.berrut import Berrut
from evenkeel.coding.answers.boxes import BoxCollage
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.parity import Parity, SumEncoder
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.errors import ConfigurationError
from evenkeel.figures.estimates import share
from evenkeel.models.measure import shuffled_groups

SIDE, CLASSES = 4, 3
FORM = ScoreForm(CLASSES)
PARITY = Parity(SumEncoder(3, Pixels(datatype="FP32")), FORM)


def colours(rows):
    """A classifier: scores are the mean colour, a linear map, so that the sum of scores is the score of the sum."""
    return np.asarray(rows, np.float32).mean(axis=(1, 2))


def cells(canvases, grid=2):
    """A perfect Collage-CNN."""
    rows = np.asarray(canvases, np.float32).reshape(len(canvases), grid, SIDE, grid, SIDE, 3)
    return rows.mean(axis=(2, 4)).reshape(len(canvases), grid * grid, 3)


@pytest.fixture
def images():
    """Images whose brightest colour is their class, all different."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, 40)
    flat = random.integers(0, 100, (40, 1, 1, 3))
    flat[np.arange(40), 0, 0, labels] += 120
    return np.broadcast_to(flat, (40, SIDE, SIDE, 3)).astype(np.uint8).copy(), labels


def backup(code, run):
    return MeasuredBackup(code.name, code, "model", run, 1, 1)


def collected(code, run, images, size=None, seed=1):
    pixels, labels = images
    groups = shuffled_groups(len(pixels), code.max_items, seed)[:, : size or code.max_items]
    fills, unhurt = collect(backup(code, run), pixels, colours(pixels), groups)
    return fills, unhurt, labels


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_cell_is_held_against_its_own_image(images, size):
    fills, unhurt, labels = collected(Collage(2, SIDE, FORM), cells, images, size)
    assert len(fills) == 40 // 4 * size
    assert len(set(fills.images.tolist())) == len(fills)
    assert (fills.answers == labels[fills.images]).all()
    assert unhurt is None


def test_a_model_that_mixes_up_its_cells_is_found_out(images):
    fills, _, labels = collected(Collage(2, SIDE, FORM), lambda rows: cells(rows)[:, [1, 2, 3, 0]], images)
    assert 0.1 < (fills.answers == labels[fills.images]).mean() < 0.7


def test_partly_filled_groups_take_the_first_cells(images):
    seen = []
    collected(Collage(2, SIDE, FORM), lambda rows: seen.append(rows) or cells(rows), images, size=2)
    canvases = np.concatenate(seen)
    assert (canvases[:, :SIDE] > 0).any(axis=(1, 2, 3)).all()
    assert not canvases[:, SIDE:].any()


def test_a_spare_that_answers_alone_never_sees_the_classifiers_scores(images):
    pixels, labels = images
    groups = shuffled_groups(40, 5, 1)
    # A classifier that is never right: were a primary's reply used, its answer would show.
    wrong = -colours(pixels)
    fills, _ = collect(backup(Cheap(5, FORM), colours), pixels, wrong, groups)
    assert (fills.answers == labels[fills.images]).all()


def test_parity_loses_each_item_once_and_uses_the_others(images):
    fills, unhurt, labels = collected(PARITY, colours, images)
    assert sorted(fills.images.tolist()) == sorted(shuffled_groups(40, 3, 1).reshape(-1).tolist())
    assert (fills.answers == labels[fills.images]).all()
    assert unhurt is None
    # A parity model that says nothing leaves minus the others, which is not the lost one.
    nothing, _, _ = collected(PARITY, lambda rows: np.zeros((len(rows), 3), np.float32), images)
    assert (nothing.answers == labels[nothing.images]).mean() < 0.6


def test_parity_runs_its_model_once_for_each_group(images):
    rows = []
    collected(PARITY, lambda batch: rows.append(len(batch)) or colours(batch), images)
    assert sum(rows) == 40 // 3


def test_berrut_loses_every_worker_in_turn(images):
    pixels, _ = images
    code = Berrut(3, FORM)
    groups = shuffled_groups(40, 3, 1)
    fills, unhurt = collect(backup(code, colours), pixels, np.full((40, 3), np.nan), groups)
    expected = []
    for group in groups:
        replies = {number: colours(task.inputs) for number, task in enumerate(code.encode(list(pixels[group])))}
        for lost in range(4):
            rest = {number: reply for number, reply in replies.items() if number != lost}
            expected += [int(code.decode(3, rest)[item].value.argmax()) for item in range(3)]
    assert fills.answers.tolist() == expected
    assert unhurt is not None
    assert (len(fills), len(unhurt)) == (4 * 39, 39)


def test_what_a_detector_overlooks_is_no_answer(images):
    def boxes(canvases):
        found = cells(canvases)
        places = np.array([[0, 0], [SIDE, 0], [0, SIDE]])  # nothing for the fourth cell
        corners = np.concatenate([places, places + SIDE], axis=1).astype(np.float32)
        sure = np.full((3, 1), 0.8, np.float32)
        return np.stack([np.concatenate([corners, sure, found[row, :3]], axis=1) for row in range(len(found))])

    fills, _, labels = collected(BoxCollage(Collage(2, SIDE, FORM)), boxes, images)
    assert (fills.answers == NO_ANSWER).sum() == 10
    row = fill_fields(fills, None, Truth(labels, labels))
    assert row["unanswered"] == 0.25
    assert row["accuracy"] == 0.75
    # What has no answer is the first to be hedged.
    assert row["accuracy_coverage_70"] == 1.0


@given(st.integers(1, 7), st.integers(0, 1000))
def test_groups_never_hold_an_image_twice(size, seed):
    groups = shuffled_groups(30, size, seed)
    assert groups.shape == (30 // size, size)
    assert len(np.unique(groups)) == groups.size


def test_same_class_groups_are_of_one_class(images):
    _, labels = images
    groups = same_class_groups(labels, 4, 1)
    assert groups.size
    assert all(len(set(labels[group])) == 1 for group in groups)
    assert len(np.unique(groups)) == groups.size
    with pytest.raises(ConfigurationError, match="no class has 41 images"):
        same_class_groups(labels, 41, 1)


# Rows


def fills_of(right, confidences, images=None):
    """Fills of class 1, of which those that are right have label 1."""
    count = len(right)
    images = np.arange(count) if images is None else np.asarray(images)
    answers = np.where(right, 1, 0)
    return Fills(images, answers, np.asarray(confidences, float))


def test_figures_by_hand():
    right = np.array([True] * 6 + [False] * 4)
    truth = Truth(np.array([1] * 9 + [0]), np.ones(10, np.int64))  # the classifier gets nine of ten
    row = fill_fields(fills_of(right, np.linspace(0.95, 0.05, 10)), None, truth)
    assert (row["accuracy"], row["base_accuracy"], row["drop"]) == (0.6, 0.9, 0.3)
    assert row["agreement"] == 0.7  # six ones and the last zero
    interval = share(6, 10)
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert row["overall_unavailable_10"] == pytest.approx(0.9 * 0.9 + 0.1 * 0.6)
    assert row["accuracy_coverage_100"] == 0.6
    assert row["accuracy_coverage_70"] == pytest.approx(6 / 7, abs=1e-6)
    assert row["min_confidence_coverage_70"] == pytest.approx(0.35)
    assert sum(step[2] for step in row["reliability"]) == 10


def test_asking_again_is_no_new_evidence():
    right = np.arange(200) % 4 > 0
    truth = Truth(np.ones(200, np.int64), np.ones(200, np.int64))
    once = fill_fields(fills_of(right, np.full(200, 0.5)), None, truth)
    twice = np.concatenate([right, right])
    again = fill_fields(fills_of(twice, np.full(400, 0.5), np.tile(np.arange(200), 2)), None, truth)
    assert again["fills"] == 2 * again["images"] == 400
    for key in ("accuracy", "accuracy_low", "accuracy_high", "drop_low", "overall_unavailable_5_high"):
        assert again[key] == pytest.approx(once[key], abs=1e-6)


def test_overall_counts_what_is_lost_without_a_straggler():
    truth = Truth(np.ones(4, np.int64), np.ones(4, np.int64))
    half = fills_of(np.array([True, True, False, False]), np.full(4, 0.5))
    most = fills_of(np.array([True, True, True, False]), np.full(4, 0.5))
    row = fill_fields(half, most, truth)
    assert row["accuracy_none_lost"] == 0.75
    assert row["overall_unavailable_10"] == pytest.approx(0.9 * 0.75 + 0.1 * 0.5)
    assert row["base_accuracy"] == 1.0


def test_a_share_of_all_answers_stays_a_share():
    truth = Truth(np.array([1, 1, 0]), np.ones(3, np.int64))
    row = fill_fields(fills_of([1, 1, 0], np.full(3, 0.5)), None, truth)
    assert row["overall_unavailable_5_low"] == 0
    assert row["overall_unavailable_5_high"] == 1


def test_equal_confidences_pass_the_gate_together():
    truth = Truth(np.ones(4, np.int64), np.ones(4, np.int64))
    row = fill_fields(fills_of(np.array([True, False, True, False]), np.full(4, 0.5)), None, truth)
    assert row["accuracy_coverage_70"] == 0.5


def test_without_labels_there_is_agreement_alone():
    right = np.array([True, True, False, True])
    row = fill_fields(fills_of(right, np.full(4, 0.5)), None, Truth(np.ones(4, np.int64), None))
    assert row["agreement"] == 0.75
    assert row["accuracy"] is None
    assert row["base_accuracy"] is None
    assert "drop" not in row


def test_agreement_is_told_class_by_class_and_above_the_confidence_of_the_card():
    """Always saying the largest class agrees in three of four, and is right for no other."""
    answers = np.array([0, 0, 0, 2])
    fills = Fills(np.arange(4), np.zeros(4, np.int64), np.array([0.9, 0.99, 0.8, 0.85]))
    truth = Truth(answers, None)
    row = fill_fields(fills, None, truth)
    assert (row["agreement"], row["largest_class_share"], row["agreement_elsewhere"]) == (0.75, 0.75, 0.0)
    assert row["agreement_by_class"] == [[0, 3, 3], [2, 1, 0]]
    assert gate_fields(fills, truth, 0.0) == {}
    gated = gate_fields(fills, truth, 0.88)
    assert (gated["filled_above_min_confidence"], gated["agreement_above_min_confidence"]) == (0.5, 1.0)
    assert gated["elsewhere_filled_wrongly"] == 0
    assert gate_fields(fills, truth, 0.82)["elsewhere_filled_wrongly"] == 1
    assert gate_fields(fills, truth, 1.01)["agreement_above_min_confidence"] is None


def test_the_classifier_agrees_with_itself():
    scores = np.eye(3)[[0, 2, 1, 1]]
    fills = from_scores(scores, FORM.confidences(scores))
    assert fills.answers.tolist() == [0, 2, 1, 1]
    row = fill_fields(fills, None, Truth(fills.answers, np.array([0, 2, 1, 0])))
    assert (row["agreement"], row["accuracy"], row["drop"]) == (1.0, 0.75, 0.0)


def test_partly_filled_groups_have_a_row_each():
    truth = Truth(np.ones(4, np.int64), np.ones(4, np.int64))
    some = fills_of(np.array([True, False]), np.full(2, 0.5))
    found = partial_fields([(1, some), (2, some)], truth)["by_items"]
    assert [(entry["items"], entry["fills"], entry["accuracy"]) for entry in found] == [(1, 2, 0.5), (2, 2, 0.5)]


def test_cost_is_a_ratio_of_medians():
    times_ms = np.array([[10.0, 5.0], [12.0, 6.0], [100.0, 7.0]])
    assert cost_fields(times_ms, 0)["cost"] == 1.0
    fields = cost_fields(times_ms, 1)
    assert fields["latency_ms"] == 6.0
    assert fields["cost"] == 0.5
    assert fields["cost_low"] <= 0.5 <= fields["cost_high"]
