"""How probably a code decodes: the formulas that are known, and what is drawn lies about what is counted."""

from math import comb

import numpy as np
import pytest

from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.training.plan.decoding import alive_sets, decodability


def at_most(losses: int, devices: int, absence: float) -> float:
    return sum(comb(devices, some) * absence**some * (1 - absence) ** (devices - some) for some in range(losses + 1))


@pytest.mark.parametrize("absence", [0.0, 0.05, 0.2])
def test_mds_decodes_while_no_more_are_away_than_it_has_further_blocks(absence):
    found = decodability(linear_code("mds:extra=3", 8), absence)
    # Losing further blocks alone is never too much: all partitions are there.
    alone = sum(comb(3, some) for some in range(4))
    assert alone == 8
    assert found.probability.value == pytest.approx(at_most(3, 11, absence), abs=1e-12)
    assert found.tolerance == 3
    assert found.counted == 11
    assert 1 <= found.condition_median <= found.condition_p99 < 1e4


def test_replication_in_groups_dies_with_a_whole_group():
    found = decodability(linear_code("replication:groups=3", 9), 0.3)
    assert found.probability.value == pytest.approx((1 - 0.3**3) ** 3, abs=1e-12)
    assert found.tolerance == 2
    gradient = decodability(linear_code("gradient:groups=3", 9), 0.3)
    assert gradient.probability.value == pytest.approx(found.probability.value, abs=1e-12)


def test_what_is_drawn_lies_about_what_is_counted():
    code = linear_code("balanced:copies=2", 10)
    counted = decodability(code, 0.2)
    drawn = decodability(code, 0.2, patterns=60, draws=4000)
    assert (counted.counted, drawn.counted) == (10, 2)
    assert counted.probability.low == pytest.approx(counted.probability.high, abs=1e-9)
    assert drawn.probability.low < counted.probability.value < drawn.probability.high  # a fixed seed; 95 % of them
    assert drawn.probability.high - drawn.probability.low < 0.02


def test_without_any_copy_everybody_is_needed():
    code = linear_code("gradient:losses=1", 6)
    assert decodability(code, 0.1).probability.value == pytest.approx(at_most(1, 6, 0.1), abs=1e-12)


def test_devices_are_away_as_often_as_they_are_said_to_be():
    """Of 40,000 coins, .2 each: standard error .002."""
    alive = alive_sets(20, 0.2, 2000)
    assert alive.shape == (2000, 20)
    assert abs(np.mean(~alive) - 0.2) < 0.01
    assert alive_sets(20, 0.0, 5).all()


@pytest.mark.parametrize(("absence", "mds", "rlnc", "copies"), [(0.05, 4, 8, 2), (0.1, 7, 10, 3), (0.2, 12, 14, 4)])
def test_the_balanced_code_moves_half_to_a_third_of_what_others_move_and_needs_no_extra_device(
    absence, mds, rlnc, copies
):
    """At .99. MDS's size is the smallest by its closed form; RLNC's is the published design's, of half weight here."""
    assert at_most(mds, 20 + mds, absence) >= 0.99 > at_most(mds - 1, 20 + mds - 1, absence)
    code = linear_code(f"balanced:copies={copies}", 20)
    found = decodability(code, absence, patterns=7000, draws=6000)
    assert found.probability.value >= 0.99
    assert found.tolerance >= copies
    assert code.devices == 20
    share = len(code.transfers) / len(linear_code(f"mds:extra={mds}", 20).transfers)
    assert share <= {0.05: 0.5, 0.1: 0.45, 0.2: 1 / 3}[absence]
    half = linear_code(f"rlnc:extra={rlnc},weight=half", 20)
    assert len(code.transfers) / len(half.transfers) <= {0.05: 0.5, 0.1: 0.6, 0.2: 4 / 7}[absence]
