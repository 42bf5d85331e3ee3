"""THC against its closed forms and the figures it has to reach. The laws are in tests/laws."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evenkeel.coding.sums.thc import THC
from evenkeel.coding.sums.thc_table import clamp_error, rounding_error
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError
from sum_rounds import lanes_of


def mean_of(code: THC, vectors: Sequence[Tensor], step: int = 0) -> Tensor:
    rounds = [Round(rank, len(vectors), step) for rank in range(len(vectors))]
    stats = torch.stack([code.measure(v, p) for v, p in zip(vectors, rounds, strict=True)]).amax(0)
    total = sum(lanes_of(code, v, stats, p).int() for v, p in zip(vectors, rounds, strict=True))
    assert isinstance(total, Tensor)
    return code.decode(Total(total, len(vectors)), stats, len(vectors[0]), rounds[0])


def nmse(code: THC, vectors: Sequence[Tensor]) -> float:
    true = torch.stack(list(vectors)).double().mean(0)
    return float((mean_of(code, vectors) - true).square().sum() / true.square().sum())


def gaussian(workers: int, length: int, correlation: float, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(length, generator=generator)
    return [
        correlation**0.5 * common + (1 - correlation) ** 0.5 * torch.randn(length, generator=generator)
        for _ in range(workers)
    ]


@pytest.mark.parametrize(
    ("bits", "granularity", "p"),
    [
        (4, 17, 1 / 128),
        (4, 30, 1 / 32),
        (4, 15, 1 / 64),
        (3, 16, 1 / 16),
        (2, 3, 1 / 8),
        (2, 11, 1 / 32),
        (5, 31, 1 / 256),
    ],
)
@pytest.mark.parametrize("rounding", ["correlated", "stochastic"])
def test_the_error_of_one_vector_is_the_closed_form(bits: int, granularity: int, p: float, rounding: str) -> None:
    code = THC(bits, granularity, p, rounding)  # type: ignore[arg-type]
    expected = rounding_error(code.table, p) + clamp_error(p)
    assert nmse(code, gaussian(1, 2**17, 0)) == pytest.approx(expected, rel=0.02)


def test_the_rounding_error_of_independent_workers_averages_out_and_the_clamped_part_with_it() -> None:
    code = THC(2, 3, 1e-9, "stochastic")  # nothing is clipped
    expected = rounding_error(code.table, 1e-9) / 8
    vectors = gaussian(8, 2**14, 0)
    true = torch.stack(vectors).double().mean(0)
    error = float((mean_of(code, vectors) - true).square().mean())
    norms = torch.stack([vector.view(-1, 4096).norm(dim=1) for vector in vectors])
    assert error == pytest.approx(expected * float(norms.amax(0).square().mean()) / 4096, rel=0.02)


def test_the_mean_of_eight_gaussian_vectors_at_four_bits() -> None:
    assert nmse(THC(), gaussian(8, 2**16, 0)) <= 0.0112
    assert nmse(THC(), gaussian(8, 2**16, 0.5)) <= 0.0028
    assert nmse(THC(rounding="stochastic"), gaussian(8, 2**15, 0)) > 0.018  # what correlation is worth


def test_layers_of_very_different_sizes_do_not_drown_each_other() -> None:
    generator = torch.Generator().manual_seed(9)
    scales = torch.exp(2 * torch.randn(22, generator=generator)).repeat_interleave(3000)  # layers end inside blocks
    vectors = [vector * scales for vector in gaussian(4, len(scales), 0.5)]
    assert nmse(THC(), vectors) <= 0.010
    assert nmse(THC(block=2**16), vectors) <= 0.010  # one full rotation is as good; only one norm without it is not


def test_many_similar_workers_do_better_with_correlated_than_with_nearest_at_two_bits() -> None:
    vectors = gaussian(8, 2**14, 0.95)
    assert nmse(THC(2, 11, 1 / 32), vectors) < nmse(THC(2, 11, 1 / 32, "nearest"), vectors) / 1.5


@pytest.mark.parametrize("rounding", ["correlated", "stochastic"])
def test_every_rank_for_itself_is_unbiased(rounding: str) -> None:
    code = THC(3, 9, 1e-9, rounding, block=64)  # type: ignore[arg-type]
    pattern = torch.randn(64, generator=torch.Generator().manual_seed(1))
    repeats = 2000
    vector = pattern.repeat(repeats)  # every block has its own signs and thresholds
    for rank in range(3):
        this_round = Round(rank, 3)
        stats = code.measure(vector, this_round)
        decoded = code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, len(vector), this_round)
        errors = (decoded - vector).double().view(repeats, 64)
        along = errors @ pattern.double()
        assert abs(float(along.mean())) < 4 * float(along.std()) / repeats**0.5
        scores = errors.mean(0) / errors.std(0) * repeats**0.5
        assert float(scores.abs().max()) < 4.5
        assert float(scores.square().mean()) < 2


def test_ranks_do_not_round_alike_and_steps_rotate_anew() -> None:
    vector = gaussian(1, 4096, 0)[0]
    code = THC()
    stats = code.measure(vector, Round(0, 2))
    messages = [lanes_of(code, vector, stats, Round(rank, 2, step)) for rank, step in ((0, 0), (1, 0), (0, 1))]
    assert 0.2 < float((messages[0] != messages[1]).float().mean()) < 0.8
    assert float((messages[0] != messages[2]).float().mean()) > 0.8


def test_bits_on_the_wire_of_four_workers() -> None:
    code, this_round = THC(), Round(0, 4)
    length = 4096 * 25
    lanes = code.lanes(length, this_round)
    norms = code.measure(torch.ones(length), this_round).numel() * 4
    wire = code.wire(4)
    sent = (wire.message_bytes(lanes) + wire.total_bytes(lanes)) * 3 / 4 + 2 * 2 * 3 / 4 * norms
    assert 8 * sent / length <= 9.2
    assert (wire.up_width, wire.down_width) == (4, 7)


def test_padding_of_the_last_block_is_at_most_as_long_as_it() -> None:
    code, this_round = THC(), Round(0, 4)
    assert [code.lanes(length, this_round) for length in (1, 3, 4096, 4097, 4096 + 2049)] == [1, 4, 4096, 4097, 8192]


def test_the_sum_goes_from_bytes_to_integers_before_it_would_wrap() -> None:
    code = THC()
    vector = torch.ones(4)
    stats = code.measure(vector, Round(0, 15))
    assert lanes_of(code, vector, stats, Round(0, 15)).dtype == torch.uint8
    assert lanes_of(code, vector, stats, Round(0, 16)).dtype == torch.int32


def test_large_and_small_numbers_keep_their_precision() -> None:
    vector = gaussian(1, 4096, 0)[0]
    for power in (-120, 110):
        this_round = Round(0, 1)
        scaled = vector * 2.0**power
        stats = THC().measure(scaled, this_round)
        decoded = THC().decode(Total(lanes_of(THC(), scaled, stats, this_round), 1), stats, 4096, this_round)
        assert float((decoded.double() / 2.0**power - vector).norm() / vector.norm()) < 0.15


@pytest.mark.parametrize("bits", range(1, 9))
def test_defaults_of_every_number_of_bits_work_and_more_bits_are_better(bits: int) -> None:
    vectors = gaussian(4, 2**13, 0.5)
    limit = (0.36, 0.10, 0.028, 0.008, 0.0025, 0.0007, 0.0003, 0.0001)[bits - 1]
    assert nmse(THC(bits), vectors) < limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits: must be a whole number from 1 to 8, found 0"),
        ({"bits": 9}, "bits: must be a whole number from 1 to 8, found 9"),
        ({"bits": 2.5}, "bits: must be a whole number from 1 to 8, found 2.5"),
        ({"bits": 4.0}, "bits: must be a whole number"),
        ({"bits": "4"}, "bits: must be a whole number from 1 to 8, found '4'"),
        ({"bits": True}, "bits: must be a whole number"),
        ({"granularity": 20.0}, "granularity: must be a whole number, found 20.0"),
        ({"p": "1/32"}, "p: must be a finite number, found '1/32'"),
        ({"block": 4096.0}, "block: must be a whole number, found 4096.0"),
        ({"seed": "a"}, "seed: must be a whole number, found 'a'"),
        ({"rounding": 4}, "rounding: must be one of"),
        ({"granularity": 14}, "granularity: must be 15 to 1024 for 4 bits, found 14"),
        ({"p": 1.5}, "p: the share of clipped coordinates"),
        ({"rounding": "up"}, "rounding: must be one of"),
        ({"block": 3000}, "block: must be a power of two from 8, found 3000"),
        ({"block": 4}, "block: must be a power of two from 8, found 4"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        THC(**settings)  # type: ignore[arg-type]


def test_ranks_with_other_tables_would_notice() -> None:
    code = THC()
    before = repr(code)
    code.table = (*code.table[:5], code.table[5] + 1, *code.table[6:])
    assert repr(code) != before
