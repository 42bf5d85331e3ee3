"""Pipe-SGD, with ranks as threads."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import evenkeel
from evenkeel.coding.sum_code import SumCode
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from training_helpers import (
    GIANT,
    SHAPES,
    SPLIT,
    Model,
    equal,
    gradients_of,
    in_threads,
    nmse,
    run,
)


def thc() -> SumCode:
    return evenkeel.THC(bits=4)


def low_rank() -> SumCode:
    return evenkeel.LowRank(2, evenkeel.THC(bits=4, block=64))


def hook_state(ranks: Collectives, compressed: bool = True, make: Callable[[], SumCode] = thc) -> evenkeel.HookState:
    return evenkeel.HookState(make() if compressed else None, reducer=evenkeel.Sharded(ranks))


def zeros(averages: list) -> bool:
    return not any(bool(average.any()) for average in averages)


@pytest.mark.parametrize(("compressed", "make"), [(True, thc), (True, low_rank), (False, thc)])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_gives_what_the_state_gives_one_step_later(
    compressed: bool, make: Callable[[], SumCode], warmup_steps: int
) -> None:
    steps, world = 7, 2

    def plain(ranks: Collectives) -> list:
        return run(hook_state(ranks, compressed, make), Model(SHAPES), ranks.rank, range(steps))

    def piped(ranks: Collectives) -> list:
        pipe, model, skipped, seen = (
            evenkeel.PipeSGD(hook_state(ranks, compressed, make), warmup_steps=warmup_steps),
            Model(SHAPES),
            [],
            [],
        )
        for step in range(steps):
            seen.append(model.step(pipe, gradients_of(ranks.rank, step), SPLIT if step else GIANT))
            skipped.append(pipe.skip_step)
        assert skipped == [step == warmup_steps for step in range(steps)]
        assert pipe.flush()
        flushed = [parameter.grad for parameter in model.parameters]
        assert not pipe.flush()
        return [*seen, flushed]

    expected = in_threads(world, plain)
    for rank, averages in enumerate(in_threads(world, piped)):
        assert equal(averages[:warmup_steps], expected[rank][:warmup_steps])
        assert zeros(averages[warmup_steps])
        assert equal(averages[warmup_steps + 1 :], expected[rank][warmup_steps:])


def test_averages_plainly_without_a_state() -> None:
    (ranks,) = thread_collectives(1)
    pipe = evenkeel.PipeSGD()
    assert isinstance(pipe._state, evenkeel.HookState)
    pipe = evenkeel.PipeSGD(hook_state(ranks, False))
    averages = run(pipe, Model(SHAPES), 0, range(3))
    assert nmse(averages[2], gradients_of(0, 1)) == 0


def test_any_hook_will_do() -> None:
    def halves(state: str, bucket: object) -> torch.futures.Future:
        assert state == "its own"
        assert bucket.index() in {0, 1}
        assert [g.shape for g in bucket.gradients()] == [p.shape for p in bucket.parameters()]
        bucket.set_buffer(bucket.buffer() / 2)
        assert bucket.gradients()[0].flatten()[0] == bucket.buffer()[0]
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    pipe = evenkeel.PipeSGD("its own", hook=halves)
    averages = run(pipe, Model(SHAPES), 0, range(3))
    assert equal([averages[2]], [[gradient / 2 for gradient in gradients_of(0, 1)]])


def test_the_next_backward_pass_may_overwrite_the_bucket() -> None:
    (ranks,) = thread_collectives(1)
    pipe, model = evenkeel.PipeSGD(hook_state(ranks, False)), Model(SHAPES)
    buckets = model.buckets(gradients_of(0, 0), GIANT)
    pipe.average(buckets[0]).wait()
    buckets[0].flat.fill_(99)
    assert equal([model.step(pipe, gradients_of(0, 1), GIANT)], [gradients_of(0, 0)])


def test_strided_gradients_are_flushed_in_their_places() -> None:
    (ranks,) = thread_collectives(1)
    pipe, model = evenkeel.PipeSGD(hook_state(ranks, False)), Model([(4, 3, 2, 2)])
    gradient = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    model.step(pipe, [gradient], [[0]])
    assert pipe.flush()
    assert torch.equal(model.parameters[0].grad, gradient)
    assert model.parameters[0].grad.stride() == gradient.stride()


def test_a_flush_in_the_middle_empties_the_pipeline() -> None:
    (ranks,) = thread_collectives(1)
    pipe, model = evenkeel.PipeSGD(hook_state(ranks, False)), Model(SHAPES)
    run(pipe, model, 0, range(3))
    assert pipe.flush()
    assert not pipe.skip_step
    assert zeros(model.step(pipe, gradients_of(0, 3), SPLIT))
    assert pipe.skip_step
    assert equal([model.step(pipe, gradients_of(0, 4), SPLIT)], [gradients_of(0, 3)])


@pytest.mark.parametrize("call", ["no closure", "closure", "closure by name"])
def test_an_attached_optimizer_does_nothing_while_the_pipeline_fills(call: str) -> None:
    (ranks,) = thread_collectives(1)
    pipe, model = evenkeel.PipeSGD(hook_state(ranks, False)), Model([(3, 2)])
    (weight,) = model.parameters
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    handle = pipe.attach(optimizer)
    moved = []
    for _ in range(3):
        before = weight.detach().clone()

        def computed() -> float:
            (weight.grad,) = model.step(pipe, [torch.ones(3, 2)], [[0]])
            return 7.0

        if call == "no closure":
            computed()
            optimizer.step()
        else:
            assert (optimizer.step(computed) if call == "closure" else optimizer.step(closure=computed)) == 7.0
        moved.append(not torch.equal(before, weight))
    assert moved == [False, True, True]
    assert optimizer.state[weight]["step"] == 2
    handle.remove()
    pipe.flush()
    pipe.skip_step = True
    optimizer.step()
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize("attached", [True, False])
def test_a_grad_scaler_goes_with_the_step(attached: bool) -> None:
    (ranks,) = thread_collectives(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # as the first loss
    state = evenkeel.HookState(None, reducer=evenkeel.Sharded(ranks), loss_scale=scaler.get_scale)
    pipe, model = evenkeel.PipeSGD(state), Model([(3, 2)])
    (weight,) = model.parameters
    optimizer = torch.optim.SGD([weight], lr=0.5)
    if attached:
        pipe.attach(optimizer)
    values = []
    for _ in range(3):
        (weight.grad,) = model.step(pipe, [torch.full((3, 2), 4.0)], [[0]])
        if attached or not pipe.skip_step:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        values.append(weight[0, 0].item())
    assert values == [0.0, -0.5, -1.0]


def test_an_average_is_converted_to_the_loss_scale_of_the_step_that_applies_it() -> None:
    (ranks,) = thread_collectives(1)
    scale = 4.0
    state = evenkeel.HookState(None, reducer=evenkeel.Sharded(ranks), loss_scale=lambda: scale)
    pipe, model = evenkeel.PipeSGD(state), Model([(2, 2)])
    model.step(pipe, [torch.full((2, 2), 4 * 3.0)], [[0]])
    scale = 2.0  # a step overflowed
    (average,) = model.step(pipe, [torch.full((2, 2), torch.inf)], [[0]])
    assert torch.equal(average, torch.full((2, 2), 2 * 3.0))
    scale = 8.0
    (average,) = model.step(pipe, [torch.full((2, 2), 8 * 5.0)], [[0]])
    assert bool(average.isinf().all())
    scale = 16.0
    assert pipe.flush()
    assert torch.equal(model.parameters[0].grad, torch.full((2, 2), 16 * 5.0))


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resume_goes_on_identically(stop: int) -> None:
    """Before, at and after the first pipelined step."""
    steps = 9

    def make(ranks: Collectives) -> evenkeel.PipeSGD:
        return evenkeel.PipeSGD(hook_state(ranks), warmup_steps=4)

    def first_part(ranks: Collectives) -> dict:
        pipe = make(ranks)
        run(pipe, Model(SHAPES), ranks.rank, range(stop))
        return pipe.state_dict()

    def second_part(ranks: Collectives) -> list:
        file = io.BytesIO()
        torch.save(saved[ranks.rank], file)
        file.seek(0)
        pipe = make(ranks)
        pipe.load_state_dict(torch.load(file, weights_only=True))
        return run(pipe, Model(SHAPES), ranks.rank, range(stop, steps))

    whole = in_threads(2, lambda ranks: run(make(ranks), Model(SHAPES), ranks.rank, range(steps)))
    saved = in_threads(2, first_part)
    for rank, rest in enumerate(in_threads(2, second_part)):
        assert equal(rest, whole[rank][stop:])


def test_a_resume_with_another_model_or_without_a_step_is_refused() -> None:
    (ranks,) = thread_collectives(1)
    pipe = evenkeel.PipeSGD(hook_state(ranks, False))
    run(pipe, Model(SHAPES), 0, range(3))
    saved = pipe.state_dict()
    other = evenkeel.PipeSGD(hook_state(thread_collectives(1)[0], False))
    other.load_state_dict(saved)
    with pytest.raises(ConfigurationError, match="has not seen the model yet"):
        other.flush()
    with pytest.raises(ConfigurationError, match=r"belongs? to another model"):
        Model([(2, 2)]).step(other, [torch.ones(2, 2)], [[0]])


def test_what_is_no_state_of_it_is_refused_before_anything_is_loaded() -> None:
    state = hook_state(thread_collectives(1)[0], False)
    pipe = evenkeel.PipeSGD(state)
    before = pipe.state_dict()
    for wrong, message in (
        ({}, "no state of a PipeSGD but a dictionary of nothing"),
        (state.state_dict(), "the state of a HookState, not of a PipeSGD: load it with HookState.load_state_dict"),
        ({"step": 3, "flights": [], "look_ahead": {}, "state": {}}, "no state of a LookAhead"),
        ({**before, "state": {}}, "no state of a HookState"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            pipe.load_state_dict(wrong)
    with pytest.raises(ConfigurationError, match="the state of a PipeSGD, not of a HookState"):
        state.load_state_dict(before)
    assert pipe.state_dict() == before


def test_stats_and_close_are_those_of_its_state() -> None:
    (ranks,) = thread_collectives(1)
    state = hook_state(ranks)
    pipe, model = evenkeel.PipeSGD(state), Model(SHAPES)
    run(pipe, model, 0, range(4))
    pipe.close()
    assert pipe.stats() == state.stats()
    assert pipe.stats().compressed_steps == 2
    with pytest.raises(ReducerError, match="closed"):
        model.step(pipe, gradients_of(0, 4), SPLIT)


def test_the_state_of_another_hook_may_have_neither() -> None:
    pipe = evenkeel.PipeSGD("its own", hook=lambda state, bucket: None)
    pipe.close()
    with pytest.raises(ConfigurationError, match=r"only a HookState counts costs, .* is 'its own'"):
        pipe.stats()


def test_no_checkpoint_within_a_backward_pass() -> None:
    (ranks,) = thread_collectives(1)
    pipe = evenkeel.PipeSGD(hook_state(ranks, False))
    pipe.average(Model(SHAPES).buckets(gradients_of(0, 0), SPLIT)[0])
    with pytest.raises(ConfigurationError, match="between two steps"):
        pipe.state_dict()


@pytest.mark.parametrize("layout", [GIANT, SPLIT])
def test_a_lost_peer_is_an_error_one_step_later_at_most(layout: list) -> None:
    first, second = thread_collectives(2)
    states = [hook_state(ranks, False) for ranks in (first, second)]
    pipes, models = [evenkeel.PipeSGD(state) for state in states], [Model(SHAPES), Model(SHAPES)]

    def work(ranks: Collectives) -> None:
        model, pipe = models[ranks.rank], pipes[ranks.rank]
        model.step(pipe, gradients_of(ranks.rank, 0), GIANT)
        if ranks.rank == 1:
            states[1].close()
            return
        model.step(pipe, gradients_of(0, 1), GIANT)
        with pytest.raises(ReducerError, match="gone"):
            pipe.state_dict()
        with pytest.raises((ReducerError, RuntimeError), match="gone"):
            model.step(pipe, gradients_of(0, 2), layout)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (first, second)))


def test_bad_arguments() -> None:
    for options, message in (
        ({"width": 3}, "width must be 2"),
        ({"warmup_steps": -1}, "warmup_steps: must be a whole number of 0 or more, found -1"),
        ({"warmup_steps": 2.5}, "warmup_steps: must be a whole number of 0 or more, found 2.5"),
        ({"loss_scale": 65536.0}, "loss_scale must be a function"),
        ({"hook": lambda state, bucket: None}, "without its state"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            evenkeel.PipeSGD(**options)
