"""Says which device holds which block, in which version, and how a block is made from others."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from evenkeel.arrays import FloatArray
from evenkeel.coding.answers.linear import PartitionCode
from evenkeel.errors import UndecodableError

__all__ = ["BlockLayout"]

_SMALL = 1e-9  # of a recipe's factors: rounding alone


@dataclass
class BlockLayout:
    """Places the blocks of a code on devices, by names that stay although the code grows.

    Partitions are named `d0`, `d1`, ..., further blocks `p0`, `p1`, ...

    Attributes:
        parity: `[further blocks, partitions]`: which multiple of which partition is in which further block.
        holders: of each block, the device that has it or shall have it.
        versions: of each block; another version has other numbers.
        rows: of each partition.
    """

    parity: FloatArray
    holders: dict[str, str]
    versions: dict[str, int]
    rows: list[int]
    code: PartitionCode = field(init=False)
    blocks: list[str] = field(init=False)
    place: dict[str, int] = field(init=False)
    _lengths: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._changed()

    @property
    def partitions(self) -> list[str]:
        """Names the partitions."""
        return self.blocks[: len(self.rows)]

    @property
    def sums(self) -> list[str]:
        """Names the further blocks."""
        return self.blocks[len(self.rows) :]

    def rows_of(self, block: str) -> int:
        """Counts the rows of a block: of the longest partition in it."""
        return self._lengths[block]

    def held_by(self, devices: Collection[str]) -> list[str]:
        """Names the blocks of some devices, in the code's order."""
        return [block for block in self.blocks if self.holders[block] in devices]

    def untold(self, blocks: Iterable[str]) -> list[str]:
        """Names the partitions that these blocks do not tell."""
        missing = self.code.decoder((self.place[block] for block in blocks), partial=True).missing
        return [self.blocks[place] for place in missing]

    def recipe(self, block: str, available: Sequence[str]) -> list[tuple[str, float]]:
        """Gives the multiples of available blocks that `block` is the sum of: few, and of partitions where possible.

        Raises:
            UndecodableError: it cannot be made from them; names the partitions that are missing.
        """
        places = [self.place[name] for name in available]
        target = self.code.rows[self.place[block]]
        needed = np.flatnonzero(target)
        own = {place for place in places if place < len(self.rows)}
        lost = [partition for partition in needed if partition not in own]
        factors = {self.blocks[partition]: float(target[partition]) for partition in needed if partition in own}
        if lost:
            chosen = self.code.choose(places, slack=1)
            decoder = self.code.decoder(chosen, partial=True)
            gone = [self.blocks[partition] for partition in lost if partition in decoder.missing]
            if gone:
                raise UndecodableError(
                    f"block {block} cannot be made again: partitions {', '.join(gone)} are on no device that is there, "
                    "nor do the others' blocks tell them; bring back a device that holds them",
                    tuple(self.place[name] for name in gone),
                )
            for weight, place in zip(target[lost] @ decoder.weights[lost], decoder.blocks, strict=True):
                name = self.blocks[place]
                factors[name] = factors.get(name, 0.0) + float(weight)
        return [(name, factor) for name, factor in factors.items() if abs(factor) > _SMALL]

    def add_partition(
        self, device: str, rows: int, copies: int, random: np.random.Generator
    ) -> list[tuple[str, float]]:
        """Takes in a new partition: it goes into `copies` further blocks, the lightest on other devices.

        Returns:
            The further blocks that change, and the factor of the new partition in each.
        """
        name = f"d{len(self.rows)}"
        weight = np.abs(self.parity) > 0
        loads = weight @ np.array(self.rows, np.float64)
        others = [place for place, block in enumerate(self.sums) if self.holders[block] != device]
        chosen = sorted(others, key=lambda place: (loads[place], place))[:copies]
        column = np.zeros((len(self.parity), 1))
        for place in chosen:
            column[place] = random.uniform(0.5, 1.5) * random.choice([-1.0, 1.0])
        changed = [(self.sums[place], float(column[place, 0])) for place in chosen]
        self.parity = np.concatenate([self.parity, column], axis=1)
        self.rows.append(rows)
        self.holders[name], self.versions[name] = device, 1
        for block, _ in changed:
            self.versions[block] += 1
        self._changed()
        return changed

    def _changed(self) -> None:
        count = len(self.rows)
        self.blocks = [*(f"d{place}" for place in range(count)), *(f"p{place}" for place in range(len(self.parity)))]
        self.place = {name: place for place, name in enumerate(self.blocks)}
        longest = [int(np.array(self.rows)[row != 0].max(initial=0)) for row in self.parity]
        self._lengths = dict(zip(self.blocks, [*self.rows, *longest], strict=True))
        self.code = PartitionCode(self.parity.reshape(-1, count), [0] * len(self.parity), name="coded training")
