"""Answer codes by name: every text makes its settings again, and what there is not is answered with what there is."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.coding.answers.by_name import (
    CODES,
    BerrutSettings,
    CascadeSettings,
    CheapSettings,
    CodeSettings,
    CollageSettings,
    OwnModel,
    ParitySettings,
    ReplicateSettings,
    settings_of,
)
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard

items, spares = st.integers(1, 1024), st.integers(1, 64)
kinds = {
    "replicate": st.builds(ReplicateSettings, items, spares),
    "cheap": st.builds(CheapSettings, items),
    "cascade": st.builds(CascadeSettings, items),
    "collage": st.builds(CollageSettings, st.none() | st.integers(1, 32)),
    "parity": st.builds(ParitySettings, st.sampled_from([None, "sum", "concat"]), st.none() | items),
    "berrut": st.builds(BerrutSettings, items, spares, st.booleans()),
}
own = OwnModel("base", ScoreForm(2), "NHWC")
classifier = ModelCard("small", "classifier", "small.onnx", "0" * 64, ("no", "yes"), 8, 8)
collage = replace(classifier, name="collage3", kind="collage", height=24, width=24, grid=3, tile_side=8)
concat = replace(classifier, name="concat4", kind="parity", encoder="concat", group=4)
sums = replace(concat, name="sum2", encoder="sum", group=2, datatype="FP32")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(found=st.one_of(*kinds.values()))
def test_the_text_of_settings_makes_them_again(found: CodeSettings) -> None:
    assert settings_of(str(found)) == found


def test_every_name_is_tried_and_is_the_text_of_the_defaults() -> None:
    assert set(kinds) == set(CODES)
    for name, kind in CODES.items():
        assert settings_of(name) == kind()
        assert str(kind()) == name


@pytest.mark.parametrize(
    ("text", "card", "name", "max_items", "model"),
    [
        ("replicate", None, "replicate", 1, "base"),
        ("replicate:k=3,copies=2", None, "replicate2", 3, "base"),
        ("cheap:k=3", classifier, "cheap", 3, "small"),
        ("collage", collage, "collage3x3", 9, "collage3"),
        ("collage:grid=3", collage, "collage3x3", 9, "collage3"),
        ("parity", concat, "parity_concat4", 4, "concat4"),
        ("parity:form=concat,k=4", concat, "parity_concat4", 4, "concat4"),
        ("parity:form=sum", sums, "parity_sum2", 2, "sum2"),
        ("berrut:k=8", None, "berrut8+1", 8, "base"),
        ("berrut:k=8,spares=2,systematic=true", None, "berrut_systematic8+2", 8, "base"),
    ],
)
def test_codes_that_are_made(text: str, card: ModelCard | None, name: str, max_items: int, model: str) -> None:
    code = settings_of(text).code(own, card)
    assert (code.name, code.max_items, code.model) == (name, max_items, model)
    assert str(settings_of(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "code 'magic' is unknown; allowed are replicate, cheap, cascade, collage, parity, berrut"),
        ("cheap:items=3", "setting 'items' is unknown; allowed are k"),
        ("berrut:name=x", "setting 'name' is unknown; allowed are k, spares, systematic"),
        ("cheap:k=many", "code 'cheap:k=many': k must be a whole number, found 'many'"),
        ("cheap:k=0", "k: must be a whole number from 1 to 1024, found 0"),
        ("berrut:k=1025", "from 1 to 1024"),
        ("berrut:spares=65", "from 1 to 64"),
        ("berrut:systematic=yes", "systematic must be true or false, found 'yes'"),
        ("collage:grid=33", "from 1 to 32"),
        ("parity:form=product", "form 'product' is unknown; allowed are sum, concat"),
        ("parity:k=2,k=3", "field 'k' is given twice"),
        ("cheap:", "is not of the form"),
        ("", "is not of the form"),
        ("cheap:k=" + "1" * 10_000, "a name has at most 200 characters, found 10008"),
    ],
)
def test_what_there_is_not_is_answered_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        settings_of(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "card", "message"),
    [
        ("cheap", None, "cheap needs the card of a classifier"),
        ("collage", classifier, "collage needs the card of a collage, but small is a classifier"),
        ("replicate", classifier, "replicate runs the replicas' own model"),
        ("berrut", classifier, "berrut runs the replicas' own model"),
        ("collage:grid=2", collage, "collage3 is for grid=3, not grid=2"),
        ("parity:k=2", concat, "concat4 is for k=4, not k=2"),
        ("parity:form=sum", concat, "concat4 is for form=concat, not form=sum"),
        (
            "parity",
            replace(concat, scores="probabilities"),
            "concat4 gives sums of probabilities, but base gives logits",
        ),
    ],
)
def test_a_card_that_contradicts_is_refused(text: str, card: ModelCard | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings_of(text).code(own, card)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.sampled_from(["", *CODES]), rest=st.text(max_size=40))
def test_any_text_makes_settings_or_a_configuration_error(name: str, rest: str) -> None:
    try:
        found = settings_of(f"{name}:{rest}" if name else rest)
    except ConfigurationError:
        return
    assert settings_of(str(found)) == found
