"""Averages what is coded without waiting for late ranks: nothing of a round needs an answer from all of them.

Two things would: the statistics that all ranks encode with, and what is averaged uncompressed. So statistics are those
of the round before, which travelled as one more sum: the mean of their logarithms over the ranks that were on time.
They fit nearly as well as the round's own, with a margin; what they clip stays in error feedback. And what is not
compressed goes as 16-bit numbers with error feedback of its own. The first round of a unit still waits for all.

For codes whose statistics are scales: zero or more, infinite where a vector is not finite.

Not kept here: exact zeros of rows and columns, since no rank knows where all others have zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.coding.saved_state import saved_fields, saved_numbers, saved_tensor
from evenkeel.coding.sum_code import SumCode, count_per_granule
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.integer_lanes import IntegerWire, pack_bits
from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.errors import CodeError
from evenkeel.reducers.reducer import Reducer
from evenkeel.training.hook.parameter_book import Units

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
    """Keeps the statistics of each unit's last round, alike on all ranks, and what is owed of what is not compressed.

    Attributes:
        plain_code: for what is not compressed.
        plain_units: what is not compressed, in units that survive when DDP rebuilds its buckets.
    """

    plain_code: ErrorFeedback = field(default_factory=lambda: ErrorFeedback(FixedPoint(bits=16, block=_GRANULE)))
    plain_units: Units = field(default_factory=Units)
    _known: dict[int, Tensor] = field(default_factory=dict)

    def plain_covering(self, members: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Gives the units that make up what is not compressed of a bucket: number -> parameter numbers."""
        if not members:
            return {}
        covering, given_up = self.plain_units.covering(members)
        for number in given_up:
            self.plain_code.reset(number + _PLAIN)
            self._known.pop(number + _PLAIN, None)
        return covering

    def average(
        self,
        vectors: Sequence[tuple[int, Tensor]],
        code: SumCode,
        plain: Sequence[tuple[int, Tensor]],
        reducer: Reducer,
        step: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gives the means of the ranks' vectors that were on time: a sum for each, and one for all the rest.

        Args:
            vectors: this rank's units, float32 `[length]` each, with their numbers.
            code: what codes them.
            plain: what is not compressed, likewise, with the numbers of `plain_covering`.
            reducer: who adds.
            step: number of the training step.

        Raises:
            ReducerError: a peer is gone or silent.
        """
        ranks = reducer.ranks
        units = [
            _Summand.of(vector, code, Round(ranks.rank, ranks.world, step, number), self._known, reducer)
            for number, vector in vectors
        ]
        means = [unit.mean(reducer.total(unit.wire, unit.message, unit.lanes, unit.this_round)) for unit in units]
        asides = [
            _Summand.of(
                vector, self.plain_code, Round(ranks.rank, ranks.world, step, number + _PLAIN), self._known, reducer
            )
            for number, vector in plain
        ]
        rows = [_logarithms(unit.own) for unit in (*units, *asides)]
        rows += [aside.wire.unpack(aside.message, aside.lanes).to(torch.int32) for aside in asides]
        found = iter(_summed(rows, Round(ranks.rank, ranks.world, step), reducer))
        means = [self._agree(unit, next(found), mean) for unit, mean in zip(units, means, strict=True)]
        statistics = [next(found) for _ in asides]
        plain_means = [
            self._agree(aside, logarithms, aside.mean(total))
            for aside, logarithms, total in zip(asides, statistics, found, strict=True)
        ]
        return means, plain_means

    def forget(self) -> None:
        """Waits for all ranks once more: after buckets were rebuilt."""
        self._known.clear()

    def reset(self) -> None:
        """Forgets everything."""
        self.plain_code.reset()
        self.plain_units = Units()
        self._known.clear()

    def state_dict(self) -> dict[str, Any]:
        """Gives what a resume needs; nothing where there was no round yet.

        Nothing at all, so that `torch.distributed.checkpoint` asks no field of a file that is older than this.
        """
        if not self._known:
            return {}
        known = {str(number): statistics.clone() for number, statistics in self._known.items()}
        return {"known": known, "plain": self.plain_code.state_dict(), "units": self.plain_units.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in an object that was not used yet.

        Raises:
            CodeError: it is malformed.
        """
        if not isinstance(state, Mapping):
            raise CodeError(f"unwaited: the state must have a dictionary here, found {type(state).__name__}")
        if not state:
            return
        saved_fields("unwaited", state, ("known", "plain", "units"))
        self.plain_code.load_state_dict(state["plain"])
        self.plain_units.load_state_dict(state["units"])
        for number, statistics in saved_numbers("unwaited.known", state["known"]).items():
            known = saved_tensor(f"unwaited.known[{number}]", statistics, (None,))
            if bool((known < 0).any()):
                raise CodeError(f"unwaited.known[{number}]: the state has a scale below zero")
            self._known[number] = known.to(torch.float32, copy=True)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raises CodeError unless what is owed fits parameters of `sizes`."""
        self.plain_units.check_sizes(sizes, saved_numbers("memory", self.plain_code.state_dict()["memory"]), _PLAIN)

    def _agree(self, unit: "_Summand", total: Total, mean: Tensor) -> Tensor:
        """Takes over the mean of the ranks' statistics; gives the unit's mean, not finite where a rank's was not."""
        count = unit.own.numel()
        if not count:
            return mean
        assert isinstance(total.count, Tensor)
        sums, counts = total.sums, total.count.repeat_interleave(_GRANULE)[:count]
        infinite = sums >= _INFINITE
        means = torch.exp2((sums / counts.clamp(min=1) - 1) / _STEPS + _LEAST).to(torch.float32)
        means = torch.where(sums > 0, means, 0.0)
        self._known[unit.this_round.bucket] = torch.where((counts > 0) & ~infinite, means, unit.known)
        return torch.full_like(mean, torch.nan) if bool(infinite.any()) else mean


@dataclass(frozen=True)
class _Summand:
    """Holds a vector about to be summed: its message, and the statistics that it was encoded with."""

    code: SumCode
    this_round: Round
    length: int
    own: Tensor
    known: Tensor
    stats: Tensor
    message: Tensor
    lanes: int
    wire: Wire

    @classmethod
    def of(
        cls, vector: Tensor, code: SumCode, this_round: Round, known: Mapping[int, Tensor], reducer: Reducer
    ) -> "_Summand":
        before, own = known.get(this_round.bucket), code.measure(vector, this_round)
        if before is not None:
            before = before.to(own.device)  # a loaded one may be elsewhere
            if before.shape != own.shape:
                raise CodeError(
                    f"unwaited.known[{this_round.bucket}]: the state that was loaded has {before.numel()} statistics "
                    f"where {code!r} has {own.numel()}: load one of a training with this code"
                )
            stats = before * _MARGIN
            if not bool(own.isfinite().all()):
                vector = torch.zeros_like(vector)  # it must not get into what error feedback owes
        else:
            stats = reducer.ranks.largest(own) if own.numel() else own
            before = torch.where(stats.isfinite(), stats, 0.0)
        message, lanes = code.encode(vector, stats, this_round), code.lanes(vector.numel(), this_round)
        wire = code.wire(this_round.world)
        return cls(code, this_round, vector.numel(), own, before, stats, message, lanes, wire)

    def mean(self, total: Total) -> Tensor:
        """Decodes a total; what was left out of it goes back into memory."""
        if total.lost is not None:
            self.code.dropped(self.this_round, total.lost)
        return self.code.decode(total, self.stats, self.length, self.this_round)


def _summed(rows: Sequence[Tensor], this_round: Round, reducer: Reducer) -> list[Total]:
    """Adds rows of whole numbers in one sum; gives each row's total, with a count for each granule."""
    wire = IntegerWire(_BITS, _INFINITE, _GRANULE, this_round.world)
    padded = torch.cat([pad(row, (0, -row.numel() % _GRANULE)) for row in rows])
    if not padded.numel():
        return [Total(row, torch.zeros(0, dtype=torch.int64)) for row in rows]
    total = reducer.total(wire, pack_bits(padded, _BITS), padded.numel(), this_round)
    sums = wire.lanes_of(total, padded.numel())
    granules = [-(-row.numel() // _GRANULE) for row in rows]
    counts = torch.split(count_per_granule(total.count, sum(granules), this_round, sums.device), granules)
    lost = [None] * len(rows) if total.lost is None else torch.split(total.lost, granules)
    parts = torch.split(sums, [each * _GRANULE for each in granules])
    return [
        Total(part[: row.numel()], count, lost=None if gone is None or not bool(gone.any()) else gone)
        for part, row, count, gone in zip(parts, rows, counts, lost, strict=True)
    ]


def _logarithms(stats: Tensor) -> Tensor:
    """Writes statistics as whole numbers that add up: 0 for zero, the largest for infinity."""
    levels = ((stats.clamp(2.0**_LEAST, 2.0**-_LEAST).log2() - _LEAST) * _STEPS).round().to(torch.int32) + 1
    return torch.where(stats.isfinite(), torch.where(stats > 0, levels, 0), _INFINITE)
