"""Averages that wait for nobody: nothing of a gradient is lost, only late, and all ranks get the same."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.fake import FakeReducer
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.reducers.switch import SwitchReducer
from evenkeel.training.hook.hook_state import HookState
from evenkeel.training.hook.unwaited import Unwaited, _logarithms
from malformed_states import malformed
from switch_helpers import server_address
from training_helpers import GIANT, SHAPES, SPLIT, Model, equal, gradients_of, in_threads, mean_of, nmse

CODE = THC(bits=4, block=64)


def seldom(this_round: Round, granules: int) -> Tensor:
    """Rank 1 is late in every fourth step."""
    return torch.full([granules], this_round.rank == 1 and this_round.step % 4 == 3)


def unwaiting(ranks: Collectives, losses: Any = None) -> FakeReducer:
    reducer = FakeReducer(ranks, losses)
    reducer.waits = False
    return reducer


def average(unwaited: Unwaited, vector: Tensor, code: ErrorFeedback, step: int, reducer: Any) -> Tensor:
    means, plain = unwaited.average([(0, vector)], code, [], reducer, step)
    assert not plain
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


@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize("code", [CODE, ErrorFeedback(CODE)])
def test_a_resume_goes_on_bit_for_bit_although_ranks_were_late(code: Any, saves: int) -> None:
    """What biases and norms owe, and the statistics of the step before, are in the state."""

    def work(ranks: Collectives, stop: int) -> list[list[Tensor]]:
        def fresh() -> HookState:
            return HookState(copy.deepcopy(code), reducer=unwaiting(ranks, seldom), compare_weights_every=None)

        state, model = fresh(), Model(SHAPES)
        found = [model.step(state, gradients_of(ranks.rank, step), SPLIT if step else GIANT) for step in range(stop)]
        for _ in range(saves if stop < 9 else 0):
            file = io.BytesIO()
            torch.save(state.state_dict(), file)
            file.seek(0)
            state, model = fresh(), Model(SHAPES)
            state.load_state_dict(torch.load(file, weights_only=True))
        for place, step in enumerate(range(stop, 9)):
            found.append(model.step(state, gradients_of(ranks.rank, step), SPLIT if place else GIANT))
        return found

    for stop in (1, 4, 6):  # after step 3 rank 1 owes all of its gradients
        whole = in_threads(2, lambda ranks: work(ranks, 9))
        resumed = in_threads(2, lambda ranks, at=stop: work(ranks, at))
        for one, other in zip(whole, resumed, strict=True):
            assert equal(one[stop:], other[stop:])


def saved_after(steps: int) -> dict[str, Any]:
    """The state of rank 0, and that of a rank 1 that was late."""

    def work(ranks: Collectives) -> dict[str, Any]:
        state, model = HookState(CODE, reducer=unwaiting(ranks, seldom), compare_weights_every=None), Model(SHAPES)
        for step in range(steps):
            model.step(state, gradients_of(ranks.rank, step), SPLIT if step else GIANT)
        return state.state_dict()

    return in_threads(2, work)[1]


def test_a_state_without_what_biases_owe_is_loaded_with_one_warning() -> None:
    saved = saved_after(5)
    del saved["unwaited"], saved["tensors"]
    _, ranks = thread_collectives(2)
    state = HookState(CODE, reducer=unwaiting(ranks))
    with pytest.warns(UserWarning, match="what biases and norms") as warned:
        state.load_state_dict(saved)
    (said,) = [str(each.message) for each in warned]
    assert "older version" in said
    assert state.state_dict()["code"]["memory"].keys() == saved["code"]["memory"].keys()


def test_a_malformed_state_is_refused_and_changes_nothing() -> None:
    saved = saved_after(5)
    _, ranks = thread_collectives(2)
    state = HookState(CODE, reducer=unwaiting(ranks))
    before = str(state.state_dict())
    for wrong in malformed(saved["unwaited"]):
        with pytest.raises(ConfigurationError, match="nothing of it was: "):
            state.load_state_dict(saved | {"unwaited": wrong})
        assert str(state.state_dict()) == before
    state.load_state_dict(saved)
    assert str(state.state_dict()) == str(saved)


def test_what_biases_owe_stays_with_the_rank_that_owes_it() -> None:
    saved = saved_after(5)
    owed = saved["unwaited"]["plain"]["memory"]
    assert all(bool(each.any()) for each in owed.values())
    ranks, _ = thread_collectives(2)
    state = HookState(CODE, reducer=unwaiting(ranks))
    with pytest.warns(UserWarning, match="state of rank 1 of 2 was loaded by rank 0 of 2"):
        state.load_state_dict(saved)
    loaded = state.state_dict()["unwaited"]
    assert loaded["plain"]["memory"] == {}
    assert loaded["known"].keys() == saved["unwaited"]["known"].keys()  # alike on all ranks


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_what_biases_owe_comes_through_distributed_checkpoint_or_its_loss_is_warned_of(tmp_path: Any) -> None:
    _, ranks = thread_collectives(2)

    def loaded(saved: dict[str, Any]) -> HookState:
        state = HookState(CODE, reducer=unwaiting(ranks))
        state.load_state_dict(saved)
        return state

    saved = saved_after(5)
    dcp.save({"hook": loaded(saved)}, checkpoint_id=tmp_path, no_dist=True)
    other = copy.deepcopy(saved)
    for part in (*other["unwaited"]["known"].values(), *other["unwaited"]["plain"]["memory"].values()):
        part.zero_()
    whole = loaded(other)
    dcp.load({"hook": whole}, checkpoint_id=tmp_path, no_dist=True)
    found = whole.state_dict()["unwaited"]
    for number, owed in saved["unwaited"]["plain"]["memory"].items():
        assert torch.equal(found["plain"]["memory"][number], owed)
    for number, known in saved["unwaited"]["known"].items():
        assert torch.equal(found["known"][number], known)
    fresh = HookState(CODE, reducer=unwaiting(ranks))
    with pytest.warns(UserWarning, match=r"lacks \d+ of its \d+ tensors, so error feedback starts from nothing"):
        dcp.load({"hook": fresh}, checkpoint_id=tmp_path, no_dist=True)
    assert fresh.state_dict()["unwaited"] == {}


@pytest.mark.parametrize("waits", [True, False])
def test_a_training_with_a_deadline_says_once_that_zeros_are_not_kept(
    waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def work(ranks: Collectives) -> None:
        reducer = unwaiting(ranks)
        reducer.waits = waits
        state, model = HookState(CODE, reducer=reducer), Model(SHAPES)
        for step in range(4):
            model.step(state, gradients_of(ranks.rank, step), SPLIT if step else GIANT)

    in_threads(2, work)
    said = [each.getMessage() for each in caplog.records if "deadline" in each.getMessage()]
    assert len(said) == (0 if waits else 1)
    assert all("not kept at exactly zero" in each and "skip=" in each for each in said)


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
