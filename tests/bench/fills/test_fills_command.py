"""`evenkeel bench fills`, on the shipped models and on tiny ones."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.models.shipped import COLLAGES, IMAGES, NAMES, card_path
from onnx_bytes import FLOAT, UINT8, boxes_model, linear_model

FIXED = ("method", "images_per_backup", "cost", "macs", "parameters", "latency_ms", "accuracy", "agreement")
LABELS = ("red", "green", "blue")
SIDE = 4


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "fills", *map(str, arguments)])


def rows_of(folder, *arguments):
    result = run("--rounds", 2, "--json", folder / "rows.json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "rows.json").read_text())["rows"], result.output


@pytest.fixture
def tiny(tmp_path):
    """A folder with images of three colours, a classifier that is always right, and cards to be changed."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 30)
    flat = random.integers(0, 100, (30, 1, 1, 3))
    flat[np.arange(30), 0, 0, labels] += 120
    images = np.broadcast_to(flat, (30, SIDE, SIDE, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    # Of means of pixels; so small that the logits are not all far apart.
    card(tmp_path, "base", linear_model(SIDE, np.eye(3) / 50, UINT8))
    card(tmp_path, "float", linear_model(SIDE, np.eye(3) / 50, FLOAT), datatype="FP32")
    sums = {"kind": "parity", "encoder": "sum", "group": 2, "datatype": "FP32"}
    card(tmp_path, "sum2", linear_model(SIDE, np.eye(3) / 50, FLOAT), **sums)
    concat = {"kind": "parity", "encoder": "concat", "group": 4}
    # The mean of four cells is a quarter of the sum of their scores.
    card(tmp_path, "concat4", linear_model(SIDE, 4 * np.eye(3) / 50, UINT8), **concat)
    return tmp_path


def card(folder, name, content, **fields):
    (folder / f"{name}.onnx").write_bytes(content)
    made = ModelCard(
        name=name,
        kind="classifier",
        file=f"{name}.onnx",
        sha256=hashlib.sha256(content).hexdigest(),
        classes=LABELS,
        height=SIDE,
        width=SIDE,
    )
    save_card(dataclasses.replace(made, **fields), folder / f"{name}.json")


def on(tiny, *arguments):
    return ("--classifier", tiny / "base.json", "--images", tiny / "images.npz", *arguments)


def test_without_options_it_measures_what_is_shipped(tmp_path):
    rows, output = rows_of(tmp_path, "--limit", 20)
    assert [row["model"] for row in rows] == [NAMES[0], *COLLAGES, NAMES[0], NAMES[0]]
    assert [row["images_per_backup"] for row in rows] == [1, 4, 9, 16, 4, 9]
    for row in rows:
        assert all(row[key] is not None for key in FIXED)
        assert row["base_accuracy"] == rows[0]["accuracy"]
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert rows[0]["accuracy"] > 0.75
    assert min(row["accuracy"] for row in rows[1:4]) > 0.65
    assert "only 20 images: the intervals are wide" in output
    assert "not systematic, so every answer is approximate" in output


def test_peers_on_images_of_ones_own(tiny, tmp_path):
    rows, output = rows_of(
        tmp_path,
        *on(tiny, "--parity-sum", f"k=2:{tiny / 'sum2.json'}", "--parity-concat", tiny / "concat4.json"),
        *("--cheap", f"{tiny / 'float.json'}:5", "--berrut", "2,3", "--partial", "--same-class", "--shuffles", 2),
        *("--figure", tmp_path / "fills.png", "--markdown", tmp_path / "fills.md"),
    )
    assert [row["method"] for row in rows] == [
        "classifier",
        "parity_sum2",
        "parity_concat4",
        "cheap5",
        "berrut2+1",
        "berrut3+1",
    ]
    # Linear models: both parities are exact, and the same network as a cheap one agrees with itself.
    assert [row["accuracy"] for row in rows[:4]] == [1.0, 1.0, 1.0, 1.0]
    assert [row["fills"] for row in rows[1:]] == [60, 56, 60, 2 * 30 * 3, 2 * 30 * 4]
    assert rows[1]["accuracy_same_class"] == 1.0
    assert [entry["items"] for entry in rows[2]["by_items"]] == [1, 2, 3, 4]
    assert "by_items" not in rows[3]
    assert rows[4]["accuracy_none_lost"] >= rows[4]["accuracy"]
    assert "same class: all items of a group are of one class" in output
    assert (tmp_path / "fills.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "fills.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith("| classifier | 1.00 ")


def test_the_papers_detector_has_its_row(tiny, tmp_path):
    # Always the same boxes: red in the first cell of four, blue in the last, nothing elsewhere.
    boxes = [[0, 0, SIDE, SIDE, 0.9, 5, 0, 0], [SIDE, SIDE, 2 * SIDE, 2 * SIDE, 0.58, 0, 0, 5]]
    content = boxes_model(2 * SIDE, boxes)
    card(tiny, "detector", content, kind="detector", height=2 * SIDE, width=2 * SIDE, grid=2, tile_side=SIDE)
    rows, _ = rows_of(tmp_path, *on(tiny, "--detector", tiny / "detector.json"))
    assert rows[1]["method"] == "box_collage2x2"
    assert rows[1]["unanswered"] == 0.5
    assert [step[:3] for step in rows[1]["reliability"]] == [[0.53333, 0.6, 7], [0.86667, 0.93333, 7]]
    assert rows[1]["accuracy"] < 0.5


def test_a_bare_file_is_a_classifier_too(tiny, tmp_path):
    arguments = ("--classifier", tiny / "base.onnx", "--images", tiny / "images.npz", "--labels", "none")
    rows, _ = rows_of(tmp_path, *arguments, "--berrut", 2)
    assert rows[1]["agreement"] > 0.5
    assert rows[1]["accuracy"] is None


def test_a_float_classifier_needs_no_change_for_berrut(tiny, tmp_path):
    images = ("--images", tiny / "images.npz", "--berrut", 3)
    from_float, _ = rows_of(tmp_path, "--classifier", tiny / "float.json", *images)
    from_bytes, _ = rows_of(tmp_path, "--classifier", tiny / "base.json", *images)
    assert from_float[1]["accuracy"] == from_bytes[1]["accuracy"]
    assert from_float[1]["agreement_low"] == from_bytes[1]["agreement_low"]


def test_labels_follow_the_classifiers_order_of_classes(tiny, tmp_path):
    """A folder tree is sorted by name; the card lists red, green, blue."""
    from PIL import Image

    with np.load(tiny / "images.npz") as file:
        for number, (image, label) in enumerate(zip(file["images"], file["labels"], strict=True)):
            folder = tmp_path / "tree" / LABELS[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "tree" / "red" / "torn.png").write_bytes(b"no image")
    arguments = ("--classifier", tiny / "base.json", "--images", tmp_path / "tree", "--berrut", 2)
    rows, output = rows_of(tmp_path, *arguments)
    assert rows[0]["accuracy"] == 1.0
    assert "torn.png" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no backup to measure"),
        (("--berrut", "4,x"), "expected numbers of items such as 4,8,9, found '4,x'"),
        (("--berrut", "31"), "berrut31+1 needs groups of 31, found 30 images"),
        (("--berrut", "2,2"), "berrut2+1 base is given twice"),
        (("--cheap", "{0}/float.json"), "expected CARD:ITEMS"),
        (("--parity-sum", "k=3:{0}/sum2.json"), "sum2 is for k=2, not k=3"),
        (("--parity-sum", "{0}/concat4.json"), "concat4 is for form=concat, not form=sum"),
        (("--parity-concat", "{0}/base.json"), "base is a classifier; a parity is wanted here"),
        (("--collage", "{0}/none.json"), "cannot be read"),
        (("--collage", "none"), "expected a model card"),
        (("--collage", COLLAGES[0]), "must have the same classes in the same order; they have 10 and 3"),
        (("--cheap", f"{card_path(NAMES[0])}:9"), "must have the same classes"),
        (("--berrut", "2", "--labels", "none", "--same-class"), "the images have no labels"),
        (("--berrut", "2", "--labels", "none", "--figure", "{0}/a.png"), "needs images with labels"),
        (("--berrut", "2", "--figure", "{0}/a.gif"), r"must end in .png or .svg"),
        (("--berrut", "2", "--markdown", "{0}/gone/a.md"), "markdown: "),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, arguments, says):
    result = run(*on(tiny, *(str(argument).format(tiny) for argument in arguments)))
    assert result.exit_code == 2
    assert says in result.output.replace("\n", " ")


def test_classes_in_another_order_are_told_apart(tiny):
    made = json.loads((tiny / "base.json").read_text())
    (tiny / "other.json").write_text(json.dumps(made | {"name": "other", "classes": ["red", "blue", "green"]}))
    result = run(*on(tiny, "--cheap", f"{tiny / 'other.json'}:2"))
    assert result.exit_code == 2
    assert "only their order differs: the first that differ, number 1, are 'blue' and 'green'" in result.output


def test_labels_that_the_classifier_does_not_know_are_refused(tiny):
    result = run("--classifier", tiny / "base.json", "--images", IMAGES, "--berrut", 2)
    assert result.exit_code == 2
    assert "labels go from 0 to 9, but the classifier has 3 classes" in result.output


def test_the_seed_alone_decides(tiny, tmp_path):
    arguments = on(tiny, "--berrut", "3", "--rounds", 0)
    first = rows_of(tmp_path, *arguments, "--seed", 1)[0]
    assert rows_of(tmp_path, *arguments, "--seed", 1)[0] == first
    assert rows_of(tmp_path, *arguments, "--seed", 2)[0] != first
    assert "cost" not in first[0]


def test_a_digit_that_is_no_number_is_refused(tiny):
    for option in (("--cheap", f"{tiny / 'base.json'}:\N{SUPERSCRIPT TWO}"), ("--berrut", "\N{SUPERSCRIPT TWO}")):
        result = run("--classifier", tiny / "base.json", "--images", tiny / "images.npz", *option)
        assert result.exit_code == 2, result.output
        assert "expected" in result.output
