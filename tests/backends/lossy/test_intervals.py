"""Any subset of an image's intervals gives an image; what is there is as if nothing were missing."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.lossy.conceal import conceal
from evenkeel.backends.lossy.intervals import JpegForm, cut_intervals
from evenkeel.errors import ConfigurationError, UnreadableImageError
from lossy_helpers import picture

SIZES = [(32, 32), (20, 45), (8, 100), (64, 9)]


@given(
    size=st.sampled_from(SIZES),
    subsampling=st.sampled_from([0, 2]),
    blocks=st.integers(1, 5),
    quality=st.sampled_from([40, 75, 95]),
    chance=st.randoms(use_true_random=False),
)
def test_what_arrives_is_decoded_as_in_the_whole_image(size, subsampling, blocks, quality, chance):
    height, width = size
    form = JpegForm(width, height, quality, subsampling, blocks)
    intervals = form.encode(picture(3, height, width))
    assert len(intervals) == form.count
    whole, everything = form.decode(intervals)
    assert everything.all()
    here = [one if chance.random() < 0.5 else None for one in intervals]
    pixels, known = form.decode(here)
    assert pixels.shape == (height, width, 3)
    assert known.shape == (form.rows, form.columns)
    np.testing.assert_array_equal(known.ravel(), np.repeat([x is not None for x in here], blocks)[: known.size])
    if subsampling == 0:
        mask = np.kron(known, np.ones((form.side, form.side), bool))[:height, :width]
        np.testing.assert_array_equal(pixels[mask], whole[mask])


@given(st.lists(st.one_of(st.none(), st.binary(max_size=60)), min_size=16, max_size=16), st.integers(0, 15))
def test_garbage_is_no_exception_and_spoils_nothing_beside_it(pieces, kept):
    form = JpegForm(32, 32)
    intervals = form.encode(picture(1, 32, 32))
    whole, _ = form.decode(intervals)
    pieces[kept] = intervals[kept]
    pixels, known = form.decode(pieces)
    assert known.ravel()[kept]
    row, column = divmod(kept, 4)
    block = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
    np.testing.assert_array_equal(pixels[block], whole[block])


def test_colours_at_half_resolution_are_close_too():
    image = picture(5, 64, 64)
    form = JpegForm(64, 64, 90, 2)
    assert np.abs(form.decode(form.encode(image))[0].astype(int) - image).mean() < 12


def test_a_marker_inside_an_interval_makes_it_missing():
    form = JpegForm(32, 32)
    intervals: list[bytes | None] = list(form.encode(picture(1, 32, 32)))
    intervals[5] = b"\xff\xd9"
    intervals[6] = b"\x00\xff"
    _, known = form.decode(intervals)
    assert np.flatnonzero(~known.ravel()).tolist() == [5, 6]


@given(st.binary(max_size=300), st.integers(0, 700))
def test_cutting_refuses_what_is_damaged(garbage, place):
    form = JpegForm(32, 32)
    data = form._written(picture(1, 32, 32))
    for damaged in (garbage, data[:place] + garbage + data[place + len(garbage) :], data[:place]):
        try:
            head, intervals = cut_intervals(damaged)
        except UnreadableImageError:
            continue
        assert head + b"".join(intervals)  # still cut into something


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 0}, "pixels a side"),
        ({"quality": 0}, "quality"),
        ({"subsampling": 1}, "subsampling"),
        ({"blocks": 0}, "blocks"),
        ({"width": 4096, "height": 4096}, "restart intervals"),
    ],
)
def test_forms_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ConfigurationError, match=said):
        JpegForm(**{"width": 32, "height": 32, **given})


def test_an_image_of_another_size_is_refused():
    with pytest.raises(UnreadableImageError, match=r"expected UINT8 \[32, 32, 3\]"):
        JpegForm(32, 32).encode(picture(0, 32, 40))


def test_forms_that_code_otherwise_have_other_digests():
    forms = [
        JpegForm(32, 32),
        JpegForm(32, 40),
        JpegForm(32, 32, 76),
        JpegForm(32, 32, 75, 2),
        JpegForm(32, 32, 75, 0, 2),
    ]
    assert len({form.digest for form in forms}) == len(forms)


def test_a_hole_in_a_slope_is_filled_with_the_slope():
    ramp = np.repeat(np.arange(0, 128, 2, dtype=np.uint8)[None, :, None], 24, 0).repeat(3, 2)
    known = np.ones((3, 8), bool)
    known[:, 4] = False  # a column: only left and right are known
    spoiled = ramp.copy()
    spoiled[:, 32:40] = 0
    conceal(spoiled, known, 8)
    np.testing.assert_allclose(spoiled.astype(int), ramp, atol=1)


@given(
    st.sampled_from(SIZES),
    st.sampled_from([8, 16]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_concealing_leaves_known_pixels_alone_and_stays_in_their_range(size, side, share, seed):
    height, width = size
    chance = np.random.default_rng(seed)
    known = chance.random((-(-height // side), -(-width // side))) < share
    pixels = picture(seed, height, width)
    before = pixels.copy()
    conceal(pixels, known, side)
    mask = np.kron(known, np.ones((side, side), bool))[:height, :width]
    np.testing.assert_array_equal(pixels[mask], before[mask])
    if known.any():
        assert pixels[~mask].size == 0 or pixels[~mask].max() <= before[mask].max()
        assert pixels[~mask].size == 0 or pixels[~mask].min() >= before[mask].min()
