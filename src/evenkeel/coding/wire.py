"""Defines what travels in a round of sum codes: all that whoever adds messages knows of them.

A rank's *message* is bytes. Its *lanes* are numbers that only ever need `+`, so anything can add them: the ranks
themselves, a process group, a switch. A `Wire` says how lanes are written as bytes; of the code it says nothing else.

Laws, tested over every code:

- `add` gives the lane-by-lane sum of what `unpack` gives, in a type that holds it; integer lanes are exact, so the
  order of adding does not matter;
- `unpack_total(pack_total(total)) == total`, for every sum of up to `world` messages;
- both forms may be cut at granules: the bytes of a part of the lanes are that part of the bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["Count", "Round", "Total", "Wire"]

Count: TypeAlias = int | Tensor


@dataclass(frozen=True, slots=True)
class Round:
    """Says whose vector this is, and in which round.

    Attributes:
        rank: of the worker, 0..world-1. Where all ranks do the same (`decode`), any rank gives the same result.
        world: how many workers there are: no sum holds more messages.
        step: number of the training step, the same on all ranks.
        bucket: which part of the gradient, the same on all ranks.
    """

    rank: int
    world: int
    step: int = 0
    bucket: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise CodeError(f"rank {self.rank} is not in a world of {self.world}: ranks count from 0")


@dataclass(frozen=True, slots=True)
class Total:
    """Holds a sum of messages, and how many it holds.

    Attributes:
        sums: one for each lane, in any integer type that holds them (float32 for float lanes); or their bytes.
        count: how many messages the sums hold; or integers `[granules]`, one for each granule.
        packed: true where `sums` are bytes, as `Wire.pack_total` gives them.
        lost: granules of this rank's own message that were left out, booleans `[granules]`; None where all were added.
    """

    sums: Tensor
    count: Count
    packed: bool = False
    lost: Tensor | None = None


class Wire(ABC):
    """Writes and adds the messages of one code in a world of a given size.

    Attributes:
        granule: lanes that stay together when a message is cut into shards or packets, and that share one count.
        up_width: bits of a lane of a message.
        down_width: bits of a lane of a sum of up to `world` messages.
        table: numbers that the lanes of a message are places in; None where they are the numbers themselves.
    """

    granule: int
    up_width: int
    down_width: int
    table: tuple[int, ...] | None = None

    @abstractmethod
    def unpack(self, message: Tensor, lanes: int) -> Tensor:
        """Gives a message's lanes, or those of any granules of it, in a type that holds the sum of `world` of them.

        Args:
            message: uint8 `[message_bytes(lanes)]`; only read.
            lanes: how many.

        Raises:
            CodeError: not as many bytes as so many lanes take.
        """

    @abstractmethod
    def pack_total(self, total: Tensor) -> Tensor:
        """Writes a sum of up to `world` messages, or any granules of it, as bytes: uint8 `[total_bytes(lanes)]`."""

    @abstractmethod
    def unpack_total(self, packed: Tensor, lanes: int) -> Tensor:
        """Gives the sums that `pack_total` was given.

        Raises:
            CodeError: not as many bytes as so many sums take.
        """

    def add(self, messages: Sequence[Tensor], lanes: int) -> Tensor:
        """Adds messages, or the same granules of them: the sums `[lanes]`, in a type that holds `world` of them."""
        total = self.unpack(messages[0], lanes)
        for message in messages[1:]:
            total = total + self.unpack(message, lanes)
        return total

    def message_bytes(self, lanes: int) -> int:
        """Counts the bytes of `lanes` lanes of a message."""
        return -(-lanes * self.up_width // 8)

    def total_bytes(self, lanes: int) -> int:
        """Counts the bytes of `lanes` lanes of a sum."""
        return -(-lanes * self.down_width // 8)

    def lanes_of(self, total: Total, lanes: int) -> Tensor:
        """Gives a total's sums, one for each lane, in whichever form they came.

        Raises:
            CodeError: there are not so many.
        """
        if total.packed:
            return self.unpack_total(total.sums, lanes)
        if total.sums.shape != (lanes,):
            raise CodeError(f"a total of {lanes} lanes is expected, found {tuple(total.sums.shape)}")
        return total.sums
