"""Models with the hook registered, and the hook's states, are copied and pickled."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.reducers.sharded import Sharded
from training_helpers import SHAPES, Model, equal, in_threads, run


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [copy.deepcopy, through_pickle, through_a_file]


def steps(ddp: nn.Module, number: int) -> Any:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(number):
        ddp.zero_grad()
        ddp(torch.randn(4, 16, generator=generator)).square().mean().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters()]


def registered(state: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)))
    ddp.register_comm_hook(state, evenkeel.comm_hook)
    return ddp


def hook_state() -> evenkeel.HookState:
    return evenkeel.HookState(evenkeel.THC(bits=4))


def pipe() -> evenkeel.PipeSGD:
    return evenkeel.PipeSGD(hook_state())


def models_are_copied() -> int:
    done = 0
    for make in (hook_state, pipe):
        for way in (copy.deepcopy, through_pickle, through_a_file):
            state = make()
            ddp = registered(state)
            steps(ddp, 4)
            copied = way(ddp)
            averaged = torch.optim.swa_utils.AveragedModel(ddp)
            averaged.update_parameters(ddp)
            ((hook, its_state),) = copied._comm_hooks
            assert hook is evenkeel.comm_hook
            assert its_state is not state
            # The copy's state goes on in a DDP of its own as the original does.
            again = DistributedDataParallel(copied.module)
            again.register_comm_hook(its_state, hook)
            expected = steps(ddp, 1)
            assert all(torch.equal(a, b) for a, b in zip(steps(again, 1), expected, strict=True))
            its_state.close()
            state.close()
            assert way(ddp) is not ddp  # a training that is over is saved too
            done += 1
    listed = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    ddp = DistributedDataParallel(listed)
    ddp.register_comm_hook(evenkeel.HookState(evenkeel.THC(bits=4), skip=[listed[0]]), evenkeel.comm_hook)
    for way in (copy.deepcopy, through_pickle):
        copied = way(ddp)
        skips = copied._comm_hooks[0][1]._skip
        assert skips(copied.module[0].weight)
        assert not skips(copied.module[1].weight)
        assert not skips(listed[0].weight)
    return done


def test_a_registered_model_is_copied_as_with_torch_s_own_hooks() -> None:
    assert local_ranks(2, models_are_copied, timeout_s=100) == [6, 6]


@pytest.mark.parametrize("way", WAYS)
def test_states_are_copied_without_a_process_group(way: Callable[[Any], Any]) -> None:
    states = (
        evenkeel.HookState(None, skip=None),
        evenkeel.HookState(evenkeel.LowRank(2, evenkeel.THC(bits=4, block=64)), start_step=7, timeout_s=9),
        evenkeel.HookState(evenkeel.GradiVeQ()),
        evenkeel.PipeSGD(warmup_steps=3),
        evenkeel.PipeSGD(),
    )
    for state in states:
        copied = way(state)
        assert type(copied) is type(state)
        assert copied is not state
    assert way(states[1])._start_step == 7
    assert way(states[3])._warmup_steps == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_where_the_original_stood(way: Callable[[Any], Any]) -> None:
    """As the copy of one that was given its reducer has none, the reducer is put in here."""

    def work(ranks: Collectives) -> bool:
        state = evenkeel.HookState(evenkeel.THC(bits=4), reducer=Sharded(ranks))
        run(state, Model(SHAPES), ranks.rank, range(5))
        whole = evenkeel.HookState(evenkeel.THC(bits=4), reducer=Sharded(ranks))
        whole.load_state_dict(state.state_dict())
        copied = way(state)
        with pytest.raises(ConfigurationError, match="a copy of one that was made with reducer="):
            run(copied, Model(SHAPES), ranks.rank, [5])
        copied._reducer, copied._lacks = Sharded(ranks), ""
        return equal(run(copied, Model(SHAPES), ranks.rank, [5, 6]), run(whole, Model(SHAPES), ranks.rank, [5, 6]))

    assert in_threads(2, work) == [True, True]


def test_a_copy_of_a_copy_lacks_its_reducer_too() -> None:
    state = evenkeel.HookState(None, reducer=Sharded(thread_collectives(1)[0]))
    with pytest.raises(ConfigurationError, match="made with reducer="):
        run(through_pickle(copy.deepcopy(state)), Model(SHAPES), 0, [0])


def test_functions_that_pickle_cannot_find_are_named() -> None:
    for state in (
        evenkeel.HookState(None, skip=lambda parameter: True),
        evenkeel.HookState(None, loss_scale=lambda: 1.0),
        evenkeel.PipeSGD(loss_scale=lambda: 1.0),
    ):
        with pytest.raises(ConfigurationError, match=r"(skip|loss_scale)=.* cannot be pickled"):
            pickle.dumps(state)
        assert type(copy.deepcopy(state)) is type(state)
