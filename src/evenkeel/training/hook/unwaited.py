"""Averages what is coded without waiting for late ranks: nothing of a round needs an answer from all of them.

Two things would: the statistics that all ranks encode with, and what is averaged uncompressed. So statistics are those
of the round before, which travelled as one more sum: the mean of their logarithms over the ranks that were on time.
They fit nearly as well as the round's own, with a margin; what they clip stays in error feedback. And what is not
compressed goes as 16-bit numbers with error feedback of its own. The first round of a unit still waits for all.

For codes whose statistics are scales: zero or more, infinite where a vector is not finite.

Not kept here: exact zeros of rows and columns, since no rank knows where all others have zeros.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode, count_per_granule
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.integer_lanes import IntegerWire, pack_bits
from evenkeel.coding.wire import Round
from evenkeel.reducers.reducer import Reducer

__all__ = ["Unwaited"]

_MARGIN = 1.1  # more is clipped less, and rounded to coarser levels
_STEPS, _LEAST = 128, -126.0  # of a statistic's logarithm: for each doubling, and where they begin
_GRANULE = 64
# So much more than the logarithms of 32 ranks together that a sum of them that holds an infinity shows it.
_BITS = 22
_INFINITE = (1 << _BITS) - 1
_PLAIN = 1 << 20  # begins the numbers of units that are not compressed


@dataclass
class Unwaited:
    """Keeps the statistics of each unit's last round, alike on all ranks.

    Attributes:
        plain_code: for what is not compressed.
    """

    plain_code: ErrorFeedback = field(default_factory=lambda: ErrorFeedback(FixedPoint(bits=16, block=_GRANULE)))
    _known: dict[int, Tensor] = field(default_factory=dict)

    def average(self, vector: Tensor, code: SumCode, this_round: Round, reducer: Reducer) -> Tensor:
        """Gives the mean of the ranks' vectors that were on time.

        Args:
            vector: this rank's, float32 `[length]`.
            code: what codes it.
            this_round: whose it is; `bucket` numbers the unit.
            reducer: who adds.

        Raises:
            ReducerError: a peer is gone or silent.
        """
        known = self._known.get(this_round.bucket)
        own = code.measure(vector, this_round)
        if known is not None:
            stats = known * _MARGIN
            if not bool(own.isfinite().all()):
                vector = torch.zeros_like(vector)  # it must not get into what error feedback owes
        else:
            stats = reducer.ranks.largest(own) if own.numel() else own
            known = torch.where(stats.isfinite(), stats, 0.0)
        mean = self._sum(vector, code, stats, this_round, reducer)
        if not own.numel():
            return mean
        self._known[this_round.bucket], infinite = _agreed(own, known, this_round, reducer)
        return torch.full_like(mean, torch.nan) if infinite else mean

    def average_plain(self, vector: Tensor, this_round: Round, reducer: Reducer) -> Tensor:
        """Does the same for what is not compressed."""
        apart = Round(this_round.rank, this_round.world, this_round.step, this_round.bucket + _PLAIN)
        return self.average(vector, self.plain_code, apart, reducer)

    def forget(self) -> None:
        """Waits for all ranks once more: after buckets were rebuilt."""
        self._known.clear()

    @staticmethod
    def _sum(vector: Tensor, code: SumCode, stats: Tensor, this_round: Round, reducer: Reducer) -> Tensor:
        length = vector.numel()
        message, lanes = code.encode(vector, stats, this_round), code.lanes(length, this_round)
        total = reducer.total(code.wire(this_round.world), message, lanes, this_round)
        if total.lost is not None:
            code.dropped(this_round, total.lost)
        return code.decode(total, stats, length, this_round)


def _agreed(own: Tensor, known: Tensor, this_round: Round, reducer: Reducer) -> tuple[Tensor, bool]:
    """Gives the mean of the ranks' statistics, those known where nobody was on time; and whether one was infinite."""
    wire, count = IntegerWire(_BITS, _INFINITE, _GRANULE, this_round.world), own.numel()
    total = reducer.total(wire, pack_bits(_logarithms(own), _BITS), count, this_round)
    sums = wire.lanes_of(total, count).to(torch.int64)
    granules = count_per_granule(total.count, -(-count // _GRANULE), this_round, sums.device)
    counts = granules.repeat_interleave(_GRANULE)[:count]
    infinite = sums >= _INFINITE
    means = torch.exp2((sums / counts.clamp(min=1) - 1) / _STEPS + _LEAST).to(torch.float32)
    means = torch.where(sums > 0, means, 0.0)
    return torch.where((counts > 0) & ~infinite, means, known), bool(infinite.any())


def _logarithms(stats: Tensor) -> Tensor:
    """Writes statistics as whole numbers that add up: 0 for zero, the largest for infinity."""
    levels = ((stats.clamp(2.0**_LEAST, 2.0**-_LEAST).log2() - _LEAST) * _STEPS).round().to(torch.int32) + 1
    return torch.where(stats.isfinite(), torch.where(stats > 0, levels, 0), _INFINITE)
