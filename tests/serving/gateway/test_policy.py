"""Policies as data."""

import math

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.serving.gateway.policy import POLICIES, Policy, Trigger, parse_trigger, preset


def test_there_is_a_preset_for_every_rival():
    assert set(POLICIES) == {"none", "replicate", "replicate-all", "hedge", "collage", "collage+hedge", "cascade"}
    assert [name for name, policy in POLICIES.items() if policy.uses_backups] == ["collage", "collage+hedge", "cascade"]
    assert all(policy.name == name for name, policy in POLICIES.items())


def test_replication_makes_one_copy_as_in_the_paper():
    assert POLICIES["replicate"].max_attempts == 2


def test_a_preset_may_be_changed_field_by_field():
    policy = preset("hedge", max_extra_load=0.2, deadline_s=1.0)
    assert (policy.name, policy.max_extra_load, policy.deadline_s) == ("hedge", 0.2, 1.0)
    assert preset("hedge") == POLICIES["hedge"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("collages", {}, "unknown policy 'collages'; choose from none, "),
        ("none", {"grid": 3}, "unknown field 'grid'; known are "),
        ("none", {"copies": 0}, "policy.copies: expected a whole number from 1 to 5, found 0"),
        ("none", {"copies": 1.5}, "policy.copies"),
        ("none", {"copies": True}, "policy.copies"),
        ("none", {"min_confidence": 1.1}, "policy.min_confidence: expected a number from 0 to 1"),
        ("none", {"min_confidence": math.nan}, "policy.min_confidence"),
        ("none", {"group_wait_s": -1}, "policy.group_wait_s"),
        ("none", {"max_extra_load": "5%"}, "policy.max_extra_load"),
        ("none", {"deadline_s": 0}, "policy.deadline_s"),
        ("none", {"deadline_s": math.inf}, "policy.deadline_s"),
        ("none", {"fill_after": "p95"}, "policy.fill_after: expected a Trigger or None, found 'p95'"),
        ("none", {"default_label": -1}, "policy.default_label: expected a whole number from 0 to 1073741824, found -1"),
    ],
)
def test_a_wrong_policy_is_refused_with_the_name_of_the_field(name, changes, message):
    with pytest.raises(ConfigurationError) as refused:
        preset(name, **changes)
    assert message in str(refused.value)


def test_a_policy_cannot_be_made_wrong_by_hand_either():
    with pytest.raises(ConfigurationError, match="max_attempts"):
        Policy(max_attempts=0)


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("p95", Trigger(quantile=0.95)),
        (" p99.9 ", Trigger(quantile=0.999)),
        ("p999", Trigger(quantile=0.999)),
        ("25ms", Trigger(fixed_s=0.025)),
        (" 2s ", Trigger(fixed_s=2.0)),
        (0.2, Trigger(fixed_s=0.2)),
        ("0", Trigger(fixed_s=0.0)),
    ],
)
def test_a_trigger_is_a_quantile_or_a_duration(text, trigger):
    read = parse_trigger(text)
    assert read.fixed_s == trigger.fixed_s
    assert read.quantile == pytest.approx(trigger.quantile)


@pytest.mark.parametrize("text", ["", "p", "p0", "p100", "95p", "-5ms", "fast", "nan", "inf", "p-5", None])
def test_anything_else_is_refused_with_the_name_of_the_field(text):
    with pytest.raises(ConfigurationError, match=r"fill_after"):
        parse_trigger(text, "fill_after")


@given(st.floats(1, 99).map(lambda q: round(q, 1)))
def test_a_quantile_reads_back_as_it_is_written(percent):
    trigger = parse_trigger(f"p{percent}")
    assert parse_trigger(str(trigger)).quantile == pytest.approx(trigger.quantile)
    assert str(parse_trigger("25ms")) == "25ms"
