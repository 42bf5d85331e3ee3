"""The codes that a configuration makes, before anything is started."""

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.serving.config import read_config
from evenkeel.serving.service import build_codes


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
