"""Holds codes over the real numbers: devices keep sums of data partitions, and enough devices tell all.

`partitions` data sets of equal size lie on as many devices. Further *blocks*, sums of partitions, lie on the same
devices or on extra ones. Block j is `sum_i rows[j, i] * partition_i`. What is linear in the data, such as the product
of a partition with a weight vector, is the same sum for the block as for the partitions. So the replies of the blocks
that are there are solved for the partitions' own.

Decoding is one small matrix, `LinearDecoder.weights`, for each set of blocks that replied. It serves both phases of an
exact gradient: `values` gives the partitions' products from the blocks' products. Its transpose, `shares`, turns what
each partition is to be multiplied with into what each block is to be multiplied with instead:

    products    z = weights @ (X~ w)          derivative of the loss    u = loss'(z)
    gradient    X' u = X~' (weights' @ u)

Blocks that hold a partition as it is are never decoded: their replies are taken as they are.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.checks import check_count, check_group, check_numbers, number
from evenkeel.coding.code import Answer, Code, Task
from evenkeel.errors import CodeError, ConfigurationError, UndecodableError

__all__ = ["GradientCode", "LinearCode", "LinearDecoder", "PartitionCode", "Transfer"]

_MAX_CACHED = 4096  # decoders; each holds partitions x blocks numbers
_TOLD = 1e-8  # how much of a partition may lie in what the blocks do not tell: rounding alone is far below it
_MAX_CELLS = 1 << 22  # numbers at a time, where many sets of devices are looked at


@dataclass(frozen=True, slots=True)
class Transfer:
    """Says that a partition, whole, goes from the device that has it to another one."""

    partition: int
    source: int
    target: int


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """Turns what some blocks replied into what is wanted of the partitions.

    Attributes:
        blocks: the blocks that replied, ascending.
        weights: `[wanted, blocks]`; wanted are all partitions, or their sum alone. Rows of what is missing are zero.
        condition: how many times larger the relative error of what is told may be than that of the replies, at most.
        missing: partitions that cannot be decoded.
    """

    blocks: tuple[int, ...]
    weights: FloatArray
    condition: float
    missing: tuple[int, ...] = ()

    @property
    def used(self) -> tuple[int, ...]:
        """Names the blocks whose replies matter; the others need not be asked for anything more."""
        return tuple(self.blocks[place] for place in np.flatnonzero(np.abs(self.weights).sum(axis=0)))

    def values(self, replies: ArrayLike) -> FloatArray:
        """Gives what is wanted, `[wanted, ...]`, from the replies `[blocks, ...]`, in float64."""
        return self._product(self.weights, replies)

    def shares(self, values: ArrayLike) -> FloatArray:
        """Gives for each block, `[blocks, ...]`, its share of values `[wanted, ...]`: the transpose of `values`."""
        return self._product(self.weights.T, values)

    def _product(self, weights: FloatArray, operand: ArrayLike) -> FloatArray:
        rows = np.asarray(operand, np.float64)
        if rows.ndim == 0 or len(rows) != weights.shape[1]:
            raise CodeError(f"expected {weights.shape[1]} rows, one for each block or partition, found {rows.shape}")
        # Most weights are zeros and ones; and 0 * inf must not spoil what does not depend on that row.
        product: FloatArray = np.zeros((len(weights), *rows.shape[1:]))
        dense = []
        for place, row in enumerate(weights):
            there = np.flatnonzero(row)
            if len(there) == 1 and row[there[0]] == 1.0:
                product[place] = rows[there[0]]
            elif len(there):
                dense.append(place)
        if dense:
            columns = np.flatnonzero(np.abs(weights[dense]).sum(axis=0))
            product[dense] = np.tensordot(weights[dense][:, columns], rows[columns], axes=1)
        return product


class LinearCode(Code):
    """Is a code whose tasks are sums of partitions, and whose answers come from solving for them.

    Args:
        rows: `[blocks, partitions]`: which multiple of which partition is in which block.
        holders: of each block, the device that keeps it. Partition i is device i's own.
        name: for tables.
        max_condition: largest condition with which a set of blocks counts as one that decodes.

    Attributes:
        partitions: how many there are.
        devices: how many devices hold them and the further blocks.

    Raises:
        ConfigurationError: rows and holders that do not fit each other, or are no numbers.
    """

    uses_primaries = True

    def __init__(
        self, rows: ArrayLike, holders: Sequence[int], *, name: str = "linear", max_condition: float = 1e5
    ) -> None:
        self.rows: FloatArray = np.array(rows, np.float64)
        self.name = name
        self.max_condition = number("max-condition", max_condition, 1)
        if self.rows.ndim != 2 or not self.rows.size or not np.isfinite(self.rows).all():
            raise ConfigurationError(f"{name}: rows must be a table of finite numbers, found shape {self.rows.shape}")
        self.rows.setflags(write=False)
        self.partitions: int = self.rows.shape[1]
        self.holders = tuple(int(holder) for holder in holders)
        if len(self.holders) != len(self.rows) or min(self.holders) < 0:
            raise ConfigurationError(f"{name}: {len(self.rows)} blocks need as many holders, found {self.holders}")
        self.devices = max(self.partitions, 1 + max(self.holders))
        self._solved: dict[tuple[int, ...], LinearDecoder] = {}

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        return len(self.rows)

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """Lists what must travel before training begins, each partition from its own device (unicast).

        A device that holds several blocks with one partition in them receives it once.
        """
        needed = {
            (int(partition), holder)
            for row, holder in zip(self.rows, self.holders, strict=True)
            for partition in np.flatnonzero(row)
            if holder != partition
        }
        return tuple(Transfer(partition, partition, target) for partition, target in sorted(needed))

    @cached_property
    def norm(self) -> float:
        """Gives the largest singular value of all rows."""
        return float(np.linalg.norm(self.rows, 2))

    def blocks_of(self, devices: Collection[int]) -> tuple[int, ...]:
        """Names the blocks that these devices hold."""
        return tuple(block for block, holder in enumerate(self.holders) if holder in devices)

    def decoder(self, blocks: Iterable[int], *, partial: bool = False) -> LinearDecoder:
        """Gives the decoder for the blocks that replied; it is computed once for each set of them.

        Args:
            blocks: numbers of the blocks.
            partial: give it although not all can be decoded; `missing` then names the rest, whose rows are zero.

        Raises:
            CodeError: a number that is no block's.
            UndecodableError: not all partitions can be decoded; names those that cannot. Not with `partial`.
        """
        key = tuple(sorted(set(blocks)))
        found = self._solved.get(key)
        if found is None:
            check_numbers(key, self.blocks)
            found = self._solve(key)
            if len(self._solved) >= _MAX_CACHED:
                del self._solved[next(iter(self._solved))]
            self._solved[key] = found
        if found.missing and not partial:
            raise UndecodableError(
                f"{self.name}: {len(key)} of {self.blocks} blocks do not tell partitions {_names(found.missing)}; "
                "wait for more devices, or go on without these partitions",
                found.missing,
            )
        return found

    def missing(self, blocks: Iterable[int]) -> tuple[int, ...]:
        """Names the partitions that cannot be decoded from these blocks."""
        return self.decoder(blocks, partial=True).missing

    def condition(self, blocks: Iterable[int]) -> float:
        """Gives the decoder's condition; infinite where not all can be decoded."""
        found = self.decoder(blocks, partial=True)
        return np.inf if found.missing else found.condition

    def decodes(self, alive: Array) -> Array:
        """Tells for many sets of devices at once, truth values `[sets, devices]`, whether each tells all."""
        told: Array = self.conditions(alive) <= self.max_condition
        return told

    @abstractmethod
    def conditions(self, alive: Array) -> FloatArray:
        """Gives the condition for many sets of devices at once, or infinity where not all can be decoded.

        Args:
            alive: truth values, `[sets, devices]`.
        """

    @abstractmethod
    def _solve(self, blocks: tuple[int, ...]) -> LinearDecoder:
        """Computes the decoder for a set of blocks."""

    def _alive_blocks(self, alive: Array) -> Array:
        """Gives which blocks are there, `[sets, blocks]`, for sets of devices."""
        alive = np.asarray(alive, bool)
        if alive.ndim != 2 or alive.shape[1] != self.devices:
            raise CodeError(f"{self.name}: expected truth values [sets, {self.devices}], found {alive.shape}")
        there: Array = alive[:, list(self.holders)]
        return there


class PartitionCode(LinearCode):
    """Tells every partition's own values: blocks 0..partitions-1 are the partitions themselves, further ones are sums.

    As a `Code`, a group's items are the partitions. A group of fewer items has the first partitions alone, and no
    blocks that have nothing of them. Any set of blocks tells what its rows determine, whether or not it tells all.

    Args:
        parity: `[further blocks, partitions]`.
        holders: of each further block, the device that keeps it.
        name: for tables.
        max_condition: largest condition with which a set of blocks counts as one that decodes.
    """

    def __init__(
        self, parity: ArrayLike, holders: Sequence[int], *, name: str = "linear", max_condition: float = 1e5
    ) -> None:
        below = np.array(parity, np.float64)
        if below.ndim != 2:
            raise ConfigurationError(f"{name}: rows of further blocks must be a table, found shape {below.shape}")
        count = below.shape[1]
        rows = np.concatenate([np.eye(count), below])
        super().__init__(rows, (*range(count), *holders), name=name, max_condition=max_condition)
        self.max_items = count
        self._shortened: dict[int, PartitionCode] = {}
        self._choices: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    @property
    def parity(self) -> FloatArray:
        """Gives the rows of the further blocks, `[further blocks, partitions]`."""
        return self.rows[self.partitions :]

    def spares(self, items: Sequence[Array]) -> list[Task]:
        """Makes one task for each further block: a sum of items, in float64."""
        check_group(items, self.max_items)
        code = self._of(len(items))
        mixed = np.tensordot(code.parity, np.stack(items).astype(np.float64), axes=1)
        covers = [tuple(np.flatnonzero(row).tolist()) for row in code.parity]
        return [Task(each[None], some) for each, some in zip(mixed, covers, strict=True)]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Answers what the replies determine: primaries as they are, others by solving, source "decoded"."""
        check_count(count, self.max_items)
        code = self._of(count)
        there = _finite_rows(replies, code.blocks)
        if not there:
            return {}
        found = code.decoder(there, partial=True)
        values = found.values(np.stack([there[block] for block in found.blocks]))
        return {
            item: Answer(there[item], "exact", 1.0) if item in there else Answer(values[item], "decoded", 1.0)
            for item in range(count)
            if item not in found.missing
        }

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives what leaves blocks that determine everything."""
        check_count(count, self.max_items)
        code = self._of(count)
        return not code.missing(block for block in range(code.blocks) if block not in lost)

    def choose(self, blocks: Iterable[int], slack: int = 1) -> tuple[int, ...]:
        """Chooses, of blocks that replied, those worth using: all partitions, and few sums that condition well.

        One sum for each partition that is missing and `slack` more, taken greedily by how much each adds to what is
        known already (QR with pivoting). Fewer blocks mean less to be asked for; more, a better condition.
        """
        key = (tuple(sorted(set(blocks))), slack)
        found = self._choices.get(key)
        if found is None:
            check_numbers(key[0], self.blocks)
            found = self._choose(key[0], slack)
            if len(self._choices) >= _MAX_CACHED:
                del self._choices[next(iter(self._choices))]
            self._choices[key] = found
        return found

    def _choose(self, there: tuple[int, ...], slack: int) -> tuple[int, ...]:
        own = [block for block in there if block < self.partitions]
        lost = [partition for partition in range(self.partitions) if partition not in own]
        sums = [block for block in there if block >= self.partitions]
        chosen: list[int] = []
        while lost and sums and len(chosen) < len(lost) + slack:
            if len(chosen) % len(lost) == 0:  # a new basis, for the slack
                rest = self.rows[np.ix_(sums, lost)].copy()
            lengths = np.linalg.norm(rest, axis=1)
            best = int(lengths.argmax())
            if lengths[best] * self.max_condition < self.norm:
                break
            chosen.append(sums.pop(best))
            direction = rest[best] / lengths[best]
            rest = np.delete(rest, best, axis=0)
            rest -= np.outer(rest @ direction, direction)
        return tuple(sorted([*own, *chosen]))

    def conditions(self, alive: Array) -> FloatArray:
        """Gives the condition for each of many sets of devices `[sets, devices]`."""
        there = self._alive_blocks(alive)
        whole = there[:, : self.partitions].all(axis=1)
        result: FloatArray = np.where(whole, 1.0, np.inf)
        open_sets = np.flatnonzero(~whole & (there.sum(axis=1) >= self.partitions))
        squares = (self.rows[:, :, None] * self.rows[:, None, :]).reshape(self.blocks, -1)
        step = max(1, _MAX_CELLS // self.partitions**2)
        for first in range(0, len(open_sets), step):
            some = open_sets[first : first + step]
            grams = (there[some].astype(np.float64) @ squares).reshape(-1, self.partitions, self.partitions)
            least = np.linalg.eigvalsh(grams)[:, 0]
            # Rounding leaves less than this of a zero.
            told = least > 1e-14 * self.norm**2
            result[some[told]] = self.norm / np.sqrt(least[told])
        result[result > self.max_condition] = np.inf
        return result

    def _of(self, count: int) -> "PartitionCode":
        """Gives the code of the first `count` partitions."""
        if count == self.partitions:
            return self
        if count not in self._shortened:
            parity = self.parity[:, :count]
            kept = np.flatnonzero(parity.any(axis=1))
            holders = [self.holders[self.partitions + block] for block in kept]
            self._shortened[count] = PartitionCode(
                parity[kept], holders, name=self.name, max_condition=self.max_condition
            )
        return self._shortened[count]

    def _solve(self, blocks: tuple[int, ...]) -> LinearDecoder:
        """Solves by the singular values of the rows; what is too small to differ from zero counts for nothing."""
        rows = self.rows[list(blocks)]
        weights = np.zeros((self.partitions, len(blocks)))
        own = [block for block in blocks if block < self.partitions]
        weights[own, range(len(own))] = 1.0
        lost = [partition for partition in range(self.partitions) if partition not in own]
        if not lost:
            return LinearDecoder(blocks, weights, 1.0)
        left, sizes, right = np.linalg.svd(rows.reshape(-1, self.partitions))
        rank = int((sizes * self.max_condition >= self.norm).sum())
        inverse = right[:rank].T / sizes[:rank] @ left[:, :rank].T
        untold = np.linalg.norm(right[rank:, lost], axis=0) > _TOLD
        told = [partition for partition, unknown in zip(lost, untold, strict=True) if not unknown]
        weights[told] = inverse[told]
        # Rounding leaves traces of blocks that have nothing to do with a partition.
        weights[np.abs(weights) < 1e-13 * np.abs(weights).max(initial=0.0)] = 0.0
        missing = tuple(partition for partition, unknown in zip(lost, untold, strict=True) if unknown)
        condition = self.norm / float(sizes[rank - 1]) if rank else 1.0
        return LinearDecoder(blocks, weights, condition, missing)


class GradientCode(LinearCode):
    """Tells the sum over all partitions alone: gradient coding (Tandon, Lei, Dimakis, Karampatziakis, ICML 2017).

    A device keeps the partitions of its row as they are, computes each one's gradient, and sends their sum. So the
    model may be any, and a round has one phase; but storage and computing grow with the partitions in a row.

    As a `Code`, a group holds one item, whose first axis is cut into the partitions; its answer is the sum of what the
    parts give. No reply is an answer by itself.

    Args:
        rows: `[devices, partitions]`.
        name: for tables.
        max_condition: largest condition with which a set of devices counts as one that decodes.
    """

    systematic = False
    max_items = 1

    def __init__(self, rows: ArrayLike, *, name: str = "gradient", max_condition: float = 1e5) -> None:
        super().__init__(rows, range(len(np.array(rows))), name=name, max_condition=max_condition)

    def primaries(self, items: Sequence[Array]) -> list[Task]:
        """Makes the first device's task."""
        return self._tasks(items)[:1]

    def spares(self, items: Sequence[Array]) -> list[Task]:
        """Makes the tasks of all others."""
        return self._tasks(items)[1:]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Answers with the sum once the replies determine it."""
        check_count(count, 1)
        there = _finite_rows(replies, self.blocks)
        found = self.decoder(there, partial=True)
        if found.missing:
            return {}
        return {0: Answer(found.values(np.stack([there[block] for block in found.blocks]))[0], "decoded", 1.0)}

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives what leaves devices that determine the sum."""
        check_count(count, 1)
        return not self.missing(block for block in range(self.blocks) if block not in lost)

    def conditions(self, alive: Array) -> FloatArray:
        """Gives the condition for each of many sets of devices `[sets, devices]`."""
        there = self._alive_blocks(alive).astype(np.float64)
        squares = (self.rows[:, :, None] * self.rows[:, None, :]).reshape(self.blocks, -1)
        step = max(1, _MAX_CELLS // self.partitions**2)
        result: FloatArray = np.full(len(there), np.inf)
        for first in range(0, len(there), step):
            grams = (there[first : first + step] @ squares).reshape(-1, self.partitions, self.partitions)
            sizes, vectors = np.linalg.eigh(grams)
            along = vectors.sum(axis=1)  # what of the sum lies in each direction
            told = sizes * self.max_condition**2 >= self.norm**2
            lengths = np.sqrt((np.where(told, along, 0) ** 2 / np.where(told, sizes, 1)).sum(axis=1) / self.partitions)
            unknown = np.linalg.norm(np.where(told, 0, along), axis=1)
            # Directions are good to about 1e-16 * max_condition^2 where sizes are that far apart.
            known = unknown <= 1e-6 * self.partitions**0.5
            result[first : first + step][known] = np.maximum(1.0, self.norm * lengths[known])
        result[result > self.max_condition] = np.inf
        return result

    def _tasks(self, items: Sequence[Array]) -> list[Task]:
        check_group(items, 1)
        whole = items[0]
        if whole.ndim == 0 or len(whole) % self.partitions:
            raise CodeError(f"{self.name}: an item is cut into {self.partitions} equal parts, found {whole.shape}")
        parts = whole.reshape(self.partitions, -1, *whole.shape[1:]).astype(np.float64)
        return [Task(mixed[None], (0,)) for mixed in np.tensordot(self.rows, parts, axes=1)]

    def _solve(self, blocks: tuple[int, ...]) -> LinearDecoder:
        rows = self.rows[list(blocks)].reshape(-1, self.partitions)
        weights = np.linalg.pinv(rows.T, rcond=1 / self.max_condition).sum(axis=1)
        wrong = np.abs(weights @ rows - 1)
        condition = self.norm * float(np.linalg.norm(weights)) / self.partitions**0.5
        if wrong.max() <= _TOLD and condition <= self.max_condition:
            return LinearDecoder(blocks, weights[None], max(condition, 1.0))
        # Nobody has those without a device; where everybody has one, it is the sum as a whole that is missing.
        nowhere = np.flatnonzero(~rows.any(axis=0)).tolist() or range(self.partitions)
        return LinearDecoder(blocks, np.zeros((1, len(blocks))), np.inf, tuple(nowhere))


def _finite_rows(replies: Mapping[int, Array], blocks: int) -> dict[int, Array]:
    """Gives the replies' single rows, without those that are not finite.

    Raises:
        CodeError: a number that is no block's, or replies that are not one row of real numbers each, alike.
    """
    check_numbers(replies, blocks)
    shapes = [reply.shape for reply in replies.values()]
    usual = max(set(shapes), key=shapes.count, default=())
    for block, reply in replies.items():
        if reply.ndim < 2 or len(reply) != 1 or reply.dtype.kind not in "fiu" or reply.shape != usual:
            raise CodeError(
                f"reply to task {block}: expected one row of real numbers, as long as the others', "
                f"found {reply.dtype} {reply.shape}"
            )
    return {block: replies[block][0] for block in sorted(replies) if np.isfinite(replies[block]).all()}


def _names(partitions: Sequence[int]) -> str:
    shown = ", ".join(map(str, partitions[:8]))
    return shown if len(partitions) <= 8 else f"{shown} and {len(partitions) - 8} more"
