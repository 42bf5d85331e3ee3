"""The state of the hook, with ranks as threads."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import evenkeel
from evenkeel.coding.sum_code import Broadcast, SumCode
from evenkeel.coding.sums import thc_table
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.kernels import twins_only
from evenkeel.coding.wire import Round
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.fake import FakeReducer
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.training.hook import stats as stats_module
from training_helpers import (
    GIANT,
    SHAPES,
    SPLIT,
    Bucket,
    Model,
    equal,
    gradients_of,
    in_threads,
    mean_of,
    nmse,
    run,
)

THC, FixedPoint, HookState = evenkeel.THC, evenkeel.FixedPoint, evenkeel.HookState
MATRICES = [0, 2]  # numbers in SHAPES of what is compressed by default
VECTORS = [1, 3]


def sharded(ranks: Collectives, code: object, **options: object) -> HookState:
    return HookState(code, reducer=evenkeel.Sharded(ranks), **options)


@pytest.mark.parametrize("reducer", [evenkeel.Sharded, evenkeel.ProcessGroup, FakeReducer])
def test_averages_are_exact_at_first_and_within_the_code_s_error_then(reducer: type) -> None:
    world = 3

    def work(ranks: Collectives) -> list:
        return run(HookState(THC(bits=4), reducer=reducer(ranks)), Model(SHAPES), ranks.rank, range(6))

    ranks = in_threads(world, work)
    assert equal(ranks[0], ranks[1])
    assert equal(ranks[0], ranks[2])
    for step, averages in enumerate(ranks[0]):
        true = mean_of(world, step)
        if step < 2:
            assert nmse(averages, true) < 1e-12
        else:
            assert nmse([averages[n] for n in VECTORS], [true[n] for n in VECTORS]) < 1e-12
            assert 1e-6 < nmse([averages[n] for n in MATRICES], [true[n] for n in MATRICES]) < 0.02


def test_without_a_code_averages_are_exact() -> None:
    def work(ranks: Collectives) -> list:
        return run(sharded(ranks, None), Model(SHAPES), ranks.rank, range(4))

    for step, averages in enumerate(in_threads(2, work)[0]):
        assert nmse(averages, mean_of(2, step)) < 1e-12


@pytest.mark.parametrize("feedback", [True, False])
def test_error_feedback_makes_up_for_what_was_lost(feedback: bool) -> None:
    """With the same gradients in every step, clipping biases the sum of all steps, unless it is fed back."""
    steps = 30

    def work(ranks: Collectives) -> list:
        code = THC(bits=2, p=0.5)
        state, model = sharded(ranks, code, error_feedback=feedback), Model(SHAPES)
        averages = [model.step(state, gradients_of(ranks.rank, 0), SPLIT) for _ in range(steps)]
        return [torch.stack(same).mean(0) for same in zip(*averages[2:], strict=True)]

    error = nmse(in_threads(2, work)[0], mean_of(2, 0))
    assert error < 0.02 if feedback else error > 0.1


def test_a_code_with_error_feedback_is_taken_as_it_is() -> None:
    def averages(make: Callable[[], SumCode]) -> list:
        return in_threads(2, lambda ranks: run(sharded(ranks, make()), Model(SHAPES), ranks.rank, range(5)))[0]

    assert equal(averages(lambda: ErrorFeedback(THC(bits=4))), averages(lambda: THC(bits=4)))


def test_what_is_not_finite_on_one_rank_is_not_on_any_and_is_not_remembered() -> None:
    def work(ranks: Collectives) -> list:
        state, model = sharded(ranks, THC(bits=4)), Model(SHAPES)
        run(state, model, ranks.rank, range(4))
        before = state.state_dict()["code"]["memory"]
        bad = gradients_of(ranks.rank, 4)
        if ranks.rank == 1:
            bad[0][3, 3] = torch.nan
            bad[2][1, 1] = torch.inf
        averages = model.step(state, bad, SPLIT)
        after = state.state_dict()["code"]["memory"]
        assert all(torch.equal(before[unit], after[unit]) for unit in before)
        later = model.step(state, gradients_of(ranks.rank, 5), SPLIT)
        return [[bool(average.isfinite().all()) for average in averages], nmse(later, mean_of(2, 5))]

    for finite, error in in_threads(2, work):
        assert finite == [False, True, False, True]
        assert error < 0.05


def test_a_message_that_was_lost_is_owed_as_a_whole() -> None:
    def work(ranks: Collectives) -> tuple:
        lose = lambda this_round, granules: torch.full([granules], this_round.rank == 1 and this_round.step == 2)
        state, model = HookState(THC(bits=4), reducer=FakeReducer(ranks, lose)), Model(SHAPES)
        averages = [model.step(state, gradients_of(ranks.rank, step), GIANT) for step in range(3)]
        return averages[2], state.state_dict()["code"]["memory"][0]

    (averages, owed), (_, owed_by_the_lost) = in_threads(2, work)
    matrices = lambda rank: torch.cat([gradients_of(rank, 2)[number].flatten() for number in reversed(MATRICES)])
    assert nmse([torch.cat([averages[number].flatten() for number in reversed(MATRICES)])], [matrices(0)]) < 0.03
    assert nmse([owed_by_the_lost], [matrices(1)]) < 1e-9
    assert float(owed.norm()) < 0.3 * float(matrices(0).norm())


@pytest.mark.parametrize("stop", [1, 6, 9])
@pytest.mark.parametrize(
    "make",
    [
        lambda: THC(bits=4),
        lambda: evenkeel.GradiVeQ(THC(bits=4), sample_steps=5),
        lambda: evenkeel.LowRank(2, THC(bits=4, block=64)),
    ],
)
def test_a_resume_goes_on_identically(make: Callable[[], SumCode], stop: int) -> None:
    """Also although DDP lays the buckets out otherwise in a process's first step."""

    def first_part(ranks: Collectives) -> dict:
        state = sharded(ranks, make())
        run(state, Model(SHAPES), ranks.rank, range(stop))
        return state.state_dict()

    def second_part(ranks: Collectives) -> list:
        # Through a file, as users do; nothing but tensors and plain values may be in it.
        file = io.BytesIO()
        torch.save(saved[ranks.rank], file)
        file.seek(0)
        state = sharded(ranks, make())
        state.load_state_dict(torch.load(file, weights_only=True))
        return run(state, Model(SHAPES), ranks.rank, range(stop, 12))

    whole = in_threads(2, lambda ranks: run(sharded(ranks, make()), Model(SHAPES), ranks.rank, range(12)))
    saved = in_threads(2, first_part)
    for rank, rest in enumerate(in_threads(2, second_part)):
        assert equal(rest, whole[rank][stop:])


class Learning(Plain):
    """A code that learns what rank 0 broadcasts of each mean."""

    def __init__(self) -> None:
        self.learnt: list[torch.Tensor] = []

    def observe(self, mean: torch.Tensor, this_round: Round, broadcast: Broadcast) -> None:
        values = mean * (this_round.rank + 1)
        broadcast(values)
        assert torch.equal(values, mean)
        self.learnt.append(values)


def test_a_code_learns_from_every_mean() -> None:
    def work(ranks: Collectives) -> list:
        code, model = Learning(), Model(SHAPES)
        state = sharded(ranks, code, error_feedback=False)
        averages = run(state, model, ranks.rank, range(4))
        expected = [average[number].flatten() for average in averages[2:] for number in reversed(MATRICES)]
        return [[torch.equal(a, b) for a, b in zip(code.learnt, expected, strict=True)], len(code.learnt)]

    assert in_threads(2, work) == [[[True] * 4, 4]] * 2


def test_another_world_size_starts_error_feedback_anew() -> None:
    def first_part(ranks: Collectives) -> dict:
        state = sharded(ranks, THC(bits=4))
        run(state, Model(SHAPES), ranks.rank, range(5))
        return state.state_dict()

    saved = in_threads(2, first_part)

    def second_part(ranks: Collectives) -> list:
        state = sharded(ranks, THC(bits=4))
        state.load_state_dict(saved[0])
        assert state.state_dict()["code"]["memory"] == {}
        return run(state, Model(SHAPES), ranks.rank, [5, 6])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks = in_threads(3, second_part)
    assert str(caught[0].message).startswith("the state of rank 0 of 2 was loaded by rank")
    assert equal(ranks[0], ranks[2])
    assert nmse(ranks[0][1], mean_of(3, 6)) < 0.02


def test_a_state_of_another_model_is_refused() -> None:
    (ranks,) = thread_collectives(1)
    state = sharded(ranks, THC(bits=4))
    run(state, Model(SHAPES), 0, range(3))
    saved = state.state_dict()
    other = sharded(thread_collectives(1)[0], THC(bits=4))
    other.load_state_dict(saved)
    with pytest.raises(ConfigurationError, match="belongs to another model"):
        Model([(2, 2)]).step(other, [torch.ones(2, 2)], [[0]])
    with pytest.raises(ConfigurationError, match="before the first step"):
        state.load_state_dict(saved)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "no state of a HookState but a dictionary of nothing: load what HookState.state_dict gave on this rank"),
        ({"model": 1, "hook": 2}, r"no state of a HookState but a dictionary of \['hook', 'model'\]"),
        (None, "no state of a HookState but NoneType"),
        (
            {"step": 4, "flights": [], "look_ahead": {}, "state": {}},
            "the state of a PipeSGD, not of a HookState: load it with PipeSGD.load_state_dict",
        ),
        (
            {
                "step": 4,
                "rank": 0,
                "world": 1,
                "sizes": [],
                "units": {"next": 0, "units": {}},
                "code": {"bases": 1},
            },
            "memory and code",
        ),
    ],
)
def test_what_is_no_state_of_it_is_refused_before_anything_is_loaded(wrong: object, message: str) -> None:
    state = sharded(thread_collectives(1)[0], THC(bits=4))
    before = state.state_dict()
    with pytest.raises(ConfigurationError, match=message):
        state.load_state_dict(wrong)
    assert state.state_dict() == before


def test_states_of_different_steps_are_noticed() -> None:
    first = sharded(thread_collectives(1)[0], THC(bits=4), error_feedback=False)
    run(first, Model(SHAPES), 0, range(3))
    saved = first.state_dict()

    def work(ranks: Collectives) -> None:
        state = sharded(ranks, THC(bits=4), error_feedback=False)
        if ranks.rank == 1:
            state.load_state_dict(saved)
        run(state, Model(SHAPES), ranks.rank, range(1))

    for error in errors_of(2, work):
        assert "differ in step: 0 on rank [0], 3 on rank [1]; load every rank's own checkpoint of the" in str(error)


def test_rebuilt_buckets_start_anew_with_a_warning() -> None:
    (ranks,) = thread_collectives(1)
    state, model = sharded(ranks, THC(bits=4)), Model(SHAPES)
    for step in range(4):
        model.step(state, gradients_of(0, step), GIANT)
    with pytest.warns(UserWarning, match="rebuilt its buckets"):
        averages = model.step(state, gradients_of(0, 4), SPLIT)
    assert nmse(averages, gradients_of(0, 4)) < 0.03
    assert len(state.state_dict()["code"]["memory"]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_coded_in_float32_and_given_back_in_its_own_type(dtype: torch.dtype) -> None:
    def work(ranks: Collectives) -> list:
        state, model = sharded(ranks, FixedPoint(bits=8), start_step=2), Model(SHAPES, dtype)
        halves = [gradient.to(dtype) for gradient in gradients_of(ranks.rank, 0)]
        averages = [model.step(state, halves, SPLIT) for _ in range(3)]
        assert all(average.dtype == dtype for average in averages[2])
        return [[average.float() for average in step] for step in averages]

    for averages in in_threads(2, work)[0]:
        assert nmse(averages, mean_of(2, 0)) < 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-50, 1e45, 1e308])
@pytest.mark.parametrize(("code", "skip"), [(None, None), (THC(bits=4), None), (THC(bits=4), lambda parameter: True)])
def test_what_is_not_compressed_is_averaged_in_its_own_double_precision(
    scale: float, code: SumCode | None, skip: object
) -> None:
    """Without a code, before compression starts, and where parameters are skipped; alone and joined with statistics."""
    shapes = [(3, 2), (70, 60)]

    def work(ranks: Collectives) -> list:
        options = {"skip": skip} if skip else {}
        state, model = sharded(ranks, code, **options), Model(shapes, torch.float64)
        own = [torch.full(shape, scale * (0.3 + 0.4 * ranks.rank), dtype=torch.float64) for shape in shapes]
        return [model.step(state, own, [[0], [1]]) for _ in range(4 if skip or code is None else 2)]

    for step in in_threads(2, work)[0]:
        for average, shape in zip(step, shapes, strict=True):
            assert average.dtype == torch.float64
            true = torch.full(shape, 0.3 * scale / 2 + 0.7 * scale / 2, dtype=torch.float64)
            assert torch.allclose(average, true, rtol=1e-15, atol=0)


def test_large_numbers_do_not_overflow_in_their_sum() -> None:
    def work(ranks: Collectives) -> list:
        state, model = sharded(ranks, None), Model([(2, 2)])
        return model.step(state, [torch.full((2, 2), 3e38)], [[0]])

    assert in_threads(4, work)[0][0].tolist() == [[pytest.approx(3e38)] * 2] * 2


@pytest.fixture
def default_type() -> Iterator[Callable[[torch.dtype], None]]:
    """Sets torch's default type, for one test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("plainly", [False, True], ids=["kernels", "twins"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        THC,
        lambda: THC(bits=2, rounding="nearest"),
        FixedPoint,
        lambda: evenkeel.LowRank(2, THC(block=64)),
        lambda: evenkeel.GradiVeQ(sample_steps=4),
        lambda: evenkeel.GradiVeQ(THC(), sample_steps=4),
    ],
    ids=["none", "thc", "nearest", "fixed_point", "low_rank", "gradiveq", "gradiveq_thc"],
)
def test_torch_s_default_type_changes_nothing(
    make: Callable[[], SumCode | None], plainly: bool, default_type: Callable[[torch.dtype], None]
) -> None:
    shapes, steps = [(40, 30), (40,), (16, 8, 3, 3), (5,)], 8

    def work(ranks: Collectives) -> list:
        pipe, model = evenkeel.PipeSGD(sharded(ranks, make(), skip=None)), Model(shapes)
        return [model.step(pipe, every[ranks.rank][step], SPLIT if step else GIANT) for step in range(steps)]

    every = [[gradients_of(rank, step, shapes) for step in range(steps)] for rank in range(2)]
    with twins_only() if plainly else nullcontext():
        expected = in_threads(2, work)[0]
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            default_type(dtype)
            assert equal(in_threads(2, work)[0], expected), dtype


@pytest.fixture
def default_device() -> Iterator[Callable[[str], None]]:
    """Sets torch's default device, for one test."""
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.mark.parametrize("plainly", [False, True], ids=["kernels", "twins"])
@pytest.mark.parametrize("make", [THC, FixedPoint, lambda: evenkeel.LowRank(2, THC(block=64))])
def test_torch_s_default_device_changes_nothing(
    make: Callable[[], SumCode], plainly: bool, default_device: Callable[[str], None]
) -> None:
    model, ends = Model(SHAPES), []
    steps = [model.buckets(gradients_of(0, step), SPLIT if step else GIANT) for step in range(5)]
    with twins_only() if plainly else nullcontext():
        for device in ("cpu", "meta"):
            default_device(device)
            (ranks,) = thread_collectives(1)
            state = sharded(ranks, make(), compare_weights_every=2)
            ends.append(
                [state.average(bucket).wait().clone() for buckets in copy.deepcopy(steps) for bucket in buckets]
            )
            state.close()
    assert equal([ends[0]], [ends[1]])


def test_strided_and_empty_gradients() -> None:
    shapes = [(6, 4, 3, 3), (0,), (7, 0)]

    def work(ranks: Collectives) -> list:
        state, model = sharded(ranks, FixedPoint(bits=16)), Model(shapes)
        gradients = gradients_of(ranks.rank, 0, shapes)
        gradients[0] = gradients[0].to(memory_format=torch.channels_last)
        for _ in range(3):
            averages = model.step(state, gradients, [[0], [1, 2]])
        assert averages[0].stride() == gradients[0].stride()
        return averages

    averages = in_threads(2, work)[0]
    true = torch.stack([gradients_of(rank, 0, shapes)[0] for rank in range(2)]).mean(0)
    assert nmse([averages[0]], [true]) < 1e-6
    assert [average.shape for average in averages[1:]] == [(0,), (7, 0)]


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        (None, set()),
        (lambda parameter: parameter.shape[0] == 5, {2, 3}),
        ("first", {0, 1, 3}),
    ],
)
def test_skipped_parameters_stay_exact(skip: object, skipped: set[int]) -> None:
    def work(ranks: Collectives) -> list:
        model = Model(SHAPES)
        rule = [model.parameters[0]] if skip == "first" else skip
        return run(sharded(ranks, THC(bits=2), skip=rule), model, ranks.rank, range(3))[2]

    averages, true = in_threads(2, work)[0], mean_of(2, 2)
    exact = {number for number in range(4) if nmse([averages[number]], [true[number]]) < 1e-12}
    assert exact == skipped


def test_names_and_modules_to_skip() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 2)})
    assert [id(p) for p in evenkeel.named(model, "emb*", "*.bias")] == [id(model.embed.weight), id(model.head.bias)]
    with pytest.raises(ConfigurationError, match=r"no parameter is called 'nothing\*'"):
        evenkeel.named(model, "nothing*")
    with pytest.raises(ConfigurationError, match=r"named\(model, '\*embed\*'\)"):
        HookState(None, skip=["embed"])


@pytest.mark.parametrize("frozen", [False, True])
def test_an_entry_to_skip_that_is_in_no_bucket_is_refused_by_the_first_step(frozen: bool) -> None:
    (ranks,) = thread_collectives(1)
    model, other = Model(SHAPES), torch.nn.Linear(3, 2)
    other.requires_grad_(not frozen)
    for entry, what in ((other, "a Linear"), (other.weight, r"a parameter of \(2, 3\)")):
        for pipelined in (False, True):
            state = sharded(ranks, THC(bits=4), skip=[model.parameters[0], entry])
            with pytest.raises(ConfigurationError, match=f"skip lists {what} that .* does not average: it is frozen"):
                model.step(evenkeel.PipeSGD(state) if pipelined else state, gradients_of(0, 0), SPLIT)


def test_an_entry_to_skip_may_have_no_parameters_or_lie_in_any_bucket() -> None:
    (ranks,) = thread_collectives(1)
    model = Model(SHAPES)
    partly = torch.nn.ParameterList([model.parameters[3], torch.nn.Parameter(torch.zeros(2), requires_grad=False)])
    state = sharded(ranks, THC(bits=4), skip=[model.parameters[0], torch.nn.Dropout(), partly])
    model.step(state, gradients_of(0, 0), SPLIT)


def test_loss_scale_leaves_no_trace_in_what_is_remembered() -> None:
    def with_scales(ranks: Collectives, scales: list[float]) -> list:
        current = iter(scales)
        state, model = sharded(ranks, THC(bits=4), loss_scale=lambda: next(current)), Model(SHAPES)
        steps = []
        for number, scale in enumerate(scales):
            scaled = [gradient * scale for gradient in gradients_of(ranks.rank, number)]
            steps.append([average / scale for average in model.step(state, scaled, SPLIT)])
        return steps

    plain = in_threads(2, lambda ranks: with_scales(ranks, [1.0] * 6))[0]
    changing = in_threads(2, lambda ranks: with_scales(ranks, [1.0, 2.0, 1024.0, 0.5, 8.0, 65536.0]))[0]
    for one, other in zip(plain, changing, strict=True):
        assert nmse(one, other) < 1e-12


def errors_of(world: int, work: object) -> list[BaseException]:
    def caught(ranks: Collectives) -> BaseException:
        with pytest.raises((ConfigurationError, ReducerError)) as error:
            work(ranks)
        return error.value

    return in_threads(world, caught)


@pytest.mark.parametrize(
    ("field", "odd_one"),
    [
        ("code", lambda ranks: sharded(ranks, THC(bits=3))),
        ("code", lambda ranks: sharded(ranks, THC(bits=4, seed=1))),
        ("start_step", lambda ranks: sharded(ranks, THC(bits=4), start_step=3)),
        ("skip", lambda ranks: sharded(ranks, THC(bits=4), skip=None)),
        ("loss_scale", lambda ranks: sharded(ranks, THC(bits=4), loss_scale=lambda: 1.0)),
    ],
)
def test_a_rank_configured_otherwise_is_named_on_every_rank(field: str, odd_one: object) -> None:
    def work(ranks: Collectives) -> None:
        state = odd_one(ranks) if ranks.rank == 1 else sharded(ranks, THC(bits=4))
        run(state, Model(SHAPES), ranks.rank, range(1))

    errors = errors_of(3, work)
    assert {type(error) for error in errors} == {ConfigurationError}
    assert len({str(error) for error in errors}) == 1
    assert f"differ in {field}: " in str(errors[0])
    assert "on ranks [0, 2]" in str(errors[0])
    assert "on rank [1]" in str(errors[0])


def test_another_model_is_noticed_by_its_weights() -> None:
    """As when DDP runs on a subgroup of ranks, and the state over all of them."""

    def work(ranks: Collectives) -> None:
        model = Model(SHAPES)
        for parameter in model.parameters:
            parameter.data.fill_(float(ranks.rank // 2))
        run(sharded(ranks, THC(bits=4)), model, ranks.rank, range(1))

    errors = errors_of(4, work)
    assert len({str(error) for error in errors}) == 1
    assert "differ in weights" in str(errors[0])
    assert "group=" in str(errors[0])


def test_more_ranks_than_the_lanes_hold_are_refused_on_every_rank() -> None:
    def work(ranks: Collectives) -> None:
        code = FixedPoint(bits=4)
        code.max_workers = 1
        run(sharded(ranks, code), Model(SHAPES), ranks.rank, range(1))

    for error in errors_of(2, work):
        assert "at most 1 ranks without overflow, but there are 2" in str(error)
        assert "fewer bits" in str(error)


def test_a_peer_that_leaves_is_an_error_now_and_later() -> None:
    def work(ranks: Collectives) -> None:
        state, model = sharded(ranks, THC(bits=4)), Model(SHAPES)
        for step in range(4):
            if (ranks.rank, step) == (1, 3):
                state.close()
            try:
                model.step(state, gradients_of(ranks.rank, step), SPLIT)
            except ReducerError:
                with pytest.raises(ReducerError):
                    model.step(state, gradients_of(ranks.rank, step), SPLIT)
                raise

    first, second = errors_of(2, work)
    assert isinstance(first, ReducerError)
    assert "gone" in str(first)
    assert "closed" in str(second)


def test_a_silent_peer_is_an_error_when_the_time_is_over() -> None:
    ranks, _ = thread_collectives(2, timeout_s=0.01)
    with pytest.raises(ReducerError, match=r"stayed silent(.|\n)*; is the hook registered on every rank\?"):
        run(sharded(ranks, THC(bits=4)), Model(SHAPES), 0, range(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": 4}, "code must be a sum code"),
        ({"code": THC}, "code must be a sum code"),
        ({"start_step": 1}, "start_step must be 2 or more"),
        ({"start_step": 2.5}, "start_step: must be a whole number, found 2.5"),
        ({"start_step": "3"}, "start_step: must be a whole number, found '3'"),
        ({"timeout_s": -1}, "timeout_s must be above zero"),
        ({"timeout_s": float("inf")}, "timeout_s: must be a finite number, found inf"),
        ({"loss_scale": 65536.0}, "loss_scale must be a function .* such as scaler.get_scale without brackets"),
        ({"group": "g"}, "group must be a process group that this rank is in"),
        ({"group": -100}, "group must be a process group that this rank is in"),  # new_group, for ranks not in it
        ({"reducer": "sharded"}, r"reducer must be a reducer such as evenkeel\.Sharded\(\), or None, found 'sharded'"),
        ({"reducer": evenkeel.Sharded}, "reducer must be a reducer"),
        ({"reducer": evenkeel.Sharded(), "group": object()}, "to the reducer itself"),
        ({"skip": "bias"}, r"skip takes a rule .* found 'bias'; for names: .*named\(model, '\*bias\*'\)"),
        ({"skip": 5}, r"skip takes a rule .* found 5; such as skip=\[model"),
        ({"skip": [3]}, r"skip takes a rule .* found 3; such as"),
        ({"skip": torch.nn.Linear}, r"skip takes a rule .* isinstance\(module, Linear\)"),
        ({"skip": [torch.nn.Linear]}, r"skip takes a rule .* isinstance\(module, Linear\)"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HookState(**{"code": None, **options})


def test_bad_buckets() -> None:
    (ranks,) = thread_collectives(1)
    state = sharded(ranks, THC(bits=4))
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    with pytest.raises(ConfigurationError, match="sparse=False"):
        evenkeel.comm_hook(state, Bucket(0, True, [torch.nn.Parameter(torch.zeros(3, 2))], sparse, [sparse]))
    with pytest.raises(ConfigurationError, match="compiled autograd"):
        evenkeel.comm_hook(state, (torch.ones(2), torch.ones(2)))
    for gradients in ((torch.ones(2),), (torch.ones(2), torch.ones(1))):  # without sharding, and with it
        with pytest.raises(ConfigurationError, match=r"\(FSDP1\) and fully_shard \(FSDP2\) are not supported"):
            evenkeel.comm_hook(state, *gradients)
    with pytest.raises(ConfigurationError, match="needs a HookState or a PipeSGD"):
        evenkeel.comm_hook(None, Bucket(0, True, [], torch.ones(2), []))


def test_one_state_serves_one_model() -> None:
    (ranks,) = thread_collectives(1)
    state = sharded(ranks, THC(bits=4))
    run(state, Model(SHAPES), 0, range(1))
    with pytest.raises(ConfigurationError, match="two models"):
        run(state, Model(SHAPES), 0, range(1))


def test_no_checkpoint_within_a_backward_pass() -> None:
    (ranks,) = thread_collectives(1)
    state, model = sharded(ranks, THC(bits=4)), Model(SHAPES)
    state.average(model.buckets(gradients_of(0, 0), SPLIT)[0])
    with pytest.raises(ConfigurationError, match="between two steps"):
        state.state_dict()


def test_stats_count_real_bytes_and_measure_the_error() -> None:
    world, length = 4, 1 << 16

    def work(ranks: Collectives) -> object:
        state, model = sharded(ranks, THC(bits=4), error_feedback=False), Model([(length, 1)])
        for step in range(3):
            before = ranks.sent_bytes
            model.step(state, [torch.randn(length, 1, generator=torch.Generator().manual_seed(16 * step))], [[0]])
        return state.stats(), ranks.sent_bytes - before

    for stats, sent in in_threads(world, work):
        assert (stats.steps, stats.compressed_steps, stats.coordinates) == (3, 1, length)
        assert stats.sent_bytes == sent
        assert stats.uncompressed_bytes == 2 * (world - 1) * 4 * length // world
        assert 8 * stats.sent_bytes / length <= 9.2
        assert min(stats.encode_s, stats.add_s, stats.communicate_s, stats.decode_s) > 0
        saved = stats.uncompressed_bytes - stats.sent_bytes
        assert stats.plain_bps > 0
        beyond_s = max(0, stats.communicate_s - 8 * stats.sent_bytes / stats.plain_bps)
        work_s = stats.encode_s + stats.add_s + stats.decode_s + beyond_s
        assert stats.break_even_bps == pytest.approx(8 * saved / work_s)
        assert stats.achieved_bps == pytest.approx(8 * stats.sent_bytes / stats.communicate_s)
        assert stats.local_nmse is None


def test_the_sampled_error_is_that_of_the_messages() -> None:
    def work(ranks: Collectives, feedback: bool) -> float:
        state, model = sharded(ranks, THC(bits=4), error_feedback=feedback), Model([(1 << 16, 1)])
        for step in range(17):
            model.step(state, [torch.randn(1 << 16, 1, generator=torch.Generator().manual_seed(step))], [[0]])
        return state.stats().local_nmse

    code = THC(bits=4)
    expected = thc_table.rounding_error(code.table, code.p) + thc_table.clamp_error(code.p)
    for feedback in (False, True):
        (found,) = in_threads(1, lambda ranks, feedback=feedback: work(ranks, feedback))
        assert found == pytest.approx(expected, rel=0.1)


def test_a_code_that_saves_nothing_is_told_off_once() -> None:
    def work(ranks: Collectives) -> None:
        state, model = sharded(ranks, Plain()), Model([(2, 2)])
        for _ in range(205):
            model.step(state, [torch.ones(2, 2)], [[0]])

    for world, told_off in ((2, 2), (1, 0)):  # a single rank sends nothing
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            in_threads(world, work)
        assert len(caught) == told_off
        assert all("compression costs more than it saves" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("reducer", [evenkeel.Sharded, evenkeel.ProcessGroup, FakeReducer])
@pytest.mark.parametrize("make", [THC, FixedPoint, lambda: evenkeel.GradiVeQ(THC())])
def test_all_reducers_and_the_twins_give_the_same_training(reducer: type, make: Callable[[], SumCode]) -> None:
    """Bit for bit: with whole numbers, whose squares are exact in any order."""

    def work(ranks: Collectives, reducer: type) -> tuple:
        state, model = HookState(make(), reducer=reducer(ranks)), Model(SHAPES)
        whole = [[(8 * gradient).round() for gradient in gradients_of(ranks.rank, step)] for step in range(3)]
        averages = [model.step(state, gradients, GIANT) for gradients in whole]
        return averages, state.state_dict()["code"]["memory"]

    with twins_only():
        expected = in_threads(3, lambda ranks: work(ranks, evenkeel.Sharded))
    for (averages, memory), (true_averages, true_memory) in zip(
        in_threads(3, lambda ranks: work(ranks, reducer)), expected, strict=True
    ):
        assert equal(averages, true_averages)
        assert memory.keys() == true_memory.keys()
        assert all(torch.equal(memory[unit], true_memory[unit]) for unit in memory)


def test_a_phase_takes_what_is_done_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the code and the exchanges move."""
    now = [0.0]
    monkeypatch.setattr(stats_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (ranks,) = thread_collectives(1)
    code = Plain()

    def taking(owner: object, name: str, seconds: float) -> None:
        done = getattr(owner, name)

        def work(*arguments: object) -> object:
            now[0] += seconds
            if owner is ranks:
                ranks.exchanged_s += seconds
            return done(*arguments)

        setattr(owner, name, work)

    taking(ranks, "swap", 1000)
    state, model = sharded(ranks, code, error_feedback=False), Model([(2, 2)])
    wire = code.wire(1)
    monkeypatch.setattr(code, "wire", lambda world: wire)
    for owner, name, seconds in ((code, "encode", 1), (wire, "add", 4), (wire, "pack_total", 8), (code, "decode", 16)):
        taking(owner, name, seconds)
    for _ in range(3):
        model.step(state, [torch.ones(2, 2)], [[0]])
    found = state.stats()
    assert found.encode_s == pytest.approx(1, abs=0.5)
    assert found.add_s == pytest.approx(4 + 8, abs=0.5)
    assert found.communicate_s == pytest.approx(2 * 1000, abs=0.5)
    assert found.decode_s == pytest.approx(16, abs=0.5)
