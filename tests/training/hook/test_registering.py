"""`register` knows the model's group, and refuses what does not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.local_ranks import local_ranks


def mean_rank_of(ddp: nn.Module) -> float:
    """Gradients are the rank's own number; their average tells who took part."""
    for _ in range(4):
        ddp.zero_grad()
        (ddp(torch.ones(1, 4)).sum() * dist.get_rank()).backward()
    (gradient,) = {round(float(value), 3) for parameter in ddp.parameters() for value in parameter.grad.flatten()}
    return gradient


def halves() -> float:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    found = []
    for code in (None, evenkeel.FixedPoint(bits=16)):
        for make in (lambda state: state, lambda state: evenkeel.PipeSGD(state)):
            ddp = DistributedDataParallel(nn.Linear(4, 4), process_group=group)
            state = make(evenkeel.HookState(code, compare_weights_every=None, timeout_s=30))
            evenkeel.register(ddp, state)
            found.append(mean_rank_of(ddp))
            state.close()
    assert len(set(found)) == 1
    for make in (lambda state: state, lambda state: evenkeel.PipeSGD(state)):
        ddp = DistributedDataParallel(nn.Linear(4, 4), process_group=group)
        state = make(evenkeel.HookState(None, compare_weights_every=None))
        ddp.register_comm_hook(state, evenkeel.comm_hook)
        with pytest.raises(
            ConfigurationError, match=r"belong to ranks \[\d, \d\], but the state exchanges over \[0, 1, 2, 3\]"
        ):
            mean_rank_of(ddp)
    own = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    ddp = DistributedDataParallel(nn.Linear(4, 4), process_group=group)
    ddp.register_comm_hook(evenkeel.HookState(None, group=own), evenkeel.comm_hook)
    assert mean_rank_of(ddp) == found[0]
    with pytest.raises(ConfigurationError, match="exchanges buffers on it"):
        evenkeel.register(
            DistributedDataParallel(nn.Linear(4, 4), process_group=group), evenkeel.HookState(None, group=group)
        )
    with pytest.raises(ConfigurationError, match="other ranks than the model's"):
        evenkeel.register(DistributedDataParallel(nn.Linear(4, 4)), evenkeel.HookState(None, group=group))
    return found[0]


def test_halves_of_one_initialisation_are_averaged_each_over_its_own_ranks() -> None:
    assert local_ranks(4, halves, timeout_s=100) == [0.5, 0.5, 2.5, 2.5]


def refusals() -> bool:
    def ddp(module: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(module)

    state = evenkeel.HookState(None)
    for model, wrong, message in (
        (nn.Linear(2, 2), state, "needs a DistributedDataParallel, found Linear: wrap"),
        (ddp(nn.Linear(2, 2)), evenkeel.THC(bits=4), "needs a HookState or a PipeSGD"),
        (ddp(nn.Embedding(4, 4, sparse=True)), state, "has sparse gradients"),
        (ddp(nn.Linear(2, 2)), evenkeel.HookState(None, skip=[nn.Linear(2, 2)]), "skip lists a Linear"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            evenkeel.register(model, wrong)  # type: ignore[arg-type]
    good = ddp(nn.Linear(4, 4))
    evenkeel.register(good, state)
    assert mean_rank_of(good) == 0.5
    with pytest.raises(ConfigurationError, match="has a communication hook already"):
        evenkeel.register(good, evenkeel.HookState(None))
    with pytest.raises(ConfigurationError, match="has a model already"):
        evenkeel.register(ddp(nn.Linear(4, 4)), state)
    compiled = torch.compile(ddp(nn.Linear(4, 4)), backend="eager")
    evenkeel.register(compiled, evenkeel.HookState(None))
    assert mean_rank_of(compiled) == 0.5
    evenkeel.register(ddp(nn.Linear(4, 4, dtype=torch.complex64)), evenkeel.HookState(None))
    return True


def test_what_does_not_fit_is_refused() -> None:
    assert local_ranks(2, refusals, timeout_s=100) == [True, True]


SCRIPT = """
import os, pickle, sys, torch, torch.distributed as dist, evenkeel
def main(how):
    state = evenkeel.HookState(None) if how != "pipe dropped" else evenkeel.PipeSGD()
    if how == "made for forked ranks":
        if not os.fork():
            os._exit(0)
        os.wait()
        return state
    if how == "made for spawned ranks":
        pickle.dumps(state)
        return state
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    if how == "registered with a reducer":
        state = evenkeel.HookState(None, reducer=evenkeel.Sharded(dist.new_group()))
    if "dropped" not in how:
        evenkeel.register(ddp, state)
    if how == "run":
        ddp(torch.ones(1, 4)).sum().backward()
    if how == "dropped, with a worker":
        if not os.fork():
            os._exit(0)
        os.wait()
    if how == "dropped, but closed":
        state.close()
    dist.destroy_process_group()
    return state if how == "dropped, kept" else None
kept = main(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("how", "warned"),
    [
        ("dropped", True),
        ("dropped, kept", True),
        ("pipe dropped", True),
        ("dropped, with a worker", True),
        ("dropped, but closed", False),
        ("registered", True),
        ("registered with a reducer", True),
        ("run", False),
        ("made for forked ranks", False),
        ("made for spawned ranks", False),
    ],
)
def test_a_hook_that_never_ran_is_warned_of_at_exit(how: str, warned: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), how], capture_output=True, text=True, timeout=60, check=True
    )
    assert ("never ran" in done.stderr) == warned
