"""A code's cost on a group: bytes as it packs them, times as the hook's own rounds take, waiting kept apart."""

import pytest
import torch

from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round
from evenkeel.reducers.sharded import Sharded
from evenkeel.training.plan.code_costs import thc
from evenkeel.training.plan.measure_code import measure_code
from evenkeel.training.plan.timing import CodeCost, NetworkLink, comm_s
from training_helpers import in_threads

COUNT, WORLD = 100_000, 4


def measured(link: NetworkLink) -> list[CodeCost]:
    torch.set_num_threads(1)
    return in_threads(
        WORLD,
        lambda ranks: measure_code(ErrorFeedback(THC(bits=4)), COUNT, link, reducer=Sharded(ranks), name="mine"),
    )


def test_all_ranks_find_the_same_and_bytes_are_as_packed() -> None:
    ranks = measured(NetworkLink(0.0, 0.0))
    assert all(found == ranks[0] for found in ranks)
    found, code, this_round = ranks[0], THC(bits=4), Round(rank=0, world=WORLD)
    lanes, norms = (
        code.lanes(COUNT, this_round),
        4 * (-(-COUNT // 4096) + 1),
    )  # a row of error feedback's own goes with them
    assert found.name == "mine"
    assert found.up_bytes == lanes * 4 / 8 + norms
    assert found.down_bytes == lanes * code.wire(WORLD).down_width / 8 + norms
    assert found.collectives == 2
    # As the formulas have it for offline use, but for the padding of the last block.
    assert found.sent_bytes(WORLD) == pytest.approx(thc(COUNT, WORLD).sent_bytes(WORLD), rel=0.05)
    assert 0 < found.encode_s < 5
    assert 0 < found.decode_s < 5


def test_what_exchanges_take_beyond_the_formula_is_added_to_it() -> None:
    free = measured(NetworkLink(0.0, 0.0))[0]
    assert 0 < free.excess_s < 5
    assert comm_s(NetworkLink(0.0, 0.0), WORLD, free) == free.excess_s
    slow = measured(NetworkLink(100.0, 0.0))[0]  # of which threads need nothing: no excess is less than none
    assert slow.excess_s == 0
