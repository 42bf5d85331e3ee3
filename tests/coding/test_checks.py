"""Settings of a wrong kind or size are refused by name."""

from math import inf, nan

import numpy as np
import pytest

from evenkeel.coding.checks import number, whole
from evenkeel.errors import ConfigurationError


@pytest.mark.parametrize("value", [1, 8, np.int64(3), np.uint8(8)])
def test_whole_numbers_are_given_back(value: object) -> None:
    found = whole("bits", value, 1, 8)
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize("value", [2.5, 4.0, "4", None, True, np.bool_(True), np.float32(4), [4], 0, 9])
def test_what_is_not_whole_or_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError) as error:
        whole("bits", value, 1, 8)
    assert str(error.value) == f"bits: must be a whole number from 1 to 8, found {value!r}"


@pytest.mark.parametrize(
    ("limits", "message"),
    [((4,), "steps: must be a whole number of 4 or more, found 'x'"), ((), "steps: must be a whole number, found 'x'")],
)
def test_the_range_is_told_as_far_as_there_is_one(limits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        whole("steps", "x", *limits)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [1, 2.5, np.float32(1.5), np.int64(3)])
def test_numbers_are_given_back(value: object) -> None:
    found = number("ratio", value, 1)
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("value", [0.5, nan, inf, "2", None, True, 1j])
def test_what_is_no_number_or_too_small_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError) as error:
        number("ratio", value, 1)
    assert str(error.value) == f"ratio: must be a finite number of 1 or more, found {value!r}"
