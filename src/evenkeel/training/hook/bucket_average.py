"""Takes one bucket from its gradients to their average, in the communication thread."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Self

import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.wire import Round, Total
from evenkeel.reducers.ranks.collectives import Collectives, ring_bytes
from evenkeel.reducers.reducer import Reducer
from evenkeel.training.hook.stats import Meter, Stopwatch
from evenkeel.training.hook.unwaited import Unwaited
from evenkeel.training.hook.zero_lines import Aside, ZeroLines, zero_on_all

__all__ = ["BucketPlan", "Unit", "average_bucket"]

# The error of a message costs another decoding to know.
_STEPS_PER_SAMPLE = 16
# Up to here the time of a meeting counts, and not the bytes: one exchange of all rows takes the place of two rings.
_SMALL_BYTES = 2**14


@dataclass(frozen=True, slots=True)
class Unit:
    """Holds gradients that are coded as one vector: the unit's number and views of the bucket, in order."""

    number: int
    views: list[Tensor]


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Says what to do with a bucket in one step.

    Attributes:
        step: number of the step.
        loss_scale: what the gradients have been multiplied by.
        units: to be coded.
        plain: views to be averaged as they are.
        metered: false before compression starts.
        aside: these views as units, where the reducer does not wait for all ranks.
    """

    step: int
    loss_scale: float
    units: list[Unit]
    plain: list[Tensor]
    metered: bool
    aside: Sequence[Unit] = ()


def average_bucket(
    buffer: Tensor,
    plan: BucketPlan,
    code: SumCode | None,
    reducer: Reducer,
    meter: Meter,
    unwaited: Unwaited | None = None,
) -> Tensor:
    """Overwrites `buffer` with the average over all ranks, and gives it.

    Args:
        buffer: of the bucket.
        plan: what to do with it.
        code: of what is coded.
        reducer: who adds.
        meter: what it cost is entered here.
        unwaited: takes the place of the exchanges between ranks where the reducer does not wait for all.

    Raises:
        ReducerError: a peer is gone or silent.
    """
    ranks, tally = reducer.ranks, Meter()
    sent_before = ranks.sent_bytes
    watch = Stopwatch(buffer.device, lambda: ranks.exchanged_s)
    if unwaited is not None and not reducer.waits and plan.metered and code is not None:
        with torch.no_grad():
            _average_unwaited(plan, code, reducer, unwaited, tally)
        tally.add_up(watch.lap())
        tally.sent_bytes = ranks.sent_bytes - sent_before
        tally.uncompressed_bytes = ring_bytes(buffer, ranks.world)
        meter.include(tally)
        return buffer
    with torch.no_grad():
        coded = [_Coded.of(unit, plan, code, ranks) for unit in plan.units if code is not None]
        # Divided before they are added, as DDP does: the sum of large numbers might not fit their type.
        plain = _wide(_joined(plan.plain)) / ranks.world if plan.plain else buffer.new_empty(0, dtype=torch.float32)
        mean, stats = _shared(ranks, plain, [each.stats for each in coded])
        _write(plan.plain, mean)
        zero = zero_on_all(
            ranks,
            [each.zero for each in coded],
            [each.some_on_all(common) for each, common in zip(coded, stats, strict=True)],
        )
        tally.encode(watch.lap())
        for each, common, still in zip(coded, stats, zero, strict=True):
            _average_coded(replace(each, stats=common[each.own :], zero=still), plan, reducer, watch, tally)
    if not plan.metered:
        meter.plain(ranks.sent_bytes - sent_before, tally.communicate_s)
    else:
        tally.sent_bytes = ranks.sent_bytes - sent_before
        tally.uncompressed_bytes = ring_bytes(buffer, ranks.world)
        meter.include(tally)
    return buffer


@dataclass(frozen=True, slots=True)
class _Coded:
    """Holds a unit about to be coded: its vector; the statistics and zeros of this rank's or, later, of all.

    Before the code's own statistics stands one of ours, unless the code keeps zeros by itself: -1 where there are some,
    so that the largest is 0 unless every rank has some.
    """

    views: list[Tensor]
    code: SumCode
    this_round: Round
    vector: Tensor
    stats: Tensor
    zero: ZeroLines
    aside: Aside
    own: int

    @classmethod
    def of(cls, unit: Unit, plan: BucketPlan, code: SumCode, ranks: Collectives) -> Self:
        this_round = Round(ranks.rank, ranks.world, plan.step, unit.number)
        vector = _joined(unit.views).to(torch.float32)
        if plan.loss_scale != 1:
            # What codes remember must not depend on a scale that changes from step to step.
            vector = vector / plan.loss_scale
        shapes = [] if isinstance(code, Plain) else [tuple(view.shape) for view in unit.views]
        zero = ZeroLines.of(vector, shapes, plan.step)
        aside = Aside(code.memory(unit.number) if isinstance(code, ErrorFeedback) else None, zero)
        measured, own = code.measure(vector, this_round), min(1, len(zero.matrices))
        stats = torch.cat((measured.new_full((own,), 0.0 if zero.flags is None else -1.0), measured))
        return cls(unit.views, code, this_round, vector, stats, zero, aside, own)

    def some_on_all(self, common: Tensor) -> bool:
        """Says whether every rank has zeros, by the largest of their statistics."""
        return self.own > 0 and bool(common[0] < 0)


def _shared(ranks: Collectives, plain: Tensor, stats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Adds all ranks' `plain`, and finds the largest of each of their statistics: together, where both are short."""
    row = torch.cat([plain, *stats])
    lengths = [each.numel() for each in stats]
    added = plain.numel()
    if row.numel() == 0:
        return plain, list(stats)
    if row.numel() * row.element_size() <= _SMALL_BYTES:
        rows = torch.stack(ranks.gather(row))
        total, largest = rows[:, :added].sum(0), rows[:, added:].amax(0)
    else:
        total = ranks.add(plain) if added else plain
        largest = ranks.largest(row[added:]) if sum(lengths) else row[added:]
    return total, list(torch.split(largest.to(torch.float32), lengths))


def _average_coded(each: _Coded, plan: BucketPlan, reducer: Reducer, watch: Stopwatch, tally: Meter) -> None:
    code, this_round, vector, stats = each.code, each.this_round, each.vector, each.stats
    message, wire = code.encode(vector, stats, this_round), code.wire(this_round.world)
    lanes = code.lanes(vector.numel(), this_round)
    tally.encode(watch.lap())
    if plan.step % _STEPS_PER_SAMPLE == 0:
        decoded = code.decode(Total(wire.unpack(message, lanes), 1), stats, vector.numel(), this_round)
        _sample_error(code, vector, decoded, this_round, tally)
        watch.lap()
    total = reducer.total(wire, message, lanes, this_round)
    tally.add_up(watch.lap())
    if total.lost is not None:
        code.dropped(this_round, total.lost)
    if isinstance(code, ErrorFeedback) and (owed := code.memory(this_round.bucket)) is not None:
        each.aside.put_back(owed, each.zero)
    mean = code.decode(total, stats, vector.numel(), this_round)
    each.zero.clear(mean)
    code.observe(mean, this_round, reducer.ranks.broadcast)
    _write(each.views, mean * plan.loss_scale if plan.loss_scale != 1 else mean)
    tally.coordinates += vector.numel()
    tally.decode(watch.lap())


def _average_unwaited(plan: BucketPlan, code: SumCode, reducer: Reducer, unwaited: Unwaited, tally: Meter) -> None:
    ranks, scale = reducer.ranks, plan.loss_scale
    vectors = [(unit.number, _joined(unit.views).to(torch.float32) / scale) for unit in plan.units]
    plain = [(unit.number, _joined(unit.views).to(torch.float32) / scale) for unit in plan.aside]
    means, plain_means = unwaited.average(vectors, code, plain, reducer, plan.step)
    for unit, mean in zip(plan.units, means, strict=True):
        code.observe(mean, Round(ranks.rank, ranks.world, plan.step, unit.number), ranks.broadcast)
        _write(unit.views, mean * scale)
        tally.coordinates += mean.numel()
    for unit, mean in zip(plan.aside, plain_means, strict=True):
        _write(unit.views, mean * scale)


def _sample_error(code: SumCode, vector: Tensor, decoded: Tensor, this_round: Round, tally: Meter) -> None:
    error = code.memory(this_round.bucket) if isinstance(code, ErrorFeedback) else vector - decoded
    assert error is not None
    error_energy, energy = float(error.norm()) ** 2, float((decoded + error).norm()) ** 2
    if isfinite(energy) and isfinite(error_energy):
        tally.error_energy += error_energy
        tally.energy += energy


def _wide(values: Tensor) -> Tensor:
    """Converts to the type to average in: float32 for what is narrower, which would lose too much; else its own."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _joined(views: Sequence[Tensor]) -> Tensor:
    """Joins all elements of `views` in one row: a view, where they lie one behind the other."""
    first = views[0]
    end = first.storage_offset()
    for view in views:
        if not view.is_contiguous() or view.storage_offset() != end:
            return torch.cat([each.reshape(-1) for each in views])
        end += view.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def _write(views: Sequence[Tensor], values: Tensor) -> None:
    for view, piece in zip(views, torch.split(values, [view.numel() for view in views]), strict=True):
        view.copy_(piece.view(view.shape))
