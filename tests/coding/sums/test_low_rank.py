"""LowRank: its directions, what stays behind and comes later, and a twin in plain torch. The laws are in tests/laws."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import BucketFactors, LowRank
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import CodeError, ConfigurationError
from sum_rounds import lanes_of

SHAPES = [(10,), (12, 30), (7,), (8, 3, 3, 3), (3, 4), (2,)]
MATRICES = {1: (12, 30), 3: (8, 27)}  # the 3 x 4 matrix would not shrink twice in 2 directions
LENGTH = 10 + 360 + 7 + 216 + 12 + 2
REST = LENGTH - 360 - 216


def chance(seed: int) -> "torch.Generator":
    return torch.Generator().manual_seed(seed)


def arranged(code: SumCode, bucket: int = 0) -> SumCode:
    code.arrange(bucket, SHAPES)
    return code


class Ranks:
    """Ranks that play their rounds one after the other, each with its own code."""

    def __init__(self, make: Callable[[], SumCode], world: int) -> None:
        self.codes = [arranged(make()) for _ in range(world)]
        self.step = 0

    def play(self, vectors: Sequence[Tensor]) -> Tensor:
        rounds = [Round(rank, len(vectors), self.step) for rank in range(len(vectors))]
        each = list(zip(self.codes, vectors, rounds, strict=True))
        stats = torch.stack([code.measure(vector, this_round) for code, vector, this_round in each]).amax(0)
        lanes = self.codes[0].lanes(len(vectors[0]), rounds[0])
        packed = [code.encode(vector, stats, this_round) for code, vector, this_round in each]
        total = self.codes[0].wire(rounds[0].world).add(packed, lanes)
        means = [
            code.decode(Total(total, len(vectors)), stats, len(vectors[0]), this_round) for code, _, this_round in each
        ]
        assert all(torch.equal(mean.nan_to_num(), means[0].nan_to_num()) for mean in means)
        for code, mean, this_round in zip(self.codes, means, rounds, strict=True):
            code.observe(mean, this_round, lambda row: None)
        self.step += 1
        return means[0]

    @property
    def lanes(self) -> int:
        (found,) = {code.lanes(LENGTH, Round(0, len(self.codes), self.step)) for code in self.codes}
        return found


def matrices(vector: Tensor) -> list[Tensor]:
    parts = vector.split([torch.Size(shape).numel() for shape in SHAPES])
    return [parts[number].view(shape) for number, shape in MATRICES.items()]


def with_matrices(rest: Tensor, found: Sequence[Tensor]) -> Tensor:
    first, second, third = rest.split([10, 7, 14])
    return torch.cat([first, found[0].reshape(-1), second, found[1].reshape(-1), third])


def test_it_does_what_a_plain_loop_of_half_power_iterations_with_feedback_does() -> None:
    world, generator = 3, chance(1)
    ranks = Ranks(lambda: ErrorFeedback(LowRank(2)), world)
    bases = [basis.T for basis in ranks.codes[0].state_dict()["code"]["0"]["bases"]]  # of the columns' side
    owed = [[torch.zeros(shape) for shape in MATRICES.values()] for _ in range(world)]
    common = torch.randn(LENGTH, generator=generator)
    for step in range(7):
        vectors = [common + torch.randn(LENGTH, generator=generator) for _ in range(world)]
        expected = []
        for number in range(len(MATRICES)):
            sent = [matrices(vector)[number] + owed[rank][number] for rank, vector in enumerate(vectors)]
            if step % 2 == 0:
                factors = [matrix @ bases[number] for matrix in sent]
                told = [factor @ bases[number].T for factor in factors]
            else:
                factors = [matrix.T @ bases[number] for matrix in sent]
                told = [bases[number] @ factor.T for factor in factors]
            for rank in range(world):
                owed[rank][number] = sent[rank] - told[rank]
            expected.append(torch.stack(told).mean(0))
            bases[number] = torch.linalg.qr(torch.stack(factors).mean(0))[0]
        mean = torch.stack(vectors).mean(0)
        rest = torch.cat([mean[:10], mean[370:377], mean[593:]])
        torch.testing.assert_close(ranks.play(vectors), with_matrices(rest, expected), rtol=1e-4, atol=1e-4)


def test_a_round_tells_one_side_and_the_next_one_the_other() -> None:
    ranks, generator = Ranks(lambda: LowRank(2), 2), chance(2)
    lanes = []
    for _ in range(4):
        lanes.append(ranks.lanes)
        ranks.play([torch.randn(LENGTH, generator=generator) for _ in range(2)])
    assert lanes == [REST + 2 * (12 + 8), REST + 2 * (30 + 27)] * 2


def test_a_gradient_of_low_rank_that_stays_is_recovered() -> None:
    generator = chance(3)
    vector = with_matrices(
        torch.randn(REST, generator=generator),
        [
            torch.randn(m, 2, generator=generator) @ torch.randn(2, k, generator=generator)
            for m, k in ((12, 30), (8, 27))
        ],
    )
    ranks = Ranks(lambda: ErrorFeedback(LowRank(2)), 2)
    for _ in range(3):
        # A round finds all columns, so that the next one tells everything, with what the first one left behind.
        first, second = ranks.play([vector, vector]), ranks.play([vector, vector])
        assert float((first - vector).norm()) > 0.05 * float(vector.norm())
        torch.testing.assert_close(first + second, 2 * vector, rtol=1e-3, atol=1e-3)


def test_directions_become_the_strongest_ones() -> None:
    vector = torch.randn(LENGTH, generator=chance(4))
    ranks = Ranks(lambda: LowRank(3), 1)
    for _ in range(60):
        mean = ranks.play([vector])
    for found, true in zip(matrices(mean), matrices(vector), strict=True):
        u, s, v = torch.linalg.svd(true, full_matrices=False)
        torch.testing.assert_close(found.norm(), s[:3].norm(), rtol=1e-3, atol=0)
        best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        assert float((found - true).norm()) == pytest.approx(float((best - true).norm()), rel=1e-3)


@pytest.mark.parametrize("inner", [None, THC(4, block=64)], ids=["fp32", "thc"])
def test_with_feedback_the_sums_miss_nothing(inner: SumCode | None) -> None:
    generator = chance(5)
    ranks = Ranks(lambda: ErrorFeedback(LowRank(2, inner)), 3)
    given, told = torch.zeros(LENGTH), torch.zeros(LENGTH)
    for _ in range(9):
        vectors = [torch.randn(LENGTH, generator=generator) for _ in range(3)]
        told += ranks.play(vectors)
        given += torch.stack(vectors).mean(0)
    owed = torch.stack([code.state_dict()["memory"][0] for code in ranks.codes]).mean(0)
    assert float(owed.norm()) > 1
    torch.testing.assert_close(told + owed, given, rtol=1e-4, atol=1e-4)


def test_coefficients_travel_through_another_code() -> None:
    code = arranged(LowRank(2, THC(4, block=64)))
    this_round = Round(0, 4)
    assert (code.granule, code.wire(this_round.world).up_width, code.max_workers) == (64, 4, THC(4).max_workers)
    assert code.lanes(LENGTH, this_round) == 72  # 71 numbers, in a block of 64 and one of 8
    exact, vector = arranged(LowRank(2)), torch.randn(LENGTH, generator=chance(6))

    def mean(code: SumCode) -> Tensor:
        stats = code.measure(vector, this_round)
        return code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, LENGTH, this_round)

    error = mean(code) - mean(exact)
    assert 0.01 < float(error.norm() / mean(exact).norm()) < 0.3


def test_first_directions_are_those_of_seed_bucket_and_matrix() -> None:
    def first(bucket: int = 0, **settings: int) -> list[Tensor]:
        code = LowRank(2, **settings)
        code.arrange(bucket, [(6, 20), (9, 20)])
        bases: list[Tensor] = code.state_dict()[str(bucket)]["bases"]
        return bases

    own, other = first()
    torch.testing.assert_close(own @ own.T, torch.eye(2))
    assert all(torch.equal(one, again) for one, again in zip((own, other), first(), strict=True))
    for others in (other, first(1)[0], first(seed=1)[0]):
        assert not torch.allclose(own, others)


@pytest.mark.parametrize("what", [0.0, float("inf"), float("nan")])
def test_means_that_are_zero_or_not_finite_leave_the_directions(what: float) -> None:
    generator = chance(7)
    ranks = Ranks(lambda: ErrorFeedback(LowRank(2)), 2)
    for _ in range(3):
        ranks.play([torch.randn(LENGTH, generator=generator) for _ in range(2)])
    code = ranks.codes[0].inner
    before = code.state_dict()["0"]
    code.observe(torch.full((LENGTH,), what), Round(0, 2, 3), lambda row: None)
    after = code.state_dict()["0"]
    assert before["turned"] == after["turned"]
    assert all(torch.equal(old, new) for old, new in zip(before["bases"], after["bases"], strict=True))


def test_a_round_that_is_not_finite_is_as_if_it_had_not_been() -> None:
    poisoned = Ranks(lambda: ErrorFeedback(LowRank(2)), 2)
    clean = Ranks(lambda: ErrorFeedback(LowRank(2)), 2)
    for seed in range(4):
        vectors = [torch.randn(LENGTH, generator=chance(10 * seed + rank)) for rank in range(2)]
        if seed == 2:
            bad = torch.full((LENGTH,), float("nan"))
            assert not poisoned.play([vectors[0], bad]).isfinite().any()
        torch.testing.assert_close(poisoned.play(vectors), clean.play(vectors))


def test_a_matrix_without_gradient_keeps_its_side_while_others_turn() -> None:
    code = arranged(LowRank(2))
    vector = torch.randn(LENGTH, generator=chance(8))
    vector[10:370] = 0
    code.observe(vector, Round(0, 1), lambda row: None)
    assert code.state_dict()["0"]["turned"] == [True, False]
    assert code.lanes(LENGTH, Round(0, 1, 1)) == REST + 2 * (12 + 27)


def test_extreme_means_give_directions_too() -> None:
    for scale in (1e-38, 1e30):
        code = arranged(LowRank(2))
        code.observe(scale * torch.randn(LENGTH, generator=chance(9)), Round(0, 1), lambda row: None)
        for basis in code.state_dict()["0"]["bases"]:
            torch.testing.assert_close(basis @ basis.T, torch.eye(2), rtol=1e-4, atol=1e-4)


def test_what_does_not_shrink_enough_stays_as_it_is() -> None:
    def coded(rank: int, *shapes: tuple[int, ...], min_ratio: float = 2.0) -> int:
        code, length = LowRank(rank, min_ratio=min_ratio), sum(torch.Size(shape).numel() for shape in shapes)
        code.arrange(0, shapes)
        return code.lanes(length, Round(0, 1))

    assert [coded(rank, (6, 6)) for rank in (1, 3, 4)] == [6, 18, 36]
    assert [coded(2, (6, 6), min_ratio=ratio) for ratio in (3, 3.1)] == [12, 36]
    assert coded(3, (3, 90), min_ratio=1) == 270  # as many directions as rows tell nothing in fewer
    assert coded(1, (5,), (0, 4), (), (1, 9)) == 5 + 0 + 1 + 9


def test_a_bucket_that_was_not_arranged_is_a_row_of_numbers() -> None:
    code, vector, this_round = LowRank(1), torch.arange(50.0), Round(0, 1)
    stats = code.measure(vector, this_round)
    assert torch.equal(code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, 50, this_round), vector)
    code.observe(vector, this_round, lambda row: None)
    assert code.state_dict() == {}


def test_a_round_projects_each_vector_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    project = BucketFactors.project

    def counted(self: BucketFactors, vector: Tensor) -> Tensor:
        calls.append(vector)
        return project(self, vector)

    monkeypatch.setattr(BucketFactors, "project", counted)
    for code in (LowRank(2, THC(4)), ErrorFeedback(LowRank(2, THC(4)))):
        ranks = Ranks(lambda code=code: code, 1)  # type: ignore[misc]
        vector = torch.randn(LENGTH, generator=chance(11))
        ranks.play([vector])
        calls.clear()
        ranks.play([vector])
        assert len(calls) == 1


def test_what_was_written_to_since_it_was_measured_is_projected_anew() -> None:
    this_round, vector = Round(0, 1), torch.randn(LENGTH, generator=chance(12))
    code = arranged(LowRank(2))
    stats = code.measure(vector, this_round)
    vector *= 2
    assert torch.equal(
        lanes_of(code, vector, stats, this_round), lanes_of(arranged(LowRank(2)), vector, stats, this_round)
    )


def test_a_state_of_other_settings_is_refused() -> None:
    state = arranged(LowRank(2)).state_dict()
    later = LowRank(2, seed=5)
    later.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(later.state_dict()["0"]["bases"], state["0"]["bases"], strict=True))
    for other in (LowRank(1), LowRank(2, min_ratio=9)):
        with pytest.raises(CodeError, match="not the state of a LowRank code with these settings"):
            other.load_state_dict(state)


def test_other_shapes_and_lengths_are_refused() -> None:
    code = arranged(LowRank(2))
    arranged(code)
    with pytest.raises(CodeError, match="bucket 0 was arranged as"):
        code.arrange(0, SHAPES[:-1])
    for use in (code.measure, lambda vector, this_round: code.observe(vector, this_round, lambda row: None)):
        with pytest.raises(CodeError, match=f"arranged with {LENGTH} coordinates, but its vector has 9"):
            use(torch.ones(9), Round(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: must be a whole number of 1 or more, found 0"),
        ({"rank": 1.5}, "rank: must be a whole number of 1 or more, found 1.5"),
        ({"min_ratio": 0.5}, "min_ratio: must be a finite number of 1 or more, found 0.5"),
        ({"min_ratio": float("nan")}, "min_ratio: must be a finite number of 1 or more, found nan"),
        ({"min_ratio": "2"}, "min_ratio: must be a finite number of 1 or more, found '2'"),
        ({"seed": 0.5}, "seed: must be a whole number, found 0.5"),
        ({"inner": "thc"}, r"inner: must be a sum code such as THC\(bits=4\), or None, found 'thc'"),
        ({"inner": THC}, "inner: must be a sum code"),
        ({"inner": ErrorFeedback(THC())}, r"inner: must be a code without memory.*ErrorFeedback\(LowRank"),
        ({"inner": GradiVeQ()}, "inner: must be a code without memory"),
        ({"inner": LowRank()}, "inner: must be a code without memory"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LowRank(**settings)  # type: ignore[arg-type]
