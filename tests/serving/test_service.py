"""The codes that a configuration makes, before anything is started."""

import json

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.models.shipped import card_path
from evenkeel.serving.config import read_config
from evenkeel.serving.hosted import build_codes


def test_the_embedded_codes_run_the_models_of_their_cards() -> None:
    config = read_config({})
    codes = build_codes(config, config.card())
    assert [(code.name, code.model, code.max_items) for code in codes] == [
        ("replicate", "cifar10-base", 1),
        ("collage2x2", "cifar10-collage-2x2", 4),
        ("collage3x3", "cifar10-collage-3x3", 9),
    ]


def test_a_code_that_its_card_contradicts_is_named() -> None:
    config = read_config({"codes": ["replicate", {"kind": "collage:grid=3", "model": "cifar10-collage-2x2"}]})
    with pytest.raises(ConfigurationError, match=r"codes\[1\]: cifar10-collage-2x2 is for grid=2, not grid=3"):
        build_codes(config, config.card())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda names: names[::-1],
            "only their order differs: the first that differ, number 0, are 'truck' and 'air",
        ),
        (lambda names: [*names[:2], "Bird", *names[3:]], "; the first that differ, number 2, are 'Bird' and 'bird'"),
        (lambda names: names[:9], "; they have 9 and 10"),
    ],
    ids=["order", "name", "number"],
)
def test_a_coded_model_of_other_classes_is_refused_with_the_first_that_differs(tmp_path, change, says) -> None:
    card = json.loads(card_path("cifar10-collage-2x2").read_text())
    card["classes"] = change(card["classes"])
    (tmp_path / "card.json").write_text(json.dumps(card))
    config = read_config({"codes": ["replicate", {"kind": "collage", "model": str(tmp_path / "card.json")}]})
    with pytest.raises(ConfigurationError, match=says):
        build_codes(config, config.card())
