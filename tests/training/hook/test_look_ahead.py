"""Pipe-SGD that looks ahead, in real DDP trainings over Gloo."""

import copy
import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
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


def train(
    ddp: Any,
    optimizer: Any,
    first: int,
    last: int,
    most: float = torch.inf,
    same: bool = False,
    checked: nn.Module | None = None,
) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(ddp, step, 0 if same else dist.get_rank()).backward()
        torch.nn.utils.clip_grad_norm_((checked or ddp).parameters(), most)
        check_alike(checked or ddp)
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
    for stop, options in (
        (WARMUP, {}),
        (WARMUP + 1, {}),
        (WARMUP + 2, {}),
        (WARMUP + 5, {}),
        (WARMUP + 5, {"static_graph": True}),
        (WARMUP + 5, {"find_unused_parameters": True}),
    ):
        pipe, ddp, optimizer, _ = piped("adam", **options)
        train(ddp, optimizer, 0, stop)
        file = io.BytesIO()
        states = {"pipe": pipe.state_dict(), "model": ddp.module.state_dict(), "adam": optimizer.state_dict()}
        torch.save(states, file)
        train(ddp, optimizer, stop, STEPS)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        pipe, again, optimizer, _ = piped("adam", **options)
        again.module.load_state_dict(states["model"])
        optimizer.load_state_dict(states["adam"])
        pipe.load_state_dict(states["pipe"])
        train(again, optimizer, stop, STEPS)
        assert torch.equal(weights(ddp), weights(again)), stop


def seen_by(model: nn.Module) -> list[Tensor]:
    """Grows by the weights that each forward pass of the model sees."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: seen.append(weights(model)))
    return seen


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


def only_passes_in_training_are_ahead() -> None:
    pipe, ddp, optimizer, handle = piped()
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(len(stepped)))
    train(ddp, optimizer, 0, STEPS)
    assert len(stepped) == STEPS  # trial steps are no steps to others
    true, momentum = weights(ddp), copy.deepcopy(optimizer.state_dict())
    seen = seen_by(ddp.module)
    with ddp.no_sync():
        loss_of(ddp.eval(), STEPS, dist.get_rank())
    ddp.train()
    with torch.no_grad():
        loss_of(ddp, STEPS, dist.get_rank())
    with torch.inference_mode():
        loss_of(ddp, STEPS, dist.get_rank())
    assert all(torch.equal(each, true) for each in seen)
    optimizer.zero_grad()
    with ddp.no_sync():
        loss_of(ddp, STEPS, dist.get_rank()).backward()
    ahead = seen[-1]
    assert not torch.equal(ahead, true)
    held = gradients(ddp)
    loss = loss_of(ddp, STEPS + 1, dist.get_rank())
    assert torch.equal(seen[-1], ahead)  # the second pass of a step sees what the first has seen
    assert torch.equal(gradients(ddp), held)
    saved = pipe.state_dict()["look_ahead"]
    loss.backward()
    assert torch.equal(weights(ddp), true)
    assert saved["own"].keys() == pipe.state_dict()["look_ahead"]["own"].keys() == set(range(4))
    again = optimizer.state_dict()
    assert all(
        torch.equal(values["momentum_buffer"], again["state"][place]["momentum_buffer"])
        for place, values in momentum["state"].items()
    )
    handle.remove()
    loss_of(ddp, STEPS, dist.get_rank())
    assert torch.equal(seen[-1], true)


def nobody_else_sees_weights_that_are_ahead() -> None:
    """Whatever has been begun and not ended: evaluation, states, averages and copies find the true weights."""
    rank = dist.get_rank()

    class Failure(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Failure

    def incomplete_accumulation(ddp: Any) -> None:
        with ddp.no_sync():
            loss_of(ddp, STEPS, rank).backward()

    def thrown_away(ddp: Any) -> Tensor:
        return loss_of(ddp, STEPS, rank)

    def failed_forward(ddp: Any) -> None:
        hook = ddp.module[3].register_forward_hook(fail)
        with ddp.no_sync(), pytest.raises(Failure):
            ddp(torch.ones(8, 6))
        hook.remove()

    def failed_backward(ddp: Any) -> None:
        hook = ddp.module[1].register_forward_hook(lambda module, inputs, output: output.register_hook(fail) and None)
        with ddp.no_sync(), pytest.raises(Failure):
            loss_of(ddp, STEPS, rank).backward()
        hook.remove()

    def gradients_by_hand(ddp: Any) -> None:
        with ddp.no_sync():
            torch.autograd.grad(loss_of(ddp, STEPS, rank), list(ddp.parameters()))

    def another_pass_within(ddp: Any) -> Tensor:
        """A graph that is still to be gone through keeps its own weights."""
        with ddp.no_sync():
            expected = torch.autograd.grad(loss_of(ddp, STEPS, rank), list(ddp.parameters()))
            loss = loss_of(ddp, STEPS, rank)
            with torch.no_grad():
                ddp.module(torch.ones(8, 6))
            found = torch.autograd.grad(loss, list(ddp.parameters()), retain_graph=True)
            once_more = torch.autograd.grad(loss, list(ddp.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(expected, once_more, strict=True))
        return loss

    for begun in (
        incomplete_accumulation,
        thrown_away,
        failed_forward,
        failed_backward,
        gradients_by_hand,
        another_pass_within,
    ):
        _, ddp, optimizer, _ = piped()
        train(ddp, optimizer, 0, STEPS)
        true, seen = weights(ddp), seen_by(ddp.module)
        average = torch.optim.swa_utils.AveragedModel(ddp.module)
        kept = begun(ddp)
        assert kept is None or kept.requires_grad
        assert not torch.equal(seen[0], true), begun
        seen.clear()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                ddp.eval()(torch.ones(8, 6))
                ddp.module.train()(torch.ones(8, 6))
                hidden = ddp.module[0](torch.ones(8, 6))
                expected = torch.nn.functional.linear(torch.ones(8, 6), true[:120].view(20, 6), true[120:140])
                assert torch.equal(hidden, expected), begun
        ddp.train()
        assert all(torch.equal(each, true) for each in seen), begun
        states = [ddp.state_dict(), ddp.module.state_dict(), copy.deepcopy(ddp.module).state_dict()]
        average.update_parameters(ddp.module)
        states.append(average.module.state_dict())
        assert all(torch.equal(torch.cat([v.flatten() for v in each.values()]), true) for each in states), begun
        check_alike(ddp)
        train(ddp, optimizer, STEPS, STEPS + 3)


def states_taken_within_a_pass_hold_the_true_weights() -> None:
    """As when a signal, or a hook of the model, asks for a checkpoint in the middle of a step."""
    _, ddp, optimizer, _ = piped()
    train(ddp, optimizer, 0, STEPS)
    true, states, seen = weights(ddp), [], seen_by(ddp.module)

    def take(*_: Any) -> None:
        states.extend([ddp.state_dict(), ddp.module.state_dict(), ddp.module.state_dict(keep_vars=True)])

    ddp.module[1].register_forward_hook(take)
    next(ddp.parameters()).register_post_accumulate_grad_hook(take)
    optimizer.zero_grad()
    loss_of(ddp, STEPS, dist.get_rank()).backward()
    assert len(states) == 6
    assert not torch.equal(seen[0], true)
    for state in states:
        assert torch.equal(torch.cat([value.detach().flatten() for value in state.values()]), true)


def a_closure_looks_ahead_like_no_closure() -> None:
    """Frameworks give the optimizer a closure that computes the gradients."""

    def trained(closure: bool) -> Tensor:
        _, ddp, optimizer, _ = piped()
        for step in range(STEPS):

            def computed(step: int = step, ddp: Any = ddp, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(ddp, step, dist.get_rank())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.2)
                return loss

            if closure:
                optimizer.step(computed)
            else:
                computed()
                optimizer.step()
        return weights(ddp)

    assert torch.equal(trained(True), trained(False))


def a_fused_step_is_tried_without_the_loss_scale() -> None:
    """GradScaler leaves dividing by the loss scale to such an optimizer."""

    def distances(fused: bool) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        pipe = evenkeel.PipeSGD(evenkeel.HookState(None, loss_scale=scaler.get_scale))
        ddp = DistributedDataParallel(network())
        ddp.register_comm_hook(pipe, evenkeel.comm_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, fused=fused)
        pipe.attach(optimizer, look_ahead=ddp)
        moved, seen = [], seen_by(ddp.module)
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(ddp, step, dist.get_rank())).backward()
            moved.append(float((seen[-1] - weights(ddp)).norm()))
            scaler.step(optimizer)
            scaler.update()
        return moved

    expected = distances(False)
    assert all(distance > 0 for distance in expected[2:])
    assert distances(True) == pytest.approx(expected, rel=1e-3)


def several_passes_in_one_step() -> None:
    """Forward and backward passes in any order, recomputed activations too, give the gradients at the same weights."""
    rank = dist.get_rank()
    _, ddp, optimizer, _ = piped()
    train(ddp, optimizer, 0, STEPS)
    optimizer.zero_grad()
    with ddp.no_sync():
        for step in (0, 1):
            loss_of(ddp, step, rank).backward()
        expected = gradients(ddp)
        optimizer.zero_grad()
        losses = [loss_of(ddp, step, rank) for step in (0, 1)]
        weights_between = weights(ddp)
        for loss in losses:
            loss.backward()
        assert torch.equal(gradients(ddp), expected)
        optimizer.zero_grad()
        sum(loss_of(ddp, step, rank) for step in (0, 1)).backward()
        assert torch.allclose(gradients(ddp), expected, atol=1e-6)
        for reentrant in (False, True):
            recomputed = Recomputed(ddp.module, reentrant)
            optimizer.zero_grad()
            ddp.module, inner = recomputed, ddp.module
            for step in (0, 1):
                loss_of(ddp, step, rank).backward()
            ddp.module = inner
            assert torch.equal(gradients(ddp), expected), reentrant
    assert torch.equal(weights(ddp), weights_between)
    with pytest.raises(ConfigurationError, match="gradients of gradients"), ddp.no_sync():
        torch.autograd.grad(loss_of(ddp, 2, rank), list(ddp.parameters()), create_graph=True)
    check_alike(ddp)
    old = loss_of(ddp, 2, rank)
    train(ddp, optimizer, STEPS, STEPS + 1)
    with pytest.raises((ConfigurationError, RuntimeError), match=r"an earlier step|inplace"):
        old.backward()
    check_alike(ddp)


class Recomputed(nn.Module):
    """Keeps no activations, and computes them again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            self.inner, inputs.requires_grad_(), use_reentrant=self.reentrant, preserve_rng_state=False
        )


def of_several_optimizers_all_look_ahead() -> None:
    """Each steps on trial with its own settings; one that is attached later, or gets parameters later, too."""

    def trained(split: str) -> Tensor:
        pipe = evenkeel.PipeSGD(warmup_steps=WARMUP)
        ddp = DistributedDataParallel(network())
        ddp.register_comm_hook(pipe, evenkeel.comm_hook)
        every = list(ddp.parameters())
        first = every if split == "one" else every[:1]
        optimizers = [torch.optim.SGD(first, lr=0.05, momentum=0.9)]
        if split == "two":
            optimizers.append(torch.optim.SGD(every[1:], lr=0.05, momentum=0.9))
        for optimizer in optimizers:
            pipe.attach(optimizer, look_ahead=ddp)
        if split == "group later":
            optimizers[0].add_param_group({"params": every[1:]})
        for step in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(ddp, step, dist.get_rank()).backward()
            check_alike(ddp)
            for optimizer in optimizers:
                optimizer.step()
            if step == WARMUP + 4:
                file = io.BytesIO()
                torch.save(pipe.state_dict(), file)
                file.seek(0)
                pipe._ahead.load_state_dict(torch.load(file, weights_only=True)["look_ahead"])
        return weights(ddp)

    whole = trained("one")
    assert torch.allclose(trained("two"), whole, atol=1e-6)
    assert torch.allclose(trained("group later"), whole, atol=1e-6)
    pipe, ddp, optimizer, _ = piped()
    with pytest.raises(ConfigurationError, match="attached already"):
        pipe.attach(optimizer, look_ahead=ddp)
    pipe, ddp, _, handle = piped()
    handle.remove()
    pipe.attach(torch.optim.SGD(list(ddp.parameters())[:1], lr=0.05), look_ahead=ddp)
    with pytest.warns(UserWarning, match="3 of the model's parameters are in no optimizer that was attached with look"):
        loss_of(ddp, 0, 0).backward()


def parameters_that_share_memory_go_on_so() -> None:
    """As the weights of one row that cuDNN wants, and two parameters with the same numbers."""
    for shared in (False, True):
        pipe = evenkeel.PipeSGD()
        model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)])
        row = torch.ones(32)
        model[0].weight.data, model[1].weight.data = row[:16].view(4, 4), row[16:].view(4, 4)
        model.forward = lambda inputs, model=model: model[2](model[1](model[0](inputs)))
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(pipe, evenkeel.comm_hook)
        if shared:
            model[2].weight.data = model[0].weight.data
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        pipe.attach(optimizer, look_ahead=ddp)
        distances = []
        model[2].register_forward_pre_hook(
            lambda *_, model=model, distances=distances: distances.append(
                [each.weight.data_ptr() - model[0].weight.data_ptr() for each in model[1:]]
            )
        )
        for step in range(4):
            optimizer.zero_grad()
            ddp(torch.randn(2, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        assert [between[0] for between in distances] == [64] * 4
        assert all((between[1] == 0) == shared for between in distances)
        assert model[0].weight.data_ptr() == row.data_ptr()


def compiled_like_not_compiled() -> None:
    """Also by a wrapper, and whatever comes first."""

    def trained(how: str) -> Tensor:
        torch._dynamo.reset()
        pipe = evenkeel.PipeSGD(warmup_steps=WARMUP)
        ddp = DistributedDataParallel(network())
        ddp.register_comm_hook(pipe, evenkeel.comm_hook)
        optimizer = OPTIMIZERS["momentum"](ddp.parameters())
        called = torch.compile(ddp, backend="aot_eager") if how.startswith("wrapper") else ddp
        if how == "compiled, then attached":
            ddp.compile(backend="aot_eager")
        if how == "wrapper, called before":
            loss_of(called, 0, 0)
        pipe.attach(optimizer, look_ahead=called if how == "wrapper, attached" else ddp)
        if how == "attached, then compiled":
            ddp.compile(backend="aot_eager")
        train(called, optimizer, 0, STEPS)
        return weights(ddp)

    plain = trained("not at all")
    for how in (
        "attached, then compiled",
        "compiled, then attached",
        "wrapper",
        "wrapper, attached",
        "wrapper, called before",
    ):
        assert torch.allclose(trained(how), plain, atol=1e-5), how


def outputs_of_any_form() -> None:
    @dataclass
    class Answer:
        scores: list[Tensor]

    class Plain:
        pass

    class Hidden:
        __slots__ = ("scores",)

    def answered(scores: Tensor, form: str) -> Any:
        if form == "object":
            answer = Plain()
            answer.anything = {"scores": (scores,)}
            return answer
        if form == "hidden":
            hidden = Hidden()
            hidden.scores = scores
            return hidden
        return {"tensor": scores, "dictionary": {"scores": [scores]}, "dataclass": Answer([scores])}[form]

    def scores_of(answer: Any) -> Tensor:
        if isinstance(answer, Plain):
            answer = answer.anything
        if isinstance(answer, Answer | Hidden):
            answer = answer.scores
        while not isinstance(answer, Tensor):
            answer = answer["scores"] if isinstance(answer, dict) else answer[0]
        return answer

    class Answering(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.inner, self.form = network(), form

        def forward(self, inputs: Tensor) -> Any:
            return answered(self.inner(inputs), self.form)

    ends = []
    for form in ("tensor", "dictionary", "dataclass", "object", "hidden"):
        pipe = evenkeel.PipeSGD(warmup_steps=WARMUP)
        ddp = DistributedDataParallel(Answering(form))
        ddp.register_comm_hook(pipe, evenkeel.comm_hook)
        optimizer = OPTIMIZERS["momentum"](ddp.parameters())
        pipe.attach(optimizer, look_ahead=ddp)
        run = lambda ddp=ddp, optimizer=optimizer: train(lambda x: scores_of(ddp(x)), optimizer, 0, STEPS, checked=ddp)
        if form == "hidden":
            with pytest.raises(ConfigurationError, match="did not come through what the model's forward pass returned"):
                run()
        else:
            run()
            ends.append(weights(ddp))
    assert all(torch.equal(end, ends[0]) for end in ends)
    pipe, ddp, optimizer, _ = piped()
    train(ddp, optimizer, 0, WARMUP)
    ddp.forward, forward = None, ddp.forward
    with pytest.raises(ConfigurationError, match="without a forward pass of the model that was given"):
        nn.functional.cross_entropy(forward(torch.ones(8, 6)), torch.zeros(8, dtype=torch.long)).backward()


def half_precision_is_not_cached_from_pass_to_pass() -> None:
    _, ddp, optimizer, _ = piped()
    train(ddp, optimizer, 0, STEPS)
    inputs = torch.ones(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = ddp.module(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ddp(inputs)
        assert torch.equal(ddp.module(inputs), expected)


def a_step_that_overflows_is_not_looked_ahead_from() -> None:
    """GradScaler skips two steps, the one whose own gradient overflowed on a rank and none else; weights stay true."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pipe = evenkeel.PipeSGD(evenkeel.HookState(None, loss_scale=scaler.get_scale))
    ddp = DistributedDataParallel(network())
    ddp.register_comm_hook(pipe, evenkeel.comm_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    pipe.attach(optimizer, look_ahead=ddp)
    moved, seen = [], seen_by(ddp.module)
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_of(ddp, step, dist.get_rank())
        if step == 4 and dist.get_rank() == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        check_alike(ddp)
        moved.append(float((seen[-1] - weights(ddp)).norm()))
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
        nobody_else_sees_weights_that_are_ahead,
        states_taken_within_a_pass_hold_the_true_weights,
        a_closure_looks_ahead_like_no_closure,
        a_fused_step_is_tried_without_the_loss_scale,
        several_passes_in_one_step,
        of_several_optimizers_all_look_ahead,
        parameters_that_share_memory_go_on_so,
        compiled_like_not_compiled,
        outputs_of_any_form,
        half_precision_is_not_cached_from_pass_to_pass,
        a_step_that_overflows_is_not_looked_ahead_from,
    ):
        work()
        done.append(work.__name__)
    return done


def test_two_ranks() -> None:
    done = local_ranks(2, everything, timeout_s=100)
    assert done[0] == done[1]
    assert len(done[0]) == 15


def test_an_optimizer_that_cannot_try_a_step_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match="look_ahead: LBFGS cannot take a step on trial"):
        evenkeel.PipeSGD().attach(torch.optim.LBFGS(model.parameters()), look_ahead=model)
