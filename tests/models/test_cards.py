"""Cards of every kind: kept as they are, and refused by name when a field contradicts another."""

import dataclasses
import json
from pathlib import Path

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import Measured, ModelCard, load_card, save_card
from evenkeel.models.shipped import NAMES, card_path

CLASSIFIER = ModelCard(
    name="net", kind="classifier", file="net.onnx", sha256="0" * 64, classes=("cat", "dog"), height=32, width=32
)
COLLAGE = dataclasses.replace(CLASSIFIER, kind="collage", height=96, width=96, grid=3, tile_side=32)
DETECTOR = dataclasses.replace(COLLAGE, kind="detector")
SUM = dataclasses.replace(CLASSIFIER, kind="parity", encoder="sum", group=3, datatype="FP32")
CONCAT = dataclasses.replace(CLASSIFIER, kind="parity", encoder="concat", group=4)
RELIABILITY = ((0.4, 0.6, 3, 0.5), (0.6, 0.8, 10, 0.7), (0.9, 1.0, 100, 0.99))


@pytest.mark.parametrize("card", [CLASSIFIER, COLLAGE, DETECTOR, SUM, CONCAT])
def test_a_card_is_read_as_it_was_written(card, tmp_path):
    card = dataclasses.replace(card, accuracy=Measured(0.9, 0.8, 0.95, 100, "so"), reliability=RELIABILITY)
    card = dataclasses.replace(card, agreement_elsewhere=card.accuracy, largest_class_share=0.9)
    save_card(card, tmp_path / "card.json")
    assert load_card(tmp_path / "card.json") == card


@pytest.mark.parametrize(
    ("card", "cells", "output_shape"),
    [(CLASSIFIER, 1, (2,)), (COLLAGE, 9, (9, 2)), (DETECTOR, 9, None), (SUM, 3, (2,)), (CONCAT, 4, (2,))],
)
def test_each_kind_says_what_a_pass_covers_and_gives(card, cells, output_shape):
    assert (card.cells, card.output_shape) == (cells, output_shape)


def test_a_card_without_the_newer_fields_is_still_read(tmp_path):
    raw = json.loads(card_path(NAMES[0]).read_text())
    for name in ("encoder", "group", "reliability"):
        raw.pop(name, None)
    (tmp_path / "card.json").write_text(json.dumps(raw))
    card = load_card(tmp_path / "card.json")
    assert (card.encoder, card.group, card.reliability) == (None, 1, None)


@pytest.mark.parametrize(
    ("card", "fields", "says"),
    [
        (CLASSIFIER, {"kind": "oracle"}, "'kind' must be one of classifier, collage, detector, parity, found 'oracle'"),
        (CLASSIFIER, {"encoder": "sum"}, "'encoder' must be left out for a classifier, found 'sum'"),
        (CLASSIFIER, {"group": 2}, "'group' must be 1 for a classifier"),
        (CLASSIFIER, {"grid": 2}, "'grid' must be 1 for a classifier"),
        (COLLAGE, {"group": 9}, "'group' must be 1 for a collage"),
        (COLLAGE, {"mirrored": 1}, "'mirrored' must be true or false"),
        (DETECTOR, {"mirrored": True}, "'mirrored' must be true or false, and false for all but a collage"),
        (DETECTOR, {"tile_side": 31}, "'tile_side' times grid must equal height and width"),
        (SUM, {"encoder": None}, "'encoder' must be one of sum, concat, found None"),
        (SUM, {"encoder": "xor"}, "'encoder' must be one of sum, concat, found 'xor'"),
        (SUM, {"group": 0}, "'group' must be a positive integer, found 0"),
        (SUM, {"group": True}, "'group' must be a positive integer, found True"),
        (SUM, {"datatype": "UINT8"}, "'datatype' must be FP32 for a sum of items"),
        (CONCAT, {"grid": 2}, "'grid' must be 1 for a parity"),
        (COLLAGE, {"min_confidence": -0.1}, "'min_confidence' must be a number from 0 to 2"),
        (COLLAGE, {"min_confidence": "0.5"}, "'min_confidence' must be a number from 0 to 2"),
        (CLASSIFIER, {"min_confidence": 0.5}, "'min_confidence' is only known of a collage"),
        (CLASSIFIER, {"classes": ("a", "caf\udce9")}, "'classes' holds a name that cannot be written as UTF-8"),
        (COLLAGE, {"reliability": "all"}, "'reliability' must list rows"),
        (COLLAGE, {"reliability": (0.1, 0.2)}, "'reliability' must list rows"),
        (COLLAGE, {"reliability": ((0.1, 0.2, 3),)}, "'reliability' must list rows"),
        (COLLAGE, {"reliability": ((0.1, 0.2, 3.5, 0.5),)}, "'reliability' must list rows"),
        (COLLAGE, {"reliability": ((0.1, 0.2, 3, "0.5"),)}, "'reliability' must list rows"),
        (COLLAGE, {"reliability": ((0.1, 0.2, 3, 1.5),)}, "'reliability' must list rows"),
        (
            COLLAGE,
            {"reliability": ((0.1, 0.3, 3, 0.5), (0.2, 0.4, 3, 0.5))},
            "'reliability' must list rows .* that rise from 0 to 1",
        ),
    ],
)
def test_a_card_that_contradicts_itself_is_refused_by_name(card, fields, says, tmp_path):
    save_card(dataclasses.replace(card, **fields), tmp_path / "card.json")
    with pytest.raises(ConfigurationError, match=f"field {says}"):
        load_card(tmp_path / "card.json")


def test_a_byte_order_mark_in_front_does_not_count(tmp_path):
    source = card_path("cifar10-base")
    copy = tmp_path / "card.json"
    copy.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert load_card(copy) == load_card(source)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:-2] + ', "classes": ["a", "b"]}', "'classes' is given twice"),
        (lambda text: text.replace("0.49139968", "NaN"), "NaN is no finite number"),
        (lambda text: "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_card_that_could_be_misread_is_refused(damage, says, tmp_path):
    (tmp_path / "card.json").write_text(damage(card_path("cifar10-base").read_text().rstrip()))
    with pytest.raises(ConfigurationError, match=f"is not JSON: .*{says}"):
        load_card(tmp_path / "card.json")


def test_the_page_on_cards_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "cards.md").read_text(encoding="utf-8")
    missing = [field.name for field in dataclasses.fields(ModelCard) if f"`{field.name}`" not in page]
    assert not missing
