"""Codes over the real numbers: the gradient they give is the uncoded one, and what they cannot tell is named."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.coding.answers.linear import GradientCode, LinearCode, PartitionCode
from evenkeel.coding.answers.linear_codes import LINEAR_CODES, linear_code, rlnc, small_losses
from evenkeel.errors import CodeError, ConfigurationError, UndecodableError

PARTITION_CODES = [
    "mds:extra=3",
    "mds:own=4",
    "rlnc:extra=5",
    "rlnc:own=8,weight=half",
    "balanced:copies=2",
    "balanced:copies=3,extra=5",
    "replication:copies=2",
    "replication:groups=3",
]
GRADIENT_CODES = ["gradient:losses=2", "gradient:groups=3"]
DEVICES = 8


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def losses_that_decode(code: LinearCode, most: int) -> list[tuple[int, ...]]:
    alive = ~small_losses(code.devices, most, code.partitions)
    return [tuple(np.flatnonzero(row)) for row in alive[code.decodes(alive)]]


def gradients(code: PartitionCode, devices: tuple[int, ...], dtype) -> float:
    """Error of a logistic regression's gradient from these devices, relative to the uncoded one."""
    random = np.random.default_rng(len(devices))
    data = random.standard_normal((code.partitions, 30, 12))
    labels = random.integers(0, 2, (code.partitions, 30))
    weights = random.standard_normal(12)
    plain = sum(x.T @ (sigmoid(x @ weights) - y) for x, y in zip(data, labels, strict=True))
    coded = np.tensordot(code.rows, data, axes=1).astype(dtype)
    decoder = code.decoder(code.blocks_of(devices))
    products = decoder.values([coded[block] @ weights.astype(dtype) for block in decoder.blocks])
    shares = decoder.shares(sigmoid(products) - labels).astype(dtype)
    replies = [coded[block].T @ share for block, share in zip(decoder.blocks, shares, strict=True)]
    return float(np.linalg.norm(np.sum(replies, axis=0, dtype=np.float64) - plain) / np.linalg.norm(plain))


@pytest.mark.parametrize("text", PARTITION_CODES)
@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_the_coded_gradient_is_the_uncoded_one(text, dtype, error):
    code = linear_code(text, DEVICES)
    assert isinstance(code, PartitionCode)
    patterns = losses_that_decode(code, 3)
    assert len(patterns) > 20
    for devices in patterns:
        condition = code.condition(code.blocks_of(devices))
        # Of float32's seven digits, a condition of 100 leaves five.
        if dtype == np.float64 or condition <= 100:
            assert gradients(code, devices, dtype) < error, (devices, condition)


@pytest.mark.parametrize("text", GRADIENT_CODES)
def test_gradient_coding_gives_the_sum(text):
    code = linear_code(text, DEVICES)
    assert isinstance(code, GradientCode)
    own = np.random.default_rng(0).standard_normal((DEVICES, 12))
    patterns = losses_that_decode(code, 2)
    assert len(patterns) == DEVICES + DEVICES * (DEVICES - 1) // 2 - (1 if text.endswith("groups=3") else 0)
    for devices in patterns:
        decoder = code.decoder(devices)
        np.testing.assert_allclose(decoder.values(code.rows[list(devices)] @ own)[0], own.sum(axis=0), rtol=1e-9)


@pytest.mark.parametrize("text", [*PARTITION_CODES, *GRADIENT_CODES])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_many_sets_at_once_are_judged_as_one_by_one(text, data):
    code = linear_code(text, DEVICES)
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=code.devices, max_size=code.devices)))
    alone = code.condition(code.blocks_of(np.flatnonzero(alive).tolist()))
    together = code.conditions(alive[None])[0]
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_mds_survives_any_loss_of_as_many_as_its_further_blocks():
    code = linear_code("mds:extra=3", 6)
    for lost in combinations(range(9), 3):
        assert code.condition(set(range(9)) - set(lost)) < 1e3
    with pytest.raises(UndecodableError) as error:
        code.decoder(range(4, 9))
    assert error.value.missing == (0, 1, 2, 3)
    assert "partitions 0, 1, 2, 3" in str(error.value)


def test_what_cannot_be_told_is_named_and_the_rest_is_told():
    code = PartitionCode([[1.0, 2.0, 0, 0], [0, 0, 1.0, 0]], [4, 5])
    assert code.missing({1, 3, 5}) == (0,)
    decoder = code.decoder({3, 4, 5}, partial=True)
    assert decoder.missing == (0, 1)
    told = decoder.values([30.0, np.inf, 7.0])  # what is in sums that tell nothing spoils nothing
    np.testing.assert_array_equal(told, [0, 0, 7, 30])
    assert decoder.used == (3, 5)


def test_badly_conditioned_sums_tell_nothing():
    parity = [[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-7, 0.0]]
    assert PartitionCode(parity, [3, 4]).missing({2, 3, 4}) == (0, 1)
    assert PartitionCode(parity, [3, 4], max_condition=1e9).missing({2, 3, 4}) == ()


def test_a_decoder_is_computed_once():
    code = linear_code("balanced:copies=2", 8)
    assert code.decoder([0, 1, 2, 9, 4, 5, 6, 7, 3]) is code.decoder([*range(8), 9])
    with pytest.raises(CodeError, match="tasks 0 to 15"):
        code.decoder([16])
    with pytest.raises(CodeError, match="expected 8 rows"):
        code.decoder(range(8)).values(np.zeros(7))


def test_few_sums_are_enough_and_slack_conditions_better():
    code = linear_code("mds:extra=8", 8)
    there = [0, 2, 3, 5, 6, *range(8, 16)]
    few, more = code.choose(there, slack=0), code.choose(there, slack=2)
    assert set(there[:5]) < set(few) < set(more) <= set(there)
    assert (len(few), len(more)) == (8, 10)
    assert (
        code.condition(more)
        < code.condition(few)
        < 4 * min(code.condition([*there[:5], *three]) for three in combinations(range(8, 16), 3))
    )
    assert code.choose(range(8)) == tuple(range(8))


@pytest.mark.parametrize("sizes", [None, [1, 1, 5, 1, 2, 9, 1, 3, 1, 1]])
def test_the_balanced_code_is_balanced(sizes):
    code = linear_code("balanced:copies=3", 10, sizes=sizes)
    heavy = np.array(sizes or [1] * 10)
    loads = (code.parity != 0) @ heavy
    assert ((code.parity != 0).sum(axis=0) == 3).all()
    assert not np.diag(code.parity).any()
    assert loads.max() - loads.min() <= 2 * heavy.max()  # the last ones may not go to their own device
    assert ((np.abs(code.parity[code.parity != 0]) >= 0.5) & (np.abs(code.parity[code.parity != 0]) <= 1.5)).all()
    assert code.devices == 10


def test_transfers_are_of_what_is_not_there_yet():
    assert len(linear_code("mds:extra=7", 20).transfers) == 140
    assert len(linear_code("mds:own=7", 20).transfers) == 7 * 19  # their own partition need not travel
    assert len(linear_code("balanced:copies=3", 20).transfers) == 60
    assert len(linear_code("replication:groups=5", 20).transfers) == 60
    assert len(linear_code("gradient:losses=3", 20).transfers) == 60
    assert len(linear_code("rlnc:extra=10,weight=half", 20).transfers) == 100
    assert {(each.source, each.partition) for each in linear_code("balanced:copies=3", 20).transfers} == {
        (partition, partition) for partition in range(20)
    }
    # One device that keeps two sums with one partition in both receives it once.
    assert len(PartitionCode([[1, 1], [1, -1]], [2, 2]).transfers) == 2


def test_rlnc_moves_half_of_what_mds_moves_in_the_mean():
    """Of 1,000 draws of 160 coins: standard error .0013, so that .01 is more than seven of them."""
    moved = [len(rlnc(20, extra=8, seed=seed).transfers) / 160 for seed in range(1000)]
    assert abs(np.mean(moved) - 0.5) < 0.01
    outside = np.mean(np.abs(np.array(moved) - 0.5) > 0.015)
    assert 0.5 < outside < 0.9  # a single draw is often not within 3 % of half
    assert {len(rlnc(20, extra=8, half=True, seed=seed).transfers) for seed in range(20)} == {80}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope:x=1", "code 'nope' is unknown; allowed are mds, rlnc, balanced, replication, gradient"),
        ("mds", "say on how many devices"),
        ("mds:own=9", "mds: own: must be a whole number from 0 to 8"),
        ("mds:extra=-1", "mds: extra: must be"),
        ("mds:copies=2", "field 'copies' is unknown; allowed are extra, own, seed"),
        ("rlnc:extra=2,weight=third", "weight 'third' is unknown; allowed are half, random"),
        ("balanced:extra=3", "field 'copies' is missing"),
        ("balanced:copies=8", "copies: must be a whole number from 1 to 7"),
        ("balanced:copies=4,extra=3", "copies: must be a whole number from 1 to 3"),
        ("replication", "say either copies or groups"),
        ("replication:groups=9", "groups: must be a whole number from 1 to 8"),
        ("gradient:losses=8", "losses: must be a whole number from 1 to 7"),
        ("gradient:losses=1,groups=1", "say either losses or groups"),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        linear_code(text, DEVICES)


def test_one_device_needs_no_code_but_may_have_one():
    assert linear_code("mds:extra=1", 1).condition([1]) < 1e3
    for name in ("balanced:copies=1", "replication:copies=1", "gradient:losses=1"):
        with pytest.raises(ConfigurationError):
            linear_code(name, 1)
    assert set(LINEAR_CODES) == {"mds", "rlnc", "balanced", "replication", "gradient"}


def test_sizes_and_rows_that_do_not_fit_are_refused():
    for sizes in ([1, 2], [1] * 7 + [np.nan], [1] * 7 + [-1]):
        with pytest.raises(ConfigurationError, match="sizes: must be 8 numbers"):
            linear_code("balanced:copies=2", DEVICES, sizes=sizes)
    with pytest.raises(ConfigurationError, match="as many holders"):
        PartitionCode([[1, 1]], [2, 3])
    with pytest.raises(ConfigurationError, match="finite numbers"):
        PartitionCode([[1, np.nan]], [2])
    with pytest.raises(ConfigurationError, match="must be a table"):
        PartitionCode([1, 2], [2])
    with pytest.raises(ConfigurationError, match="max-condition"):
        PartitionCode([[1, 1]], [2], max_condition=0.5)
