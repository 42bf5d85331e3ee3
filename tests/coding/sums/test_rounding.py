"""Thresholds: uniform for each rank, and spread evenly over the ranks where they are correlated."""

import pytest
import torch

from evenkeel.coding.sums.rounding import check_rounding, rank_order, thresholds
from evenkeel.coding.wire import Round
from evenkeel.errors import ConfigurationError

CPU = torch.device("cpu")


def of_all(rounding: str, world: int, length: int, step: int = 0) -> "torch.Tensor":
    rows = [thresholds(rounding, length, 3, Round(rank, world, step), CPU) for rank in range(world)]  # type: ignore[arg-type]
    return torch.stack(rows)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 130])
def test_correlated_ranks_share_out_the_strata_of_each_coordinate(world: int) -> None:
    strata = (of_all("correlated", world, 200).double() * world - 1e-5).floor().clamp(min=0)
    assert torch.equal(strata.sort(dim=0).values, torch.arange(world).double()[:, None].expand(-1, 200))


@pytest.mark.parametrize("rounding", ["correlated", "stochastic"])
def test_each_rank_for_itself_is_uniform(rounding: str) -> None:
    for row in of_all(rounding, 5, 20_000):
        counts = torch.histc(row, 20, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 19 + 4 * (2 * 19) ** 0.5


def test_stochastic_ranks_are_independent_and_correlated_ones_are_apart() -> None:
    stochastic = torch.corrcoef(of_all("stochastic", 4, 20_000))
    assert float((stochastic - torch.eye(4)).abs().max()) < 4 / 20_000**0.5
    rounds = [torch.corrcoef(of_all("correlated", 4, 5_000, step)) for step in range(12)]
    off_diagonal = torch.stack(rounds).mean(0)[~torch.eye(4, dtype=torch.bool)]
    # Strata drawn without replacement correlate by -1/(world - 1), and hold all but 1/world^2 of the variance: -.31.
    assert float((off_diagonal + 0.3125).abs().max()) < 0.15


def test_any_two_ranks_are_every_distance_apart_over_rounds() -> None:
    distances = {(rank_order(0, Round(1, 5, step)) - rank_order(0, Round(0, 5, step))) % 5 for step in range(60)}
    assert distances == {1, 2, 3, 4}
    assert sorted(rank_order(0, Round(rank, 5, 9)) for rank in range(5)) == list(range(5))


def test_steps_buckets_and_seeds_draw_anew() -> None:
    drawn = [
        thresholds("stochastic", 50, seed, Round(0, 2, step, bucket), CPU)
        for seed, step, bucket in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert float((one == other).float().mean()) < 0.1


def test_nearest_is_one_half_and_other_names_are_refused() -> None:
    assert thresholds("nearest", 3, 0, Round(0, 1), CPU).tolist() == [0.5] * 3
    with pytest.raises(ConfigurationError, match="rounding: must be one of correlated, stochastic, nearest"):
        check_rounding("up")
