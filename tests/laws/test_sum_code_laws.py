"""The laws of `coding/sum_code.py`, over every sum code."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.sums.plain_thc import PlainTHC
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.sums.thc_table import clip
from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.errors import CodeError, ConfigurationError
from malformed_states import malformed
from sum_rounds import lanes_of

CONV = (4, 4, 3, 3)
CONV_SIZE = 144
BUCKET = 7
DIRECTIONS = torch.linalg.qr(torch.randn(48, 2, generator=torch.Generator().manual_seed(3)))[0]
LEFT, RIGHT = torch.randn(40, generator=torch.Generator().manual_seed(4)).split([4, 36])


def convolution_in_two_directions(generator: "torch.Generator") -> Tensor:
    """Slices of 3 * 16 neighbours."""
    slices = torch.randn(3, 2, generator=generator) @ DIRECTIONS.T
    return slices.reshape(3, 3, 4, 4).permute(3, 2, 0, 1).reshape(-1)


def matrix_of_rank_one(generator: "torch.Generator") -> Tensor:
    return torch.randn(1, generator=generator) * torch.outer(LEFT, RIGHT).view(-1)


@dataclass(frozen=True)
class Case:
    """A code, and its stated error: the most of the mean's squared error, given the vectors of all ranks."""

    name: str
    make: Callable[[], SumCode]
    bound: Callable[[list[Tensor]], float]
    learns: Callable[["torch.Generator"], Tensor] | None = None  # draws what it can learn to tell in fewer numbers

    def coder(self, length: int) -> SumCode:
        """A code that is ready for bucket BUCKET; one that learns is in a compressed round where the length allows."""
        code = self.make()
        if self.learns and length >= CONV_SIZE:
            code.arrange(BUCKET, [(length - CONV_SIZE,), CONV])
            generator = torch.Generator().manual_seed(8)
            for step in range(4):
                code.observe(self.vector(length, generator), Round(0, 1, step, BUCKET), lambda row: None)
            assert code.lanes(length, Round(0, 1, 4, BUCKET)) < length
        return code

    def vector(self, length: int, generator: "torch.Generator") -> Tensor:
        vector = torch.randn(length, generator=generator)
        vector *= torch.exp(3 * torch.randn(length // 50 + 1, generator=generator)).repeat_interleave(50)[:length]
        if self.learns and length >= CONV_SIZE:
            vector[-CONV_SIZE:] = self.learns(generator)
        return vector


def fixed_point_bound(bits: int, block: int) -> Callable[[list[Tensor]], float]:
    def bound(vectors: list[Tensor]) -> float:
        largest = torch.stack(vectors).double().abs().amax(0)
        steps = [part.max() / (2 ** (bits - 1) - 1) for part in largest.split(block) if len(part)]
        sizes = [len(part) for part in largest.split(block) if len(part)]
        return float(sum(size * (step / 2) ** 2 for size, step in zip(sizes, steps, strict=True)))

    return bound


def thc_bound(code: PlainTHC) -> Callable[[list[Tensor]], float]:
    """For tables that clip nothing that occurs here: every rotated coordinate is off by less than the widest gap."""
    gap = max(above - below for below, above in zip(code.table, code.table[1:], strict=False))
    step = gap * 2 * clip(code.p) / code.granularity

    def bound(vectors: list[Tensor]) -> float:
        norms = [
            max(float(part.norm()) for part in parts)
            for parts in zip(*(vector.double().split(code.granule) for vector in vectors), strict=True)
        ]
        return sum((norm * step) ** 2 for norm in norms)

    return bound


def plain_bound(vectors: list[Tensor]) -> float:
    return 1e-12 * sum(float(vector.double().square().sum()) for vector in vectors)


def coefficients_bound(bound: Callable[[list[Tensor]], float], block: int) -> Callable[[list[Tensor]], float]:
    """The inner code's, of vectors whose blocks are cut elsewhere: with the whole vector's scale for every block."""

    def of_whole(vectors: list[Tensor]) -> float:
        blocks = len(vectors[0]) // block + 1
        return blocks * max(bound([vector[None].norm().view(1) for vector in vectors]), 1e-30)

    return of_whole


def thc(rounding: str, bits: int = 8, block: int = 64) -> THC:
    granularity = {4: 17, 8: 255, 3: 9}[bits]
    return THC(bits, granularity, 1e-9, rounding, block, seed=5)  # type: ignore[arg-type]


FINE = thc("correlated", block=32)
CASES = [
    Case("plain", Plain, plain_bound),
    Case("fixed_point_8", lambda: FixedPoint(8, block=16), fixed_point_bound(8, 16)),
    Case("fixed_point_3", lambda: FixedPoint(3, block=4096), fixed_point_bound(3, 4096)),
    Case("fixed_point_16", lambda: FixedPoint(16, block=48), fixed_point_bound(16, 48)),
    *(
        Case(f"thc_{rounding}_{bits}", lambda r=rounding, b=bits: thc(r, b), thc_bound(thc(rounding, bits)))
        for rounding, bits in (("correlated", 8), ("correlated", 4), ("stochastic", 4), ("nearest", 3))
    ),
    Case(
        "plain_thc",
        lambda: PlainTHC(4, 17, 1e-9, "correlated", 64, seed=5),
        thc_bound(PlainTHC(4, 17, 1e-9, "correlated", 64)),
    ),
    Case("error_feedback", lambda: ErrorFeedback(FixedPoint(8, block=16)), fixed_point_bound(8, 16)),
    Case("error_feedback_plain", lambda: ErrorFeedback(Plain()), plain_bound),
    Case(
        "gradiveq",
        lambda: GradiVeQ(ratio=8, sample_steps=4, longest_slice=48),
        plain_bound,
        convolution_in_two_directions,
    ),
    Case(
        "gradiveq_thc",
        lambda: ErrorFeedback(GradiVeQ(thc("correlated", block=32), ratio=8, sample_steps=4, longest_slice=48)),
        coefficients_bound(thc_bound(FINE), 32),
        convolution_in_two_directions,
    ),
    Case("low_rank", lambda: LowRank(1), plain_bound, matrix_of_rank_one),
    Case(
        "low_rank_thc",
        lambda: ErrorFeedback(LowRank(2, thc("correlated", block=32), min_ratio=1.5)),
        coefficients_bound(thc_bound(FINE), 32),
        matrix_of_rank_one,
    ),
]

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
lengths = st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 33, 64, 100, 150, 240, 333, 500])
few = settings(max_examples=10, deadline=None, derandomize=True)


@dataclass
class Played:
    """One round of `world` workers, up to their messages: as bytes, and as lanes."""

    code: SumCode
    vectors: list[Tensor]
    rounds: list[Round]
    stats: Tensor
    packed: list[Tensor]
    messages: list[Tensor]

    @property
    def wire(self) -> Wire:
        return self.code.wire(len(self.vectors))

    def total(self, ranks: list[int]) -> Tensor:
        total = torch.zeros_like(self.messages[0])
        for rank in ranks:
            total = total + self.messages[rank]
        return total

    def decode(self, total: Tensor, count: int | Tensor) -> Tensor:
        return self.code.decode(Total(total, count), self.stats, len(self.vectors[0]), self.rounds[0])


def play(case: Case, vectors: list[Tensor], step: int = 4) -> Played:
    codes = [case.coder(len(vectors[0])) for _ in vectors]
    rounds = [Round(rank, len(vectors), step, BUCKET) for rank in range(len(vectors))]
    measured = [code.measure(v, p) for code, v, p in zip(codes, vectors, rounds, strict=True)]
    stats = torch.stack(measured).amax(0) if measured[0].numel() else measured[0]
    packed = [code.encode(v, stats, p) for code, v, p in zip(codes, vectors, rounds, strict=True)]
    lanes = codes[0].lanes(len(vectors[0]), rounds[0])
    messages = [codes[0].wire(len(vectors)).unpack(each, lanes) for each in packed]
    return Played(codes[0], vectors, rounds, stats, packed, messages)


def draw_vectors(case: Case, seed: int, world: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [case.vector(length, generator) for _ in range(world)]


@few
@given(data=st.data(), seed=st.integers(0, 99), length=lengths, world=st.integers(1, 18), power=st.integers(-60, 60))
def test_any_subset_gives_its_mean_within_the_stated_error(
    case: Case, data: st.DataObject, seed: int, length: int, world: int, power: int
) -> None:
    vectors = [vector * 2.0**power for vector in draw_vectors(case, seed, world, length)]
    arrived = data.draw(st.permutations(range(world)))[: data.draw(st.integers(1, world))]
    played = play(case, vectors)
    mean = played.decode(played.total(arrived), len(arrived))
    assert mean.dtype == torch.float32
    assert mean.shape == (length,)
    true = torch.stack([vectors[rank] for rank in arrived]).double().mean(0)
    slack = 1e-12 * float(torch.stack(vectors).double().square().sum())
    assert float((mean - true).square().sum()) <= case.bound(vectors) + slack


@few
@given(data=st.data(), seed=st.integers(0, 99), length=lengths, world=st.integers(1, 9))
def test_the_order_of_adding_does_not_matter(
    case: Case, data: st.DataObject, seed: int, length: int, world: int
) -> None:
    played = play(case, draw_vectors(case, seed, world, length))
    one, other = (played.total(data.draw(st.permutations(range(world)))) for _ in range(2))
    if one.is_floating_point():
        torch.testing.assert_close(one, other)
    else:
        assert torch.equal(one, other)


@few
@given(data=st.data(), seed=st.integers(0, 99), length=lengths, world=st.integers(1, 6))
def test_every_granule_may_hold_another_subset(
    case: Case, data: st.DataObject, seed: int, length: int, world: int
) -> None:
    played = play(case, draw_vectors(case, seed, world, length))
    code, lanes = played.code, played.code.lanes(length, played.rounds[0])
    granules = -(-lanes // code.granule)
    few_subsets = [data.draw(st.sets(st.integers(0, world - 1))) for _ in range(3)]
    which = torch.randint(3, (granules,), generator=torch.Generator().manual_seed(seed))
    of_lane = which.repeat_interleave(code.granule)[:lanes]
    totals = [played.total(sorted(subset)) for subset in few_subsets]
    total = torch.stack([torch.where(of_lane == k, totals[k], 0) for k in range(3)]).sum(0)
    counts = torch.tensor([len(subset) for subset in few_subsets])[which]
    mixed = played.decode(total, counts)
    if case.learns and length >= CONV_SIZE:  # a granule is not a run of coordinates there; but decoding is linear
        uniform = [
            played.decode(torch.where(of_lane == k, totals[k], 0), torch.where(which == k, counts, 0)) for k in range(3)
        ]
        torch.testing.assert_close(mixed, sum(uniform), rtol=1e-4, atol=1e-4)
        return
    of_coordinate = of_lane[:length]
    for k in range(3):
        uniform = played.decode(totals[k], len(few_subsets[k]))
        assert torch.equal(mixed[of_coordinate == k], uniform[of_coordinate == k])
        if not few_subsets[k]:
            assert not mixed[of_coordinate == k].any()


@few
@given(seed=st.integers(0, 99), length=lengths, world=st.integers(1, 18), cut=st.integers(0, 20))
def test_both_wire_forms_are_as_long_as_they_say_and_may_be_cut_at_granules(
    case: Case, seed: int, length: int, world: int, cut: int
) -> None:
    played = play(case, draw_vectors(case, seed, world, length))
    wire, lanes = played.wire, played.code.lanes(length, played.rounds[0])
    message, sums, total = played.packed[0], played.messages[0], played.total(list(range(world)))
    assert wire.granule == played.code.granule
    assert message.dtype == torch.uint8
    assert message.numel() == wire.message_bytes(lanes) == -(-lanes * wire.up_width // 8)
    packed = wire.pack_total(total)
    assert packed.dtype == torch.uint8
    assert packed.numel() == wire.total_bytes(lanes) == -(-lanes * wire.down_width // 8)
    here = min(cut * wire.granule, lanes)
    for whole, numbers, read, at in (
        (message, sums, wire.unpack, wire.message_bytes(here)),
        (packed, total, wire.unpack_total, wire.total_bytes(here)),
    ):
        assert numbers.shape == (lanes,)
        for part, expected in ((whole[:at], numbers[:here]), (whole[at:], numbers[here:])):
            assert torch.equal(read(part, len(expected)), expected)
            assert read(part, len(expected)).dtype == sums.dtype
    assert torch.equal(torch.cat([wire.pack_total(total[:here]), wire.pack_total(total[here:])]), packed)


@few
@given(seed=st.integers(0, 99), length=lengths, world=st.integers(1, 18))
def test_a_wire_gives_back_totals_and_adds_messages_in_a_type_that_holds_the_sum(
    case: Case, seed: int, length: int, world: int
) -> None:
    played = play(case, draw_vectors(case, seed, world, length))
    wire, lanes = played.wire, len(played.messages[0])
    exact = torch.stack([message.double() for message in played.messages]).sum(0)
    added = wire.add(played.packed, lanes)
    if added.is_floating_point():
        slack = 1e-6 * torch.stack(played.messages).double().abs().sum(0)
        assert bool(((added - exact).abs() <= slack).all())
    else:
        assert torch.equal(added.double(), exact)
        assert not lanes or int(added.max()) < 2**wire.down_width
    assert added.dtype == played.messages[0].dtype
    assert torch.equal(wire.add(played.packed[:1], lanes), played.messages[0])
    for total in (Total(added, world), Total(wire.pack_total(added), world, packed=True)):
        assert torch.equal(wire.lanes_of(total, lanes), added)


@few
@given(seed=st.integers(0, 99), length=lengths, world=st.integers(1, 6))
def test_shorter_ways_give_the_same(case: Case, seed: int, length: int, world: int) -> None:
    """Bit for bit, but for statistics, whose last bits may depend on the order of adding."""
    vector, memory = draw_vectors(case, seed, 2, length)
    code, this_round = case.coder(length), Round(0, world, 4, BUCKET)
    lanes, owed, left = code.lanes(length, this_round), vector + memory, memory.clone()
    measured = code.measure_owed(vector, memory, this_round)
    assert torch.equal(memory, left)
    torch.testing.assert_close(measured, case.coder(length).measure(owed, this_round), rtol=2**-22, atol=0)
    message = code.encode_owed(vector, left, measured, this_round)
    plain = case.coder(length)
    wire = plain.wire(world)
    assert torch.equal(message, plain.encode(owed, measured, this_round))
    alone = Total(wire.unpack(message, lanes), 1)
    assert torch.equal(left, owed - plain.decode(alone, measured, length, this_round))
    total = wire.add([message] * world, lanes)
    mean = plain.decode(Total(total, world), measured, length, this_round)
    packed = Total(wire.pack_total(total), world, packed=True)
    assert torch.equal(plain.decode(packed, measured, length, this_round), mean)


def test_preparing_leaves_no_trace(case: Case) -> None:
    code, this_round = case.coder(200), Round(0, 2, 4, BUCKET)
    before = str(code.state_dict())
    for world in (2, 256):
        code.prepare(world, torch.device("cpu"))
    assert str(code.state_dict()) == before
    (vector,) = draw_vectors(case, 3, 1, 200)
    stats = code.measure(vector, this_round)
    assert torch.equal(lanes_of(code, vector, stats, this_round), lanes_of(case.coder(200), vector, stats, this_round))


@few
@given(length=lengths, world=st.integers(1, 9))
def test_zeros_give_zeros_and_so_does_a_sum_of_nothing(case: Case, length: int, world: int) -> None:
    played = play(case, [torch.zeros(length) for _ in range(world)])
    assert torch.equal(played.decode(played.total(list(range(world))), world), torch.zeros(length))
    played = play(case, draw_vectors(case, 1, world, length))
    assert torch.equal(played.decode(played.total([]), 0), torch.zeros(length))


@few
@given(
    data=st.data(),
    length=lengths.filter(lambda length: length > 0),
    world=st.integers(1, 5),
    poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_what_is_not_finite_on_one_rank_is_not_finite_on_all(
    case: Case, data: st.DataObject, length: int, world: int, poison: float
) -> None:
    vectors = draw_vectors(case, 2, world, length)
    vectors[data.draw(st.integers(0, world - 1))][data.draw(st.integers(0, length - 1))] = poison
    played = play(case, vectors)
    assert not played.stats.isnan().any()
    mean = played.decode(played.total(list(range(world))), world)
    assert not mean.isfinite().all()


@few
@given(seed=st.integers(0, 99), length=lengths, step=st.integers(0, 2**40))
def test_a_round_can_be_repeated_bit_for_bit_and_strides_do_not_matter(
    case: Case, seed: int, length: int, step: int
) -> None:
    vectors = draw_vectors(case, seed, 2, length)
    strided = [torch.stack((vector, vector), dim=1)[:, 0] for vector in vectors]
    assert length < 2 or not strided[0].is_contiguous()
    first, again = play(case, vectors, step), play(case, strided, step)
    assert torch.equal(first.stats, again.stats)
    first_vectors = draw_vectors(case, seed, 2, length)
    assert all(torch.equal(one, other) for one, other in zip(first.packed, again.packed, strict=True))
    for message in first.packed:
        message.fill_(1)
    assert all(torch.equal(one, other) for one, other in zip(vectors, first_vectors, strict=True))


def test_half_precision_is_coded_like_the_same_numbers_in_single(case: Case) -> None:
    vectors = [vector.to(torch.bfloat16) for vector in draw_vectors(case, 4, 2, 200)]
    half, single = play(case, vectors), play(case, [vector.float() for vector in vectors])
    assert torch.equal(half.messages[1], single.messages[1])


def test_a_stopped_code_goes_on_identically_from_its_state(case: Case) -> None:
    generator = torch.Generator().manual_seed(6)
    code, later = case.coder(200), case.make()
    if case.learns:
        later.arrange(BUCKET, [(200 - CONV_SIZE,), CONV])

    def turn(code: SumCode, vector: Tensor, step: int) -> Tensor:
        this_round = Round(0, 1, step, BUCKET)
        stats = code.measure(vector, this_round)
        mean = code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, len(vector), this_round)
        code.observe(mean, this_round, lambda row: None)
        return mean

    vectors = [case.vector(200, generator) for _ in range(4)]
    for step in (4, 5):
        turn(code, vectors[step - 4], step)
    later.load_state_dict(code.state_dict())
    for step in (6, 7):
        assert torch.equal(turn(code, vectors[step - 4], step), turn(later, vectors[step - 4], step))
    with pytest.raises(CodeError, match="state"):
        later.load_state_dict({"nonsense": 1})


@pytest.mark.parametrize("rounds", [2, 6])
def test_a_malformed_state_is_refused_and_changes_nothing(case: Case, rounds: int) -> None:
    generator = torch.Generator().manual_seed(6)
    code, later = case.coder(200), case.coder(200)
    for step in range(4, 4 + rounds):
        vector, this_round = case.vector(200, generator), Round(0, 1, step, BUCKET)
        stats = code.measure(vector, this_round)
        mean = code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, 200, this_round)
        code.observe(mean, this_round, lambda row: None)
    saved, before = code.state_dict(), str(later.state_dict())
    for wrong in malformed(saved):
        with pytest.raises(CodeError, match="state"):
            later.load_state_dict(wrong)
        assert str(later.state_dict()) == before
    later.load_state_dict(saved)
    assert str(later.state_dict()) == str(saved)


def test_ranks_can_compare_their_settings(case: Case) -> None:
    assert repr(case.make()) == repr(case.make())
    assert len({repr(each.make()) for each in CASES}) == len(CASES)


def test_a_world_too_large_for_the_lanes_is_refused(case: Case) -> None:
    code = case.make()
    if code.max_workers is None:
        assert lanes_of(code, torch.ones(1), code.measure(torch.ones(1), Round(0, 1)), Round(0, 1)).is_floating_point()
        return
    this_round = Round(0, code.max_workers + 1)
    stats = code.measure(torch.ones(9), this_round)
    with pytest.raises(ConfigurationError, match=r"do not fit into 32 bits: use at most \d+ workers"):
        code.encode(torch.ones(9), stats, this_round)
    with pytest.raises(ConfigurationError, match=r"do not fit into 32 bits: use at most \d+ workers"):
        code.wire(this_round.world)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2, 3), "flatten it first"),
        (torch.ones(4, dtype=torch.int64), "floating point"),
        (torch.eye(3).to_sparse(), "sparse gradients cannot be coded"),
    ],
    ids=["matrix", "integers", "sparse"],
)
def test_what_is_no_vector_is_refused(case: Case, wrong: Tensor, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        case.make().measure(wrong, Round(0, 1))


def test_totals_and_counts_that_do_not_fit_are_refused(case: Case) -> None:
    played = play(case, draw_vectors(case, 1, 2, 100))
    total = played.total([0, 1])
    with pytest.raises(CodeError, match="a total of"):
        played.decode(total[:-1], 2)
    with pytest.raises(CodeError, match="found a count of 3"):
        played.decode(total, 3)
    with pytest.raises(CodeError, match="one for each granule"):
        played.decode(total, torch.ones(77, dtype=torch.int64))
    with pytest.raises(CodeError, match="bits take"):
        played.wire.unpack(played.packed[0][:-1], total.numel())
    with pytest.raises(CodeError, match="bits take"):
        played.wire.unpack_total(played.wire.pack_total(total)[:-1], total.numel())
    if played.stats.numel() > 1 and not isinstance(played.code, ErrorFeedback):
        with pytest.raises(CodeError, match="scales"):
            played.code.encode(played.vectors[0], played.stats[:-1], played.rounds[0])
