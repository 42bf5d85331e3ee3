"""Decides where to round up: a threshold for each coordinate, compared with its place between two levels."""

from typing import Literal, get_args

import torch
from torch import Tensor

from evenkeel.coding.sums.counter_hash import Stream, counters, key, mix, uniform
from evenkeel.coding.wire import Round
from evenkeel.errors import ConfigurationError

__all__ = ["Rounding", "check_rounding", "float32", "rank_order", "thresholds"]

Rounding = Literal["correlated", "stochastic", "nearest"]
_MASK = 0xFFFFFFFF


def check_rounding(rounding: str) -> None:
    """Raises a ConfigurationError unless there is such a rounding."""
    if rounding not in get_args(Rounding):
        raise ConfigurationError(f"rounding: must be one of {', '.join(get_args(Rounding))}, found {rounding!r}")


def thresholds(rounding: Rounding, length: int, seed: int, this_round: Round, device: torch.device) -> Tensor:
    """Gives thresholds u, float32 `[length]`: a share f of the way to the next level is rounded up if u < f.

    - `nearest`: u = 1/2. Least error of one vector, but its bias does not average out over workers.
    - `stochastic`: u uniform in [0, 1), independent over ranks. Unbiased.
    - `correlated`: u = (stratum + v) / world, where the ranks share out the strata 0..world-1 of each coordinate at
      random and v is private and uniform. Each u is uniform, so every vector is rounded without bias; but the ranks'
      u are spread evenly, so the errors of similar vectors cancel. Source: Suresh, Sun, Ro, Yu, "Correlated
      quantization for distributed mean estimation" (ICML 2022).

    Their permutation of the strata is drawn per coordinate from all world! of them; here the ranks are put into one
    random order per step and bucket, and each coordinate turns that circle by a random amount. Any two ranks' strata
    differ by every amount equally often, over rounds, as with a full permutation, and the variance of a sum depends on
    pairs only.
    """
    if rounding == "nearest":
        return torch.full((length,), 0.5, dtype=torch.float32, device=device)
    words = mix(counters(length, device) + key(seed, this_round.step, this_round.bucket, Stream.STRATA) & _MASK)
    private = uniform(mix(words ^ key(seed, this_round.step, this_round.bucket, Stream.PRIVATE, this_round.rank)))
    if rounding == "stochastic":
        return private
    strata = (words * this_round.world >> 32) + rank_order(seed, this_round)
    strata = torch.where(strata >= this_round.world, strata - this_round.world, strata)
    return (strata.to(torch.float32) + private) * float32(1 / this_round.world)


def rank_order(seed: int, this_round: Round) -> int:
    """Says where this rank stands in the round's random order of ranks, 0..world-1; all ranks use the same order."""
    base = key(seed, this_round.step, this_round.bucket, Stream.ORDER)
    lots = [mix(base ^ rank) for rank in range(this_round.world)]  # all different, since `mix` is one to one
    return sum(lot < lots[this_round.rank] for lot in lots)


def float32(number: float) -> float:
    """Rounds a number to what float32 holds, so that kernels in any language multiply by the same constant."""
    return float(torch.tensor(number, dtype=torch.float32, device="cpu"))
