"""Pipe-SGD that looks ahead, in real DDP trainings over Gloo."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.local_ranks import local_ranks

WARMUP, STEPS = 3, 12
OPTIMIZERS = {
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda weights: torch.optim.AdamW(weights, lr=0.01),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.0), nn.Linear(20, 3))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(8, 6, generator=generator)
    return nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))


def piped(kind: str = "momentum", **options: Any) -> tuple[Any, Any, Any, Any]:
    pipe = evenkeel.PipeSGD(warmup_steps=WARMUP)
    ddp = DistributedDataParallel(network(), bucket_cap_mb=0.0002, **options)
    ddp.register_comm_hook(pipe, evenkeel.comm_hook)
    optimizer = OPTIMIZERS[kind](ddp.parameters())
    return pipe, ddp, optimizer, pipe.attach(optimizer, look_ahead=ddp)


def train(ddp: Any, optimizer: Any, first: int, last: int, most: float = torch.inf, same: bool = False) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(ddp, step, 0 if same else dist.get_rank()).backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), most)
        check_alike(ddp)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def check_alike(model: nn.Module) -> None:
    """From the end of a backward pass on the weights are the true ones, the same on all ranks."""
    theirs = weights(model)
    dist.broadcast(theirs, 0)
    assert torch.equal(weights(model), theirs)


def plain_loop(kind: str, most: float) -> Tensor:
    """What looking ahead does, without hooks: trial steps are taken by copies of the model and its optimizer."""
    model, rank, world = network(), dist.get_rank(), dist.get_world_size()
    optimizer = OPTIMIZERS[kind](model.parameters())
    waiting: list[list[Tensor]] = []
    own, scale = None, None

    def apply(averages: list[Tensor]) -> float:
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.grad = average.clone()
        given = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        return min(1.0, most / float(given))

    for step in range(STEPS):
        trial, trial_optimizer = copy.deepcopy((model, optimizer))
        if own is not None and scale is not None:
            for parameter, gradient in zip(trial.parameters(), own, strict=True):
                parameter.grad = gradient * scale
            trial_optimizer.step()
            trial_optimizer.zero_grad()
        found = torch.autograd.grad(loss_of(trial, step, rank), list(trial.parameters()))
        own = [gradient.clone() for gradient in found] if step >= WARMUP else None
        averages = [gradient.clone() for gradient in found]
        for average in averages:
            dist.all_reduce(average)
            average /= world
        waiting.append(averages)
        if step != WARMUP:
            applied_over_given = apply(waiting.pop(0))
            scale = applied_over_given if step > WARMUP else None
    apply(waiting.pop(0))
    return weights(model)


def like_a_plain_loop() -> None:
    for kind in OPTIMIZERS:
        for most in (torch.inf, 0.2):
            expected = plain_loop(kind, most)
            for bucket_view in (False, True):
                pipe, ddp, optimizer, _ = piped(kind, gradient_as_bucket_view=bucket_view)
                train(ddp, optimizer, 0, STEPS, most)
                assert pipe.flush()
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), most)
                optimizer.step()
                assert torch.allclose(weights(ddp), expected, atol=1e-5), (kind, most, bucket_view)


def like_no_pipeline_where_ranks_agree() -> None:
    """A rank's own gradient is the average then: from the second piped step on nothing is stale.

    Two steps find no weights to look ahead to, the second of which applies the first one's average, so that the
    gradients of both are of the same weights. Training goes on as without a pipeline from the average of the third.
    """
    pipe, ddp, optimizer, _ = piped()
    train(ddp, optimizer, 0, STEPS, same=True)
    assert pipe.flush()
    optimizer.step()
    model = network()
    plain = OPTIMIZERS["momentum"](model.parameters())
    before = model
    for step in range(STEPS):
        seen, before = before if step == WARMUP + 1 else model, copy.deepcopy(model)
        gradients = torch.autograd.grad(loss_of(seen, step, 0), list(seen.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step()
    assert torch.allclose(weights(ddp), weights(model), atol=1e-5)


def stop_and_resume() -> None:
    for stop in (WARMUP, WARMUP + 1, WARMUP + 2, WARMUP + 5):
        pipe, ddp, optimizer, _ = piped("adam")
        train(ddp, optimizer, 0, stop)
        file = io.BytesIO()
        states = {"pipe": pipe.state_dict(), "model": ddp.module.state_dict(), "adam": optimizer.state_dict()}
        torch.save(states, file)
        train(ddp, optimizer, stop, STEPS)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        pipe, again, optimizer, _ = piped("adam")
        again.module.load_state_dict(states["model"])
        optimizer.load_state_dict(states["adam"])
        pipe.load_state_dict(states["pipe"])
        train(again, optimizer, stop, STEPS)
        assert torch.equal(weights(ddp), weights(again)), stop


def only_passes_in_training_are_ahead() -> None:
    pipe, ddp, optimizer, handle = piped()
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(len(stepped)))
    train(ddp, optimizer, 0, STEPS)
    assert len(stepped) == STEPS  # trial steps are no steps to others
    true, momentum = weights(ddp), copy.deepcopy(optimizer.state_dict())
    with ddp.no_sync():
        loss_of(ddp.eval(), STEPS, dist.get_rank())
    ddp.train()
    with torch.no_grad():
        loss_of(ddp, STEPS, dist.get_rank())
    assert torch.equal(weights(ddp), true)
    optimizer.zero_grad()
    with ddp.no_sync():
        loss_of(ddp, STEPS, dist.get_rank()).backward()
    ahead = weights(ddp)
    assert not torch.equal(ahead, true)
    held = [parameter.grad.clone() for parameter in ddp.parameters()]
    loss = loss_of(ddp, STEPS + 1, dist.get_rank())
    assert torch.equal(weights(ddp), ahead)  # the second pass of a step sees what the first has seen
    assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(ddp.parameters(), held, strict=True))
    with pytest.raises(ConfigurationError, match="while the weights are a step ahead: call it between two steps"):
        pipe.state_dict()
    loss.backward()
    assert torch.equal(weights(ddp), true)
    again = optimizer.state_dict()
    assert all(
        torch.equal(values["momentum_buffer"], again["state"][place]["momentum_buffer"])
        for place, values in momentum["state"].items()
    )
    handle.remove()
    loss_of(ddp, STEPS, dist.get_rank())
    assert torch.equal(weights(ddp), true)


def a_step_that_overflows_is_not_looked_ahead_from() -> None:
    """GradScaler skips two steps, the one whose own gradient overflowed on a rank and none else; weights stay true."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pipe = evenkeel.PipeSGD(evenkeel.HookState(None, loss_scale=scaler.get_scale))
    ddp = DistributedDataParallel(network())
    ddp.register_comm_hook(pipe, evenkeel.comm_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    pipe.attach(optimizer, look_ahead=ddp)
    moved = []
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(ddp, step, dist.get_rank())
        seen = weights(ddp)
        if step == 4 and dist.get_rank() == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        before = weights(ddp)
        check_alike(ddp)
        moved.append(float((seen - before).norm()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert moved[:2] == [0, 0]
    assert all(0 < distance < 1 for distance in (*moved[2:5], *moved[6:]))
    assert (moved[5] == 0) == (dist.get_rank() == 1)
    assert bool(weights(ddp).isfinite().all())


def everything() -> list[str]:
    done = []
    for work in (
        like_a_plain_loop,
        like_no_pipeline_where_ranks_agree,
        stop_and_resume,
        only_passes_in_training_are_ahead,
        a_step_that_overflows_is_not_looked_ahead_from,
    ):
        work()
        done.append(work.__name__)
    return done


def test_two_ranks() -> None:
    done = local_ranks(2, everything, timeout_s=100)
    assert done[0] == done[1]
    assert len(done[0]) == 5


def test_an_optimizer_that_cannot_try_a_step_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match="look_ahead: LBFGS cannot take a step on trial"):
        evenkeel.PipeSGD().attach(torch.optim.LBFGS(model.parameters()), look_ahead=model)
