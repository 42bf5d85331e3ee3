"""Sum codes by name: every code's text makes the code again, and what there is not is answered with what there is."""

import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.by_name import CODES, code_of, text_of
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.sums.plain_thc import PlainTHC
from evenkeel.coding.sums.thc import THC
from evenkeel.errors import ConfigurationError

seeds = st.integers(0, 2**40)


@st.composite
def thc(draw: st.DrawFn) -> SumCode:
    bits = draw(st.integers(1, 6))
    return draw(st.sampled_from([THC, PlainTHC]))(
        bits,
        draw(st.none() | st.integers(2**bits - 1, 80)),
        draw(st.none() | st.floats(1e-9, 0.5)),
        draw(st.sampled_from(["correlated", "stochastic", "nearest"])),
        2 ** draw(st.integers(3, 13)),
        draw(seeds),
    )


fixed = st.builds(FixedPoint, st.integers(2, 16), st.integers(1, 999).map(lambda eighths: 8 * eighths))
plain = st.builds(Plain)
leaves = plain | fixed | thc()
low_rank = st.builds(LowRank, st.integers(1, 999), st.none() | leaves, st.floats(1, 1e30), seeds)
gradiveq = st.builds(
    GradiVeQ,
    st.none() | leaves,
    st.floats(1e-9, 0.99),
    st.floats(1, 64),
    st.integers(4, 99),
    st.integers(1, 999),
    st.none() | st.integers(65, 999),
    st.none() | st.integers(64, 999),
)
bare = leaves | low_rank | gradiveq
codes = bare | st.builds(ErrorFeedback, bare)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(code=codes)
def test_the_text_of_a_code_makes_the_code_again(code: SumCode) -> None:
    text = text_of(code)
    assert repr(code_of(text)) == repr(code)
    assert text_of(code_of(text)) == text


def test_every_name_has_a_code_whose_text_it_is() -> None:
    for name in CODES:
        text = "ef+thc" if name == "ef" else name
        assert text_of(code_of(text)) == text


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("thc", THC()),
        ("thc:bits=2", THC(bits=2)),
        ("thc:bits=2,granularity=20", THC(bits=2, granularity=20)),
        ("thc:p=0.03125,rounding=nearest", THC(p=1 / 32, rounding="nearest")),
        ("fp32", Plain()),
        ("fixed:bits=4", FixedPoint(bits=4)),
        ("lowrank:rank=4", LowRank(4)),
        ("lowrank+thc:block=512", LowRank(16, THC(block=512))),
        ("ef+lowrank:rank=1+thc:bits=2", ErrorFeedback(LowRank(1, THC(bits=2)))),
        ("gradiveq:ratio=2.0+thc", GradiVeQ(THC(), ratio=2)),
    ],
)
def test_texts_are_short_and_say_what_is_not_the_default(text: str, code: SumCode) -> None:
    assert repr(code_of(text)) == repr(code)
    assert text_of(code) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("thc:p=1/32", "thc:p=0.03125"),
        (" thc : bits = 2 ", "thc:bits=2"),
        ("lowrank:rank=16 + thc:bits=4", "lowrank+thc"),
        ("gradiveq+fp32", "gradiveq"),
        ("thc:bits=4,granularity=17", "thc"),
    ],
)
def test_other_ways_to_write_the_same(text: str, same: str) -> None:
    assert text_of(code_of(text)) == same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "code 'zip' is unknown; allowed are fp32, fixed, thc, plain-thc, lowrank, gradiveq, ef"),
        ("thc+fp32", "thc takes no code inside; put it behind, as in lowrank+thc"),
        ("lowrank+zip", "code 'zip' is unknown"),
        ("thc:bit=4", "setting 'bit' is unknown; allowed are bits, granularity, p, rounding, block, seed"),
        ("lowrank:inner=thc", "setting 'inner' is unknown; allowed are rank, min_ratio, seed"),
        ("fp32:bits=4", "setting 'bits' is unknown; allowed are none"),
        ("thc:bits=9", "code 'thc:bits=9': bits: must be a whole number from 1 to 8, found 9"),
        ("thc:bits=four", "bits must be a whole number, found 'four'"),
        ("thc:p=1/0", "p: must be a number such as 0.03 or 1/32, found '1/0'"),
        ("thc:rounding=up", "rounding: must be one of correlated, stochastic, nearest, found 'up'"),
        ("thc:bits=2,bits=3", "'bits' is given twice"),
        ("thc:", "is not of the form name:field=value"),
        ("", "is not of the form name:field=value"),
        ("lowrank+", "is not of the form name:field=value"),
        ("ef", "say what code is inside ef, as in ef+thc"),
        ("ef+ef+thc", "wrap once"),
        ("lowrank+ef+thc", "inner: must be a code without memory"),
        ("ef+" * 5000 + "thc", "wrap once"),
    ],
)
def test_what_there_is_not_is_answered_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        code_of(text)
    assert message in str(caught.value)


def test_a_code_of_a_kind_without_a_name_is_refused() -> None:
    class Mine(Plain):
        pass

    with pytest.raises(ConfigurationError, match="has no name; codes with a name are fp32, fixed"):
        text_of(Mine())
