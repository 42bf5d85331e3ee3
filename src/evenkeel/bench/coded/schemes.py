"""Plays one round of each scheme on virtual time: when it ends, from which blocks, and what it moves.

Every scheme sees the same devices, away and slow in the same rounds. A device that is away replies late, not never: a
scheme that cannot do without it waits. What a device that has left for good had is lost to schemes without copies.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.bench.coded.fleet import DeviceFleet, TaskTimes
from evenkeel.coding.answers.linear import GradientCode, LinearCode, PartitionCode
from evenkeel.coding.answers.linear_codes import LINEAR_CODES, linear_code
from evenkeel.text_values import unknown

__all__ = ["Drop", "RoundOutcome", "Scheme", "SizeOfRound", "WaitForAll", "scheme_of"]

_NUMBER_BYTES = 4
_LATE = 1.2  # times the median of the replies: from then on a copy, or another set of blocks, is tried
_DROPPED = 2.0  # the same, for who drops what is later
_TRIES = 4  # sets of blocks, or copies of a partition, that are tried in a round
_SLACK = (1, 2, 4)  # sums more than there are partitions missing: as few as condition well enough
_CONDITION = 100.0  # so large it may be: of float32's seven digits, five are left


@dataclass(frozen=True)
class SizeOfRound:
    """Holds what rounds are made of: numbers of partitions, their rows and columns, and times of tasks."""

    partitions: int
    rows: int
    columns: int
    times: TaskTimes


@dataclass(frozen=True)
class RoundOutcome:
    """Says how a round went.

    Attributes:
        seconds: it took.
        bytes: moved, both directions, all devices.
        blocks: whose replies the gradient is decoded from; None: it is the plain sum over `told`.
        told: truth values, `[partitions]`: whose gradients are in it.
        prompt: whether it ended without a device that was away.
    """

    seconds: float
    bytes: float
    blocks: tuple[int, ...] | None
    told: Array
    prompt: bool


class Scheme(ABC):
    """Plays rounds. `code` is None where there is none."""

    name: str
    code: LinearCode | None = None

    @abstractmethod
    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Plays a round."""

    def setup_transfers(self) -> int:
        """Counts the partitions that travel before the first round."""
        return len(self.code.transfers) if self.code else 0

    def repair_transfers(self, device: int) -> int:
        """Counts the partitions or sums that travel when a device has left for good and another one takes its place."""
        return 0


class WaitForAll(Scheme):
    """Waits for every device; data of those that have left for good are lost."""

    name = "wait for all"

    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Ends with the last device."""
        there = _there(fleet, number, size.partitions)
        arrivals = fleet.factors(number, size.partitions) * size.times.task_s(1, 1, 2 * size.columns)
        alone = not (fleet.away(number, size.partitions) & there).any()
        return RoundOutcome(
            float(arrivals[there].max()), _plain_bytes(size, int(there.sum())), None, there, bool(alone)
        )


class Drop(Scheme):
    """Goes on without the devices that are later than twice the median."""

    name = "drop late ones"

    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Ends at twice the median, or with the last device."""
        there = _there(fleet, number, size.partitions)
        arrivals = fleet.factors(number, size.partitions) * size.times.task_s(1, 1, 2 * size.columns)
        end_s = min(float(arrivals[there].max()), _DROPPED * float(np.median(arrivals[there])))
        told = there & (arrivals <= end_s)
        return RoundOutcome(end_s, _plain_bytes(size, int(told.sum())), None, told, prompt=True)


@dataclass(frozen=True)
class HedgedReplication(Scheme):
    """Asks a copy for what is a fifth later than the median."""

    name: str
    code: PartitionCode

    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Ends when every partition has been computed by somebody."""
        times, count = size.times, size.partitions
        factors = fleet.factors(number, count)
        away = fleet.away(number, count)
        task_s = times.task_s(1, 1, 2 * size.columns)
        done = factors * task_s
        free = done.copy()  # when each device has nothing more to do
        prompt = ~away
        step_s, asked = _LATE * float(np.median(done)), 0
        for attempt in range(1, _TRIES):
            start_s = attempt * step_s
            again = fleet.factors(number, count, attempt)
            for partition in np.flatnonzero(done > start_s).tolist():
                block_holders = self._holders(partition)
                idle = [holder for holder in block_holders if free[holder] <= start_s] or block_holders
                holder = min(idle, key=lambda device: (free[device] > start_s, free[device]))
                end_s = max(start_s, free[holder]) + again[holder] * task_s
                asked += 1
                free[holder] = end_s
                if end_s < done[partition]:
                    done[partition] = end_s
                    prompt[partition] = not away[holder]
        everything = np.ones(count, bool)
        moved = _plain_bytes(size, count) + asked * _NUMBER_BYTES * size.columns
        return RoundOutcome(float(done.max()), moved, None, everything, bool(prompt.all()))

    def repair_transfers(self, device: int) -> int:
        """Fetches the device's own partition, and every copy that it had."""
        return len(self.code.blocks_of([device]))

    def _holders(self, partition: int) -> list[int]:
        blocks = np.flatnonzero(self.code.rows[:, partition]).tolist()
        return [self.code.holders[block] for block in blocks if block != partition]


@dataclass(frozen=True)
class CodedRounds(Scheme):
    """Solves for what is missing, in two phases.

    First every block's product with the weights: a device computes its own partition's, then its sum's. As soon as
    what has come tells all products, the labels give what each block is to be multiplied with, and a second reply each
    gives the gradient. Where second replies are late, blocks of devices that are not are solved for instead, and only
    those whose factor has changed are asked again.
    """

    name: str
    code: PartitionCode

    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Ends when one set of blocks has given everything."""
        code = self.code
        factors, away = fleet.factors(number, code.devices), fleet.away(number, code.devices)
        arrivals = self._first_arrivals(factors, size)
        order = np.argsort(arrivals, kind="stable")
        place = self._enough(order)
        first_s = float(arrivals[order[place]])
        there = [int(block) for block in order[: place + 1]]
        # What comes in the same moment is taken too: it conditions better.
        there += [int(block) for block in order[place + 1 :] if arrivals[block] <= first_s * 1.02]
        blocks = _few(code, there)
        sums = sum(block >= code.partitions for block in there)
        own = len(there) - sums
        numbers = code.devices * size.columns + (own + sums) * size.rows
        best_s, best = np.inf, blocks
        start_s, known = first_s, dict[int, FloatArray]()
        for attempt in range(1, _TRIES):
            weights = _columns(code, blocks)
            changed = [
                block
                for block, column in weights.items()
                if column.any() and not (block in known and np.array_equal(known[block], column))
            ]
            ends = self._second_arrivals(changed, fleet.factors(number, code.devices, attempt), start_s, size)
            numbers += len(changed) * size.rows + len({code.holders[block] for block in changed}) * size.columns
            end_s = max(ends.values(), default=start_s)
            if end_s < best_s:
                best_s, best = end_s, blocks
            limit_s = start_s + _LATE * (float(np.median(list(ends.values()))) - start_s) if ends else start_s
            late = {code.holders[block] for block, when in ends.items() if when > limit_s}
            if not late or limit_s >= best_s:
                break
            arrived = [block for block in range(code.blocks) if arrivals[block] <= limit_s]
            usable = [block for block in arrived if code.holders[block] not in late]
            if code.condition(usable) > _CONDITION:
                break
            known |= {block: weights[block] for block, when in ends.items() if when <= limit_s}
            blocks, start_s = _few(code, usable), limit_s
        used = {code.holders[block] for block in best}
        return RoundOutcome(
            best_s,
            numbers * _NUMBER_BYTES,
            best,
            np.ones(code.partitions, bool),
            not any(away[device] for device in used),
        )

    def repair_transfers(self, device: int) -> int:
        """Moves what tells the device's partition, and all partitions of each sum that it had."""
        code = self.code
        total = 0
        for block in code.blocks_of([device]):
            others = [other for other in range(code.blocks) if code.holders[other] != device]
            if block < code.partitions:
                found = code.decoder(code.choose(others, 0))
                total += int(np.count_nonzero(found.weights[block]))
            else:
                total += int(np.count_nonzero(code.rows[block]))
        return total

    def _first_arrivals(self, factors: FloatArray, size: SizeOfRound) -> FloatArray:
        """Gives when each block's product comes: a device's blocks one after the other."""
        before = np.zeros(self.code.devices, int)
        arrivals = np.empty(self.code.blocks)
        for block, holder in enumerate(self.code.holders):
            before[holder] += 1
            count = int(before[holder])
            arrivals[block] = factors[holder] * size.times.task_s(count, 0, size.columns + count * size.rows)
        return arrivals

    def _second_arrivals(
        self, blocks: Sequence[int], factors: FloatArray, start_s: float, size: SizeOfRound
    ) -> dict[int, float]:
        """Gives when each device has sent its gradient, for each of its blocks."""
        count: dict[int, int] = {}
        for block in blocks:
            count[self.code.holders[block]] = count.get(self.code.holders[block], 0) + 1
        ends = {
            holder: start_s + factors[holder] * size.times.task_s(0, some, some * size.rows + size.columns)
            for holder, some in count.items()
        }
        return {block: ends[self.code.holders[block]] for block in blocks}

    def _enough(self, order: Array) -> int:
        """Gives the place, in the order of arrival, of the block with which everything can be decoded well."""
        low, high = self.code.partitions - 1, len(order) - 1
        while low < high:
            middle = (low + high) // 2
            if self.code.condition(order[: middle + 1].tolist()) > _CONDITION:
                low = middle + 1
            else:
                high = middle
        return low


@dataclass(frozen=True)
class GradientCoding(Scheme):
    """Lets every device send one sum of the gradients of all its partitions."""

    name: str
    code: GradientCode

    def play(self, fleet: DeviceFleet, number: int, size: SizeOfRound) -> RoundOutcome:
        """Ends when the sums that have come tell the whole."""
        code = self.code
        passes = (code.rows != 0).sum(axis=1)
        factors, away = fleet.factors(number, code.devices), fleet.away(number, code.devices)
        each = [size.times.task_s(int(some), int(some), 2 * size.columns) for some in passes]
        arrivals = factors * np.array(each)
        order = np.argsort(arrivals, kind="stable")
        low, high = 0, len(order) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if code.missing(order[: middle + 1].tolist()) else (low, middle)
        blocks = tuple(sorted(order[: low + 1].tolist()))
        moved = _NUMBER_BYTES * size.columns * (code.devices + len(blocks))
        everything = np.ones(code.partitions, bool)
        return RoundOutcome(
            float(arrivals[order[low]]), moved, blocks, everything, not any(away[block] for block in blocks)
        )

    def repair_transfers(self, device: int) -> int:
        """Fetches every partition of the device's row from another device."""
        return int(np.count_nonzero(self.code.rows[device]))


def scheme_of(text: str, devices: int, sizes: FloatArray | None = None) -> Scheme:
    """Gives the scheme that a text names: `wait`, `drop`, or a code's text; replication is hedged."""
    if text == "wait":
        return WaitForAll()
    if text == "drop":
        return Drop()
    name = text.partition(":")[0]
    if name not in LINEAR_CODES:
        raise unknown("code", name, ["wait", "drop", *LINEAR_CODES])
    code = linear_code(text, devices, sizes=sizes)
    if isinstance(code, GradientCode):
        return GradientCoding(text, code)
    assert isinstance(code, PartitionCode)
    return HedgedReplication(text, code) if name == "replication" else CodedRounds(text, code)


def _there(fleet: DeviceFleet, number: int, devices: int) -> Array:
    """Tells which devices have not left for good before a round."""
    there = np.ones(devices, bool)
    there[list(fleet.left(number))] = False
    return there


def _plain_bytes(size: SizeOfRound, replies: int) -> float:
    return float(_NUMBER_BYTES * size.columns * (size.partitions + replies))


def _few(code: PartitionCode, blocks: Sequence[int]) -> tuple[int, ...]:
    """Chooses all partitions that are there, and as few sums as condition well enough."""
    chosen = tuple(blocks)
    for slack in _SLACK:
        chosen = code.choose(blocks, slack)
        if code.condition(chosen) <= _CONDITION:
            break
    return chosen


def _columns(code: PartitionCode, blocks: tuple[int, ...]) -> dict[int, FloatArray]:
    """Gives of each block in which share of which partition's values it is multiplied with."""
    found = code.decoder(blocks)
    return {block: found.weights[:, place] for place, block in enumerate(found.blocks)}
