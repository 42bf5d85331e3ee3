"""Ranks that drift apart are told so."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.training.hook import same_weights
from evenkeel.training.hook.same_weights import digest
from training_helpers import GIANT, SHAPES, SPLIT, Model, gradients_of, in_threads

TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", [1, 7, 1 << 14, (1 << 14) + 1, 70_001])
def test_a_digest_tells_any_change(dtype: torch.dtype, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    weights = torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)
    before = digest(weights)
    assert before.dtype == torch.int32
    assert before.shape == (1,)
    assert torch.equal(digest(weights.clone()), before)
    bits = torch.view_as_real(weights).flatten() if dtype.is_complex else weights
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    for place in {0, length // 2, bits.numel() - 1}:
        for bit in {0, 8 * bits.element_size() - 2}:
            bits[place] ^= 1 << bit
            assert not torch.equal(digest(weights), before)
            bits[place] ^= 1 << bit
    assert torch.equal(digest(weights), before)
    if length > 2:
        first, last = weights[0].clone(), weights[-1].clone()
        weights[0], weights[-1] = last, first
        assert not torch.equal(digest(weights), before)


def test_a_digest_of_nothing_and_of_strided_weights() -> None:
    assert int(digest(torch.empty(0, 3))) == 0
    strided = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(digest(strided), digest(strided.contiguous()))
    assert torch.equal(digest(strided[:, 1:]), digest(strided[:, 1:].contiguous()))


def drifting(every: int | None, at: int, steps: int) -> Callable[[Collectives], object]:
    def work(ranks: Collectives) -> object:
        state = evenkeel.HookState(
            evenkeel.THC(), reducer=evenkeel.Sharded(ranks), compare_weights_every=every, start_step=3
        )
        model = Model(SHAPES)
        for step in range(steps):
            if (ranks.rank, step) == (1, at):
                model.parameters[2].data[3, 3] += 1e-6
            try:
                model.step(state, gradients_of(ranks.rank, step), SPLIT if step else GIANT)
            except ConfigurationError as error:
                return step, str(error)
        return None

    return work


def test_every_so_many_steps_ranks_whose_weights_differ_are_named_on_all() -> None:
    found = in_threads(3, drifting(4, 5, 20))
    assert len(set(found)) == 1
    step, message = found[0]
    assert step == 8
    assert message.startswith(
        "the ranks' weights have drifted apart: a parameter of shape (5, 40) differs on rank [1] from ranks [0, 2]; "
    )
    assert in_threads(2, drifting(None, 5, 20)) == [None, None]
    assert in_threads(2, drifting(50, 5, 49)) == [None, None]
    assert in_threads(2, drifting(50, 5, 52))[0][0] == 50


def test_weights_that_differ_from_the_start_are_named_in_the_first_step() -> None:
    found = in_threads(2, drifting(50, 0, 2))
    assert {step for step, _ in found} == {0}
    assert all("a parameter of shape (5, 40) differs on rank [1] from rank [0]" in message for _, message in found)


def test_large_weights_are_hashed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    whole = digest(weights)
    monkeypatch.setattr(same_weights, "_PIECE", 1 << 15)
    assert torch.equal(digest(weights), whole)
    weights[70_000] += 1e-6
    assert not torch.equal(digest(weights), whole)


def test_two_parameters_that_differ_are_counted() -> None:
    def work(ranks: Collectives) -> str:
        state = evenkeel.HookState(None, reducer=evenkeel.Sharded(ranks), compare_weights_every=1)
        model = Model(SHAPES)
        model.step(state, gradients_of(ranks.rank, 0), GIANT)
        for number in (1, 2):
            model.parameters[number].data[0] += ranks.rank
        with pytest.raises(ConfigurationError) as error:
            model.step(state, gradients_of(ranks.rank, 1), SPLIT)
        return str(error.value)

    for message in in_threads(2, work):
        assert "a parameter of shape (5, 40) differs on rank [1] from rank [0], and so do 1 more; " in message


def in_real_trainings() -> list[str]:
    rank, told = dist.get_rank(), []

    def train(state: object, ahead: bool, drift_at: int | None, **options: object) -> str:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), **options)
        ddp.register_comm_hook(state, evenkeel.comm_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
        if isinstance(state, evenkeel.PipeSGD):
            state.attach(optimizer, look_ahead=ddp if ahead else None)
        for step in range(12):
            if rank and step == drift_at:
                with torch.no_grad():
                    ddp.module[2].weight.add_(1e-6)
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))
            optimizer.zero_grad()
            try:
                ddp(inputs).square().mean().backward()
            except ConfigurationError as error:
                return str(error)
            optimizer.step()
        return "went through"

    make = lambda: evenkeel.HookState(evenkeel.THC(), compare_weights_every=3)
    for drift_at in (None, 5):
        told.append(train(make(), False, drift_at))
        told.append(train(make(), False, drift_at, static_graph=True, gradient_as_bucket_view=True))
        told += [train(evenkeel.PipeSGD(make()), ahead, drift_at) for ahead in (False, True)]
    # Not all parameters are in the first step's first bucket here.
    ddp = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 40_000), nn.Linear(40_000, 1)), find_unused_parameters=True
    )
    ddp.register_comm_hook(evenkeel.HookState(evenkeel.THC()), evenkeel.comm_hook)
    with torch.no_grad():
        ddp.module[0].weight[3, 3] += 1e-3 * rank
    with pytest.raises(ConfigurationError, match=r"parameter 0.weight of shape \(8, 8\) differs on rank \[1\]"):
        ddp(torch.randn(4, 8)).square().mean().backward()
    # Sharpness-aware minimisation moves each rank's weights by the rank's own gradient within a step.
    ddp = DistributedDataParallel(nn.Linear(8, 8))
    ddp.register_comm_hook(evenkeel.HookState(evenkeel.THC(), compare_weights_every=None), evenkeel.comm_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for _ in range(3):
        with ddp.no_sync():
            ddp(torch.randn(4, 8)).square().mean().backward()
        true = [parameter.detach().clone() for parameter in ddp.parameters()]
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter.add_(parameter.grad, alpha=0.05)
        optimizer.zero_grad()
        ddp(torch.randn(4, 8)).square().mean().backward()
        with torch.no_grad():
            for parameter, weights in zip(ddp.parameters(), true, strict=True):
                parameter.copy_(weights)
        optimizer.step()
    # A rank that has run out of inputs keeps its old weights until the others are done.
    for pipelined in (False, True):
        ddp = DistributedDataParallel(nn.Linear(8, 8))
        state = evenkeel.HookState(evenkeel.THC(), compare_weights_every=1)
        ddp.register_comm_hook(evenkeel.PipeSGD(state) if pipelined else state, evenkeel.comm_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        with ddp.join():
            for _ in range(4 + 3 * rank):
                optimizer.zero_grad()
                ddp(torch.randn(4, 8)).square().mean().backward()
                optimizer.step()
    return told


def test_two_ranks() -> None:
    one, other = local_ranks(2, in_real_trainings)
    assert one == other
    assert one[:4] == ["went through"] * 4
    for message in one[4:]:
        assert "parameter 2.weight of shape (1, 8) differs on rank [1] from rank [0]; " in message
