"""Averages that wait for nobody: nothing of a gradient is lost, only late, and all ranks get the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round
from evenkeel.reducers.fake import FakeReducer
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.switch import SwitchReducer
from evenkeel.training.hook.hook_state import HookState
from evenkeel.training.hook.unwaited import Unwaited, _logarithms
from switch_helpers import server_address
from training_helpers import GIANT, SHAPES, SPLIT, Model, gradients_of, in_threads, mean_of, nmse

CODE = THC(bits=4, block=64)


def seldom(this_round: Round, granules: int) -> Tensor:
    """Rank 1 is late in every fourth step."""
    return torch.full([granules], this_round.rank == 1 and this_round.step % 4 == 3)


def unwaiting(ranks: Collectives, losses: Any = None) -> FakeReducer:
    reducer = FakeReducer(ranks, losses)
    reducer.waits = False
    return reducer


def average(unwaited: Unwaited, vector: Tensor, code: ErrorFeedback, step: int, reducer: Any) -> Tensor:
    means, plain = unwaited.average([(0, vector)], code, None, reducer, step)
    assert plain is None
    return means[0]


def test_averages_are_near_and_alike_on_all_ranks() -> None:
    def work(ranks: Collectives) -> list[list[Tensor]]:
        state, model = HookState(CODE, reducer=unwaiting(ranks)), Model(SHAPES)
        return [model.step(state, gradients_of(ranks.rank, step), SPLIT) for step in range(12)]

    done = in_threads(3, work)
    for step in range(12):
        for other in done[1:]:
            assert all(torch.equal(a, b) for a, b in zip(done[0][step], other[step], strict=True))
    true = [torch.stack([mean_of(3, step)[part] for step in range(12)]).sum(0) for part in range(len(SHAPES))]
    found = [torch.stack([done[0][step][part] for step in range(12)]).sum(0) for part in range(len(SHAPES))]
    assert nmse(found, true) < 0.02  # what a step lacks comes with the next


def test_a_resumed_training_goes_on_when_its_buckets_are_rebuilt() -> None:
    """Its first step is compressed, in one bucket, and the biases of the later ones have other lengths."""

    def work(ranks: Collectives) -> list[list[Tensor]]:
        saved = None
        for steps in (range(5), range(5, 9)):
            state, model = HookState(CODE, reducer=unwaiting(ranks)), Model(SHAPES)
            if saved is not None:
                state.load_state_dict(saved)
            found = [
                model.step(state, gradients_of(ranks.rank, step), SPLIT if place else GIANT)
                for place, step in enumerate(steps)
            ]
            saved = state.state_dict()
        return found

    one, other = in_threads(2, work)
    for step, (averages, same) in enumerate(zip(one, other, strict=True), start=5):
        assert all(torch.equal(a, b) for a, b in zip(averages, same, strict=True))
        true = mean_of(2, step)
        assert nmse([averages[1], averages[3]], [true[1], true[3]]) < 0.02  # which statistics of the step before clip


def test_only_the_first_coded_round_waits_for_statistics() -> None:
    def work(ranks: Collectives) -> int:
        unwaited, code, reducer = Unwaited(), ErrorFeedback(CODE), unwaiting(ranks)
        asked = 0
        largest = ranks.largest

        def counted(values: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return largest(values)

        ranks.largest = counted  # type: ignore[method-assign]
        for step in range(5):
            vector = torch.randn(300, generator=torch.Generator().manual_seed(step + 10 * ranks.rank))
            average(unwaited, vector, code, step, reducer)
        return asked

    assert in_threads(3, work) == [1, 1, 1]


def test_what_was_late_comes_with_a_later_step() -> None:
    steps, length = 40, 256

    def work(ranks: Collectives) -> tuple[Tensor, Tensor, Tensor]:
        unwaited, code, reducer = Unwaited(), ErrorFeedback(CODE), unwaiting(ranks, seldom)
        given = got = torch.zeros(length)
        common = torch.linspace(-1, 1, length)
        for step in range(steps):
            vector = common + 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(step + 99 * ranks.rank))
            given = given + vector
            got = got + average(unwaited, vector, code, step, reducer)
        owed = code.memory(0)
        assert owed is not None
        return given, got, owed

    done = in_threads(3, work)
    true = torch.stack([given for given, _, _ in done]).mean(0)
    got = done[0][1]
    assert float((got - true).norm() / true.norm()) < 0.1
    assert all(float(owed.norm()) < 3 * float(true.norm()) / steps * 4 for _, _, owed in done)


def test_a_gradient_that_is_not_finite_poisons_the_round_and_nothing_else() -> None:
    def work(ranks: Collectives) -> list[Tensor]:
        unwaited, code, reducer = Unwaited(), ErrorFeedback(CODE), unwaiting(ranks)
        found = []
        for step in range(6):
            vector = torch.ones(100)
            if step in (0, 3) and ranks.rank == 1:
                vector[7] = torch.inf if step else torch.nan
            found.append(average(unwaited, vector, code, step, reducer))
        return found

    for found in in_threads(3, work):
        assert [bool(each.isfinite().all()) for each in found] == [False, True, True, False, True, True]
        assert float((found[5] - 1).abs().max()) < 0.6


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 3.7, 1e30])
def test_statistics_survive_their_way(value: float) -> None:
    def work(ranks: Collectives) -> float:
        unwaited, reducer = Unwaited(), unwaiting(ranks)
        code = ErrorFeedback(THC(bits=8, block=64))
        vector = torch.full([64], value)
        for step in range(3):
            mean = average(unwaited, vector, code, step, reducer)
        return float((mean - value).abs().max())

    assert all(off <= 0.2 * value for off in in_threads(2, work))
    assert int(_logarithms(torch.tensor([value]))[0]) == (0 if value == 0 else _logarithms(torch.tensor([value])))


def test_a_training_goes_on_without_a_late_rank() -> None:
    """Over a real server; rank 2 is so late that all its parts are left out, until it has caught up."""
    import threading

    turn = threading.Barrier(3)

    def work(ranks: Collectives) -> tuple[list[list[Tensor]], int]:
        reducer = SwitchReducer(server_address(), ranks, timeout_s=30, deadline=0.05)
        state = HookState(CODE, reducer=reducer, compare_weights_every=None)
        model, found = Model(SHAPES), []
        for step in range(10):
            if step == 5:
                turn.wait()
            if step == 5 and ranks.rank == 2:
                turn.wait()  # until the others have ended step 7
            found.append(model.step(state, gradients_of(ranks.rank, step), SPLIT))
            if step == 7 and ranks.rank != 2:
                turn.wait()
        left_out = reducer.stats().left_out
        assert reducer.fell_back == 0
        turn.wait()
        state.close()
        return found, left_out

    done = in_threads(3, work)
    for step in range(10):
        for other, _ in done[1:]:
            assert all(torch.equal(a, b) for a, b in zip(done[0][0][step], other[step], strict=True))
    assert done[0][1] == done[1][1] == 0
    assert done[2][1] > 0
