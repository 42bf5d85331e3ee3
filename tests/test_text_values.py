import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import (
    read_duration_s,
    read_fraction,
    read_json,
    read_quantity,
    read_rate_bps,
    read_share,
    split_spec,
    without_password,
)


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


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("100mbit", 1e8),
        ("2.5Gbit/s", 2.5e9),
        ("8kbit", 8e3),
        ("1gbitps", 1e9),
        ("5bit", 5.0),
        ("unlimited", float("inf")),
    ],
)
def test_rates_are_bits_a_second(text, bps):
    assert read_rate_bps(text, "field") == pytest.approx(bps)


@pytest.mark.parametrize("text", ["", "bit", "100", "100mb", "fast", "-1mbit", "0mbit", "nanmbit", "infbit", "1 0mbit"])
def test_a_wrong_rate_names_its_field(text):
    with pytest.raises(ConfigurationError, match="field 'rate' must be a rate"):
        read_rate_bps(text, "field 'rate'")


@pytest.mark.parametrize(
    ("text", "number"), [("25000", 25_000), ("300k", 300_000), ("11.7M", 11_700_000), ("1g", 10**9)]
)
def test_quantities_have_prefixes(text, number):
    assert read_quantity(text, "field") == number


@pytest.mark.parametrize("text", ["", "M", "many", "0", "0.1", "-5", "nan", "inf", "5x"])
def test_a_wrong_quantity_names_its_field(text):
    with pytest.raises(ConfigurationError, match="field 'n' must be a number of 1 or more"):
        read_quantity(text, "field 'n'")


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.1%", 0.001), ("0.25", 0.25), ("100 %", 1.0)])
def test_shares_may_be_in_percent(text, value):
    assert read_share(text, "field") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "1.1", "-0.1", "101%", "nan", "some"])
def test_a_wrong_share_names_its_field(text):
    with pytest.raises(ConfigurationError, match="field 'loss' must be a"):
        read_share(text, "field 'loss'")


@pytest.mark.parametrize(
    ("text", "value"), [("0.03", 0.03), ("1/32", 1 / 32), ("2 / 3", 2 / 3), ("1e-9", 1e-9), ("-1", -1)]
)
def test_fractions(text, value):
    assert read_fraction(text, "p") == value


@pytest.mark.parametrize("text", ["", "1/0", "/2", "1/", "1/2/3", "nan", "inf", "1e999999999", "half"])
def test_what_is_no_fraction_is_refused_at_once(text):
    with pytest.raises(ConfigurationError, match=r"p: must be a number such as 0\.03 or 1/32, found"):
        read_fraction(text, "p")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://admin:hunter2@10.0.0.7:80/v2", "http://10.0.0.7:80/v2"),
        ("https://token@host", "https://host"),
        ("cannot connect to http://a:b@c:1/v2 now", "cannot connect to http://c:1/v2 now"),
        ("http://a:b@c@d/x", "http://d/x"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("http://admin:hun/te?r2@host/x", "http://host/x"),
        ("tcp://u:p@host:9", "tcp://host:9"),
        ("no answer from 'http://host/x?token=secret', trying again", "no answer from 'http://host/x', trying again"),
        ("unix:/run/w.sock", "unix:/run/w.sock"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is given twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ("[1, -Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting"),
    ],
)
def test_json_that_could_be_misread_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read_json(text)
    assert read_json('{"a": [1, 2.5, true, null], "b": {"a": ""}}') == {"a": [1, 2.5, True, None], "b": {"a": ""}}
