"""Error feedback: nothing that was given is ever missing. The laws are in tests/laws."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.kernels import twins_only
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import CodeError, ConfigurationError
from sum_rounds import lanes_of


def coarse() -> SumCode:
    return THC(2, 3, 1 / 8, block=16)


def memory(code: ErrorFeedback, bucket: int = 0) -> Tensor:
    kept = code.memory(bucket)
    assert kept is not None
    return kept


def play(codes: list[ErrorFeedback], vectors: list[Tensor], step: int, arrived: set[int] | None = None) -> Tensor:
    """One round; ranks that did not arrive are told so. Adds in this_round, as reducers may."""
    rounds = [Round(rank, len(codes), step) for rank in range(len(codes))]
    stats = torch.stack([c.measure(v, p) for c, v, p in zip(codes, vectors, rounds, strict=True)]).amax(0)
    messages = [lanes_of(c, v, stats, p) for c, v, p in zip(codes, vectors, rounds, strict=True)]
    arrived = set(range(len(codes))) if arrived is None else arrived
    total = torch.zeros_like(messages[0])
    for rank, message in enumerate(messages):
        if rank in arrived:
            total += message
        else:
            codes[rank].dropped(rounds[rank])
        message.fill_(1)
    return codes[0].decode(Total(total, len(arrived)), stats, len(vectors[0]), rounds[0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), world=st.integers(1, 4), length=st.sampled_from([1, 5, 16, 37]))
def test_what_was_decoded_and_what_is_remembered_add_up_to_what_was_given(
    data: st.DataObject, world: int, length: int
) -> None:
    generator = torch.Generator().manual_seed(world * length)
    codes = [ErrorFeedback(coarse()) for _ in range(world)]
    given_sum, decoded_sum = torch.zeros(length), torch.zeros(length)
    for step in range(6):
        vectors = [torch.randn(length, generator=generator) for _ in range(world)]
        arrived = data.draw(st.sets(st.integers(0, world - 1)))
        mean = play(codes, vectors, step, arrived)
        given_sum += torch.stack(vectors).sum(0)
        decoded_sum += mean * len(arrived)
    owed = torch.stack([memory(code) for code in codes]).sum(0)
    torch.testing.assert_close(decoded_sum + owed, given_sum, rtol=1e-4, atol=1e-4)


def test_with_memory_the_average_over_steps_becomes_exact() -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    codes = [ErrorFeedback(FixedPoint(3, block=64))]
    averages = {}
    total = torch.zeros(64)
    for step in range(40):
        total += play(codes, [vector], step)
        averages[step + 1] = float((total / (step + 1) - vector).norm() / vector.norm())
    assert averages[40] < averages[1] / 20


def test_only_the_lost_granules_go_back_into_memory() -> None:
    code, this_round = ErrorFeedback(FixedPoint(4, block=8)), Round(0, 2)
    vector = torch.randn(20, generator=torch.Generator().manual_seed(1))
    lanes_of(code, vector, code.measure(vector, this_round), this_round)
    residual = memory(code).clone()
    code.dropped(this_round, torch.tensor([False, True, False]))
    assert torch.equal(memory(code)[:8], residual[:8])
    torch.testing.assert_close(memory(code)[8:16], vector[8:16])
    assert torch.equal(memory(code)[16:], residual[16:])
    assert float(residual.abs().max()) > 0


def test_a_loss_is_reported_once_and_of_the_last_round() -> None:
    code, this_round = ErrorFeedback(Plain()), Round(0, 1, step=3)
    lanes_of(code, torch.ones(2), code.measure(torch.ones(2), this_round), this_round)
    with pytest.raises(CodeError, match="no message that could be lost"):
        code.dropped(Round(0, 1, step=4))
    with pytest.raises(CodeError, match="no message that could be lost"):
        code.dropped(this_round)


@pytest.mark.parametrize("inner", [coarse, Plain], ids=["thc", "plain"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_memory_does_not_absorb_what_is_not_finite_on_any_rank(inner: type[SumCode], poison: float) -> None:
    codes = [ErrorFeedback(inner()), ErrorFeedback(inner())]
    vectors = [torch.ones(20), torch.arange(20.0)]
    play(codes, vectors, 0)
    before = [memory(code).clone() for code in codes]
    bad = [torch.ones(20), torch.full((20,), poison)]
    mean = play(codes, bad, 1)
    assert not mean.isfinite().all()
    assert all(torch.equal(memory(code), kept) for code, kept in zip(codes, before, strict=True))
    play(codes, bad, 2, arrived={0})
    assert all(torch.equal(memory(code), kept) for code, kept in zip(codes, before, strict=True))
    assert play(codes, vectors, 3).isfinite().all()


def test_a_first_round_that_is_not_finite_leaves_an_empty_memory() -> None:
    codes = [ErrorFeedback(coarse())]
    play(codes, [torch.full((5,), float("nan"))], 0)
    assert torch.equal(memory(codes[0]), torch.zeros(5))


def test_buckets_have_their_own_memories_and_can_be_reset() -> None:
    code = ErrorFeedback(FixedPoint(2))
    for bucket, length in ((0, 4), (1, 6)):
        this_round, vector = Round(0, 1, bucket=bucket), torch.arange(float(length))
        lanes_of(code, vector, code.measure(vector, this_round), this_round)
    assert {bucket: kept.numel() for bucket, kept in code.state_dict()["memory"].items()} == {0: 4, 1: 6}
    with pytest.raises(CodeError, match=r"bucket 1 has 4 coordinates, but its memory has 6.*call reset\(1\)"):
        code.measure(torch.ones(4), Round(0, 1, bucket=1))
    code.reset(1)
    code.measure(torch.ones(4), Round(0, 1, bucket=1))
    code.reset()
    assert code.state_dict()["memory"] == {}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(length=st.sampled_from([0, 1, 16, 37, 333]), block=st.sampled_from([16, 64]), world=st.integers(1, 20))
def test_rounds_are_those_of_the_code_and_a_memory_kept_by_hand(length: int, block: int, world: int) -> None:
    generator = torch.Generator().manual_seed(length)
    code, inner = ErrorFeedback(THC(4, block=block)), THC(4, block=block)
    owed = torch.zeros(length)
    for step in range(4):
        this_round, vector = Round(0, world, step), torch.randn(length, generator=generator)
        if step == 2 and length:
            vector[-1] = float("inf")
        stats = code.measure(vector, this_round)
        message = code.encode(vector, stats, this_round)
        with twins_only():
            twin = lanes_of(inner, vector + owed, stats[1:], this_round)
            if stats[0] == 0:
                owed = vector + owed - inner.decode(Total(twin, 1), stats[1:], length, this_round)
        wire, lanes = code.wire(world), code.lanes(length, this_round)
        assert torch.equal(wire.unpack(message, lanes), twin)
        assert torch.equal(memory(code), owed)
        total = wire.add([message] * world, lanes)
        assert torch.equal(total.long(), twin.long() * world)
        mean = code.decode(Total(wire.pack_total(total), world, packed=True), stats, length, this_round)
        unpacked = code.decode(Total(total, world), stats, length, this_round)
        assert torch.equal(mean.nan_to_num(), unpacked.nan_to_num())


def test_a_message_of_thc_that_is_lost_goes_back_into_memory() -> None:
    code, this_round = ErrorFeedback(THC(4, block=16)), Round(0, 2)
    vector = torch.randn(40, generator=torch.Generator().manual_seed(1))
    code.encode(vector, code.measure(vector, this_round), this_round)
    left = memory(code).clone()
    code.dropped(this_round, torch.tensor([False, True, False]))
    torch.testing.assert_close(memory(code)[16:32], vector[16:32])
    assert torch.equal(memory(code)[:16], left[:16])
    assert not torch.equal(left[16:32], vector[16:32])


def test_a_loaded_state_does_not_change_with_the_next_round() -> None:
    codes = [ErrorFeedback(coarse())]
    play(codes, [torch.arange(10.0)], 0)
    saved = codes[0].state_dict()
    copy = saved["memory"][0].clone()
    codes[0].load_state_dict(saved)
    play(codes, [torch.arange(10.0)], 1)
    assert torch.equal(saved["memory"][0], copy)


def test_a_saved_state_does_not_change_with_the_next_round() -> None:
    codes = [ErrorFeedback(coarse())]
    play(codes, [torch.arange(10.0)], 0)
    saved = codes[0].state_dict()
    copy = saved["memory"][0].clone()
    play(codes, [torch.arange(10.0)], 1)
    assert torch.equal(saved["memory"][0], copy)


@pytest.mark.parametrize("code", ["thc", THC, None])
def test_what_is_no_code_is_refused(code: object) -> None:
    with pytest.raises(ConfigurationError, match=r"code: must be a sum code such as THC\(bits=4\), found "):
        ErrorFeedback(code)  # type: ignore[arg-type]


def test_wrapping_twice_is_refused() -> None:
    with pytest.raises(CodeError, match="wrap once"):
        ErrorFeedback(ErrorFeedback(Plain()))
