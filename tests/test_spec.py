import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.spec import read_duration_s, split_spec


def test_a_spec_is_a_name_and_fields():
    assert split_spec("two-mode:scale=0.3,seed=7", "delay") == ("two-mode", {"scale": "0.3", "seed": "7"})
    assert split_spec(" none ", "delay") == ("none", {})
    assert split_spec("trace:path=C=1", "delay") == ("trace", {"path": "C=1"})


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.2", 0.2), ("2s", 2.0), ("200ms", 0.2), ("50us", 5e-5), ("2min", 120.0), ("1e-3s", 1e-3)]
)
def test_durations_have_units(text, seconds):
    assert read_duration_s(text, "field") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "ms", "soon", "2 hours", "nan", "infs", "1m"])
def test_a_wrong_duration_names_its_field(text):
    with pytest.raises(ConfigurationError, match="field 'at' must be a"):
        read_duration_s(text, "field 'at'")
