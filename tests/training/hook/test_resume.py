"""States that are saved before a first step, loaded by other ranks, or come through torch.distributed.checkpoint."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import evenkeel
from evenkeel.coding.sum_code import SumCode
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.reducers.sharded import Sharded
from malformed_states import malformed
from training_helpers import SHAPES, Model, equal, in_threads, run

CODES = [
    lambda: evenkeel.THC(bits=4),
    lambda: evenkeel.GradiVeQ(evenkeel.THC(bits=4), sample_steps=4),
    lambda: evenkeel.LowRank(2, evenkeel.THC(bits=4, block=64)),
]
in_one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


def hook_state(ranks: Collectives, code: SumCode | None) -> evenkeel.HookState:
    return evenkeel.HookState(code, reducer=Sharded(ranks))


def pipe(ranks: Collectives, code: SumCode | None) -> evenkeel.PipeSGD:
    return evenkeel.PipeSGD(hook_state(ranks, code), warmup_steps=2)


@pytest.mark.parametrize("make", [hook_state, pipe])
@pytest.mark.parametrize("code", [*CODES, lambda: None])
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_a_state_that_is_saved_again_before_its_first_step_resumes(
    make: Callable[..., Any], code: Callable[[], SumCode | None], stop: int
) -> None:
    whole = in_threads(2, lambda ranks: run(make(ranks, code()), Model(SHAPES), ranks.rank, range(9)))

    def work(ranks: Collectives) -> list:
        state = make(ranks, code())
        run(state, Model(SHAPES), ranks.rank, range(stop))
        for _ in range(2):  # preempted before its first step, twice
            saved = state.state_dict()
            state = make(ranks, code())
            state.load_state_dict(saved)
        return run(state, Model(SHAPES), ranks.rank, range(stop, 9))

    for rank, rest in enumerate(in_threads(2, work)):
        assert equal(rest, whole[rank][stop:])


def test_a_state_of_another_model_is_refused_after_it_was_saved_again() -> None:
    def work(ranks: Collectives) -> None:
        state = hook_state(ranks, evenkeel.THC(bits=4))
        run(state, Model(SHAPES), 0, range(3))
        for _ in range(2):
            saved = state.state_dict()
            state = hook_state(ranks, evenkeel.THC(bits=4))
            state.load_state_dict(saved)
        Model([(2, 2)]).step(state, [torch.ones(2, 2)], [[0]])

    with pytest.raises(evenkeel.ConfigurationError, match="belongs to another model"):
        in_threads(1, work)


@pytest.mark.parametrize("make", [hook_state, pipe])
def test_a_new_rank_loads_any_other_rank_s_state(make: Callable[..., Any]) -> None:
    def first_part(ranks: Collectives) -> dict:
        state = make(ranks, evenkeel.THC(bits=4))
        run(state, Model(SHAPES), ranks.rank, range(5))
        return state.state_dict()

    saved = in_threads(2, first_part)

    def second_part(ranks: Collectives) -> list:
        state = make(ranks, evenkeel.THC(bits=4))
        state.load_state_dict(saved[ranks.rank % 2])
        return run(state, Model(SHAPES), ranks.rank, [5, 6])

    with pytest.warns(UserWarning, match=r"any rank's state will do for a rank that is new"):
        ranks = in_threads(3, second_part)
    assert equal(ranks[0], ranks[1])
    assert equal(ranks[0], ranks[2])


@pytest.mark.parametrize("make", [hook_state, pipe])
@pytest.mark.parametrize("code", [*CODES, lambda: None])
def test_a_malformed_state_is_refused_and_changes_nothing(
    make: Callable[..., Any], code: Callable[[], SumCode | None]
) -> None:
    (ranks,) = thread_collectives(1)
    state = make(ranks, code())
    run(state, Model(SHAPES), 0, range(4))
    saved, fresh = state.state_dict(), make(ranks, code())
    before = str(fresh.state_dict())
    for wrong in malformed(saved, frozenset({"moments", "average"})):
        with pytest.raises(evenkeel.ConfigurationError, match="state"):
            fresh.load_state_dict(wrong)
        assert str(fresh.state_dict()) == before
    fresh.load_state_dict(saved)
    assert str(fresh.state_dict()) == str(saved)


def test_a_pipe_loads_nothing_after_its_first_step() -> None:
    (ranks,) = thread_collectives(1)
    state = pipe(ranks, None)
    saved = state.state_dict()
    run(state, Model(SHAPES), 0, range(1))
    with pytest.raises(evenkeel.ConfigurationError, match="before the first step"):
        state.load_state_dict(saved)


def test_a_state_of_a_version_before_tensors_were_counted_is_loaded() -> None:
    (ranks,) = thread_collectives(1)
    state = hook_state(ranks, evenkeel.THC(bits=4))
    run(state, Model(SHAPES), 0, range(4))
    saved = state.state_dict()
    del saved["tensors"]
    fresh = hook_state(ranks, evenkeel.THC(bits=4))
    fresh.load_state_dict(saved)
    assert fresh.state_dict()["code"]["memory"].keys() == saved["code"]["memory"].keys()


@in_one_process
@pytest.mark.parametrize("code", CODES)
def test_what_distributed_checkpoint_leaves_out_is_warned_of(code: Callable[[], SumCode], tmp_path: Any) -> None:
    (ranks,) = thread_collectives(1)
    state = hook_state(ranks, code())
    run(state, Model(SHAPES), 0, range(6))
    fresh, model = hook_state(ranks, code()), Model(SHAPES)
    dcp.save({"hook": state}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.warns(UserWarning, match=r"lacks \d+ of its \d+ tensors, so error feedback starts from nothing"):
        dcp.load({"hook": fresh}, checkpoint_id=tmp_path, no_dist=True)
    assert fresh.state_dict()["step"] == 6
    assert len(run(fresh, model, 0, [6])) == 1


@in_one_process
@pytest.mark.parametrize("code", [None, evenkeel.THC(bits=4)])
def test_averages_in_flight_that_distributed_checkpoint_leaves_out_are_warned_of(
    code: SumCode | None, tmp_path: Any
) -> None:
    (ranks,) = thread_collectives(1)
    state = pipe(ranks, code)
    run(state, Model(SHAPES), 0, range(6))
    fresh, model = pipe(ranks, code), Model(SHAPES)
    dcp.save({"pipe": state}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.warns(UserWarning, match="lacks") as warned:
        dcp.load({"pipe": fresh}, checkpoint_id=tmp_path, no_dist=True)
    said = [str(each.message) for each in warned if "lacks" in str(each.message)]
    assert len(said) == (1 if code is None else 2)
    assert "lacks 2 of its 2 tensors, so the pipeline starts empty" in said[-1]
    assert fresh.state_dict()["step"] == 6
    (averages,) = run(fresh, model, 0, [6])
    assert fresh.skip_step
    assert not any(bool(average.any()) for average in averages)
    (averages,) = run(fresh, model, 0, [7])
    assert all(bool(average.any()) for average in averages)


def test_a_pipe_s_state_with_a_list_of_averages_as_in_older_files_is_loaded() -> None:
    (ranks,) = thread_collectives(1)
    state = pipe(ranks, None)
    run(state, Model(SHAPES), 0, range(6))
    saved, new, old = state.state_dict(), pipe(ranks, None), pipe(ranks, None)
    new.load_state_dict(saved)
    older = {name: value for name, value in saved.items() if name != "tensors"}
    old.load_state_dict(older | {"flights": list(saved["flights"].values())})
    assert equal(run(old, Model(SHAPES), 0, [6, 7]), run(new, Model(SHAPES), 0, [6, 7]))


@in_one_process
def test_a_state_that_has_its_tensors_comes_through_distributed_checkpoint_whole(tmp_path: Any) -> None:
    """As does one that was loaded before its first step: it has the numbers of its units both as texts and as such."""
    (ranks,) = thread_collectives(1)
    state = hook_state(ranks, evenkeel.THC(bits=4))
    run(state, Model(SHAPES), 0, range(5))
    dcp.save({"hook": state}, checkpoint_id=tmp_path, no_dist=True)
    saved = state.state_dict()
    for memory in saved["code"]["memory"].values():
        memory.zero_()
    loaded = hook_state(ranks, evenkeel.THC(bits=4))
    loaded.load_state_dict(saved)
    dcp.load({"hook": loaded}, checkpoint_id=tmp_path, no_dist=True)
    whole = hook_state(ranks, evenkeel.THC(bits=4))
    whole.load_state_dict(state.state_dict())
    assert equal(run(loaded, Model(SHAPES), 0, [5, 6]), run(whole, Model(SHAPES), 0, [5, 6]))


@in_one_process
@pytest.mark.parametrize("make", [hook_state, pipe])
def test_bytes_come_through_distributed_checkpoint_whole(make: Callable[..., Any], tmp_path: Any) -> None:
    """The recipe of frameworks.md."""
    (ranks,) = thread_collectives(1)
    state = make(ranks, evenkeel.THC(bits=4))
    run(state, Model(SHAPES), 0, range(5))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    dcp.save({"hook-0": file.getvalue()}, checkpoint_id=tmp_path, no_dist=True)
    saved = {"hook-0": b""}
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    loaded, whole = make(ranks, evenkeel.THC(bits=4)), make(ranks, evenkeel.THC(bits=4))
    loaded.load_state_dict(torch.load(io.BytesIO(saved["hook-0"]), weights_only=True))
    whole.load_state_dict(state.state_dict())
    assert equal(run(loaded, Model(SHAPES), 0, [5, 6]), run(whole, Model(SHAPES), 0, [5, 6]))
