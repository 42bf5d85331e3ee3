"""GradiVeQ: its turns, what travels in each, and that all ranks do the same. The laws are in tests/laws."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import CodeError, ConfigurationError
from sum_rounds import lanes_of

SHAPES = [(10,), (8, 8, 3, 3), (5, 4), (4, 8, 1, 1), (4,)]
LENGTH = 10 + 576 + 20 + 32 + 4
WEIGHTS = slice(10, 586)  # of the 3 x 3 convolution
DIRECTIONS = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))[0]


def small(**settings: object) -> GradiVeQ:
    defaults: dict[str, object] = {"ratio": 4, "sample_steps": 4, "code_steps": 3, "turns": 9, "longest_slice": 64}
    return GradiVeQ(**(defaults | settings))  # type: ignore[arg-type]


def gradient(generator: "torch.Generator", noise: float = 0.0) -> Tensor:
    """A bucket whose 3 x 3 convolution has nine slices in three directions."""
    slices = torch.randn(9, 3, generator=generator) @ DIRECTIONS.T + noise * torch.randn(9, 64, generator=generator)
    weights = slices.view(3, 3, 8, 8).permute(3, 2, 0, 1).reshape(-1)
    rest = torch.randn(LENGTH - 576, generator=generator)
    return torch.cat((rest[:10], weights, rest[10:]))


class Cluster:
    """Ranks that play their rounds one after the other; broadcasts go from rank 0 to the others."""

    def __init__(self, make: Callable[[], GradiVeQ | ErrorFeedback], world: int) -> None:
        self.codes = [make() for _ in range(world)]
        self.step = 0
        for code in self.codes:
            code.arrange(0, SHAPES)

    def play(self, vectors: list[Tensor]) -> Tensor:
        rounds = [Round(rank, len(self.codes), self.step) for rank in range(len(self.codes))]
        triples = list(zip(self.codes, vectors, rounds, strict=True))
        stats = torch.stack([code.measure(vector, this_round) for code, vector, this_round in triples]).amax(0)
        total = sum(lanes_of(code, vector, stats, this_round) for code, vector, this_round in triples)
        assert isinstance(total, Tensor)
        means = [c.decode(Total(total, len(vectors)), stats, LENGTH, this_round) for c, _, this_round in triples]
        assert all(torch.equal(mean, means[0]) for mean in means)
        sent: list[Tensor] = []
        for code, _, this_round in triples:
            received = iter(list(sent))

            def broadcast(row: Tensor, rank: int = this_round.rank, received: "object" = received) -> None:
                if rank == 0:
                    sent.append(row.clone())
                else:
                    row.copy_(next(received))  # type: ignore[call-overload]

            code.observe(means[0], this_round, broadcast)
            assert this_round.rank == 0 or next(received, None) is None
        self.step += 1
        return means[0]

    @property
    def lanes(self) -> int:
        found = {code.lanes(LENGTH, Round(0, len(self.codes), self.step)) for code in self.codes}
        assert len(found) == 1
        return found.pop()


def slices_of(vector: Tensor) -> Tensor:
    return vector[WEIGHTS].view(8, 8, 3, 3).permute(2, 3, 1, 0).reshape(9, 64)


def test_after_the_first_rounds_what_is_in_the_basis_is_kept_in_few_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    cluster = Cluster(lambda: small(ratio=4), 3)
    lanes = []
    for _ in range(4 + 9):
        vectors = [gradient(generator) for _ in range(3)]
        lanes.append(cluster.lanes)
        error = cluster.play(vectors) - torch.stack(vectors).mean(0)
        # The 1 x 1 convolution is one slice of 32 random values.
        error[606:638] = 0
        assert float(error.abs().max()) < 1e-4
    rest = 10 + 20 + 4
    # A ninth of the slices whole, 64 / 4 - 64 / 9 directions would do, and 3 are needed.
    assert lanes[:5] == [LENGTH] * 4 + [rest + 8 * 3 + 64 + 32]
    assert max(lanes[5:]) < 0.3 * LENGTH


def test_each_slice_travels_whole_in_its_turn() -> None:
    generator = torch.Generator().manual_seed(11)
    cluster = Cluster(lambda: small(code_steps=100), 2)
    for _ in range(4):
        cluster.play([gradient(generator) for _ in range(2)])
    for turn in range(2 * 9):
        vectors = [torch.randn(LENGTH, generator=generator) for _ in range(2)]
        errors = slices_of(cluster.play(vectors) - torch.stack(vectors).mean(0)).norm(dim=1)
        assert (errors < 1e-4).nonzero().tolist() == [[turn % 9]]


def test_directions_are_learnt_anew_from_slices_that_travelled_whole() -> None:
    generator = torch.Generator().manual_seed(12)
    cluster = Cluster(lambda: small(code_steps=9), 2)
    for _ in range(4):
        cluster.play([gradient(generator) for _ in range(2)])
    others = torch.linalg.qr(torch.randn(64, 3, generator=generator))[0]
    losses = []
    for _ in range(4 * 9 + 1):
        drawn = torch.randn(9, 3, generator=generator) @ others.T
        vector = torch.zeros(LENGTH)
        vector[WEIGHTS] = drawn.view(3, 3, 8, 8).permute(3, 2, 0, 1).reshape(-1)
        losses.append(float((cluster.play([vector, vector]) - vector).norm() / vector.norm()))
    assert losses[0] > 0.5
    assert losses[-1] < 1e-3


def test_error_feedback_sends_in_its_turn_what_the_basis_leaves_out() -> None:
    generator = torch.Generator().manual_seed(2)
    cluster = Cluster(lambda: ErrorFeedback(small(code_steps=100)), 2)
    for _ in range(4):
        cluster.play([gradient(generator, 0.1) for _ in range(2)])
    given_sum, decoded = torch.zeros(LENGTH), torch.zeros(LENGTH)
    for _ in range(5):
        vectors = [gradient(generator, 0.1) for _ in range(2)]
        decoded += cluster.play(vectors)
        given_sum += torch.stack(vectors).mean(0)
    owed = torch.stack([code.state_dict()["memory"][0] for code in cluster.codes]).mean(0)
    assert float(owed.norm()) > 0.1
    torch.testing.assert_close(decoded + owed, given_sum, atol=1e-4, rtol=1e-4)
    before = slices_of(owed).norm(dim=1)
    for _ in range(9 - 5):
        cluster.play([torch.zeros(LENGTH)] * 2)
    owed = torch.stack([code.state_dict()["memory"][0] for code in cluster.codes]).mean(0)
    assert (slices_of(owed).norm(dim=1)[5:] < 1e-4).all()
    assert (before[5:] > 0.1).all()


def test_coefficients_travel_through_another_code() -> None:
    generator = torch.Generator().manual_seed(3)
    cluster = Cluster(lambda: small(inner=THC(8, block=64)), 4)
    for _ in range(5):
        vectors = [gradient(generator) for _ in range(4)]
        mean = cluster.play(vectors)
    code = cluster.codes[0]
    assert (code.wire(4).up_width, code.granule) == (8, 64)
    weights = slice(10, 586)
    true = torch.stack(vectors).mean(0)[weights]
    assert float((mean[weights] - true).norm() / true.norm()) < 0.05
    assert cluster.lanes < 0.4 * LENGTH


def test_the_loss_is_reported_while_compressed() -> None:
    generator = torch.Generator().manual_seed(4)
    cluster = Cluster(lambda: small(loss=0.05), 1)
    assert cluster.codes[0].lost(0) == []
    for _ in range(4):
        cluster.play([gradient(generator, 0.05)])
    lost = cluster.codes[0].lost(0)
    assert 0.001 < lost[0] < 0.2
    assert len(lost) == 2


def test_layers_without_gradient_stay_as_they_are() -> None:
    cluster = Cluster(small, 2)
    for _ in range(4):
        cluster.play([torch.zeros(LENGTH)] * 2)
    assert cluster.lanes == LENGTH
    vector = gradient(torch.Generator().manual_seed(5))
    torch.testing.assert_close(cluster.play([vector, vector]), vector)


def test_layers_too_small_for_the_ratio_stay_as_they_are() -> None:
    code = small(ratio=8, turns=100)
    code.arrange(0, [(4, 1, 1, 1), (1, 1, 3, 3)])
    for step in range(4):
        code.observe(torch.arange(13.0), Round(0, 1, step), lambda row: None)
    assert code.lanes(13, Round(0, 1, 4)) == 4 + 9  # the first slice's turn
    code.observe(torch.arange(13.0), Round(0, 1, 4), lambda row: None)
    assert code.lanes(13, Round(0, 1, 5)) == 4 + 1  # a slice of 4 cannot be compressed 8 times, one of 9 can


def test_rounds_that_are_not_finite_teach_nothing() -> None:
    generator = torch.Generator().manual_seed(6)
    cluster = Cluster(small, 1)
    for step in range(4):
        cluster.play([torch.full((LENGTH,), float("inf")) if step == 1 else gradient(generator)])
    vector = gradient(generator)
    assert cluster.lanes < LENGTH
    torch.testing.assert_close(cluster.play([vector])[10:586], vector[10:586], atol=1e-4, rtol=1e-4)


def test_all_slices_get_their_turn_where_there_are_many() -> None:
    code = GradiVeQ(ratio=1, sample_steps=4, code_steps=3, longest_slice=2)
    code.arrange(0, [(2, 1, 30, 30)])
    # Steps sample every 225th of 900 slices, starting elsewhere; energy is in one slice that step 0 does not sample.
    for step in range(4):
        mean = torch.zeros(1800)
        mean.view(2, 900)[:, torch.arange(900) % 225 == (step + 1) % 225] = 1.0
        code.observe(mean, Round(0, 1, step), lambda row: None)
    assert code.turns == 4
    assert code.lanes(1800, Round(0, 1, 4)) == 225 * 2 + 675


def test_a_bucket_that_was_not_arranged_is_a_row_of_numbers() -> None:
    code = small()
    vector = torch.arange(50.0)
    for step in range(6):
        this_round = Round(0, 1, step)
        stats = code.measure(vector, this_round)
        assert torch.equal(
            code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, 50, this_round), vector
        )
        code.observe(vector, this_round, lambda row: None)


def test_most_of_the_traffic_of_a_short_training_is_saved_sampling_included() -> None:
    generator = torch.Generator().manual_seed(7)
    code = GradiVeQ(longest_slice=64)
    code.arrange(0, [(8, 8, 3, 3)])
    this_round, lanes = Round(0, 4), 0
    for step in range(300):
        lanes += code.lanes(576, this_round)
        code.observe(gradient(generator)[10:586], Round(0, 4, step), lambda row: None)
    assert 576 * 300 / lanes > 6


@pytest.mark.parametrize("rounds", [6, 9 + 6])
def test_a_resume_with_fewer_steps_and_turns_goes_on_with_those(rounds: int) -> None:
    generator = torch.Generator().manual_seed(8)
    before, later = small(sample_steps=9, code_steps=9), small(sample_steps=4, code_steps=3, turns=5)
    before.arrange(0, SHAPES)
    for step in range(rounds):
        before.observe(gradient(generator), Round(0, 1, step), lambda row: None)
    later.load_state_dict(before.state_dict())
    told: list[Tensor] = []
    later.observe(gradient(generator), Round(0, 1, rounds), told.append)
    assert told  # directions, at once
    vector = gradient(generator)
    stats = later.measure(vector, Round(0, 1, rounds + 1))
    message = lanes_of(later, vector, stats, Round(0, 1, rounds + 1))
    assert 642 / 4 < len(message) < LENGTH / 2
    mean = later.decode(Total(message, 1), stats, LENGTH, Round(0, 1, rounds + 1))
    torch.testing.assert_close(mean[WEIGHTS], vector[WEIGHTS], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rounds", [0, 2, 6])
def test_a_state_learnt_from_slices_of_other_sizes_is_refused(rounds: int) -> None:
    generator = torch.Generator().manual_seed(13)
    before, alike, other = (small(longest_slice=None, code_steps=steps) for steps in (100, 100, 1))
    before.arrange(0, SHAPES)
    for step in range(rounds):
        before.observe(gradient(generator), Round(0, 1, step), lambda row: None)
    alike.load_state_dict(before.state_dict())
    assert alike.lanes(LENGTH, Round(0, 1, rounds)) == before.lanes(LENGTH, Round(0, 1, rounds))
    if rounds:
        with pytest.raises(CodeError, match="slices of other sizes: load it into one with the same longest_slice"):
            other.load_state_dict(before.state_dict())


def test_other_shapes_and_lengths_are_refused() -> None:
    code = small()
    code.arrange(0, SHAPES)
    code.arrange(0, SHAPES)
    with pytest.raises(CodeError, match="bucket 0 was arranged as"):
        code.arrange(0, SHAPES[:-1])
    with pytest.raises(CodeError, match="arranged with 642 coordinates, but its vector has 9"):
        code.measure(torch.ones(9), Round(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": 0}, "loss: must be between 0 and 1"),
        ({"loss": 1.0}, "loss: must be between 0 and 1"),
        ({"loss": "0.1"}, "loss: must be a finite number, found '0.1'"),
        ({"ratio": 0.5}, "ratio: must be a finite number of 1 or more, found 0.5"),
        ({"sample_steps": 3}, "sample_steps: must be a whole number of 4 or more, found 3"),
        ({"sample_steps": 4.5}, "sample_steps: must be a whole number of 4 or more, found 4.5"),
        ({"code_steps": 0}, "code_steps: must be a whole number of 1 or more, found 0"),
        ({"code_steps": 5.5}, "code_steps: must be a whole number of 1 or more, found 5.5"),
        ({"longest_slice": 64.5}, "longest_slice: must be a whole number, found 64.5"),
        ({"inner": "thc"}, r"inner: must be a sum code such as THC\(bits=4\), or None, found 'thc'"),
        ({"longest_slice": 3}, "longest_slice: must be at least the ratio 4, found 3"),
        ({"turns": 4}, "turns: must be more than the ratio 4, found 4"),
        ({"turns": 8.5}, "turns: must be a whole number of 2 or more, found 8.5"),
        ({"inner": ErrorFeedback(THC())}, r"inner: must be a code without memory.*ErrorFeedback\(GradiVeQ"),
        ({"inner": GradiVeQ()}, "inner: must be a code without memory"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small(**settings)
