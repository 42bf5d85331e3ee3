"""The seam of every sum code: the mean of many vectors, told from one sum.

Each worker encodes its vector to a *message*, a row of lanes that only ever need `+`; whoever adds them (a process
group, a share of the workers, a switch) knows nothing of the code. What one round of one bucket looks like on every
rank:

    stats = max over ranks of measure(vector)          # tiny
    total = sum over ranks of encode(vector, stats)    # lane by lane, in any order, of any subset that arrived
    mean = decode(total, stats, count, length)         # count: of messages in the total
    observe(mean)                                      # codes that learn from what has been summed

Laws, tested over every code:

- `decode` of the sum of any subset is within the code's stated error of the mean of that subset's vectors, when told
  how many there are; granules may hold different subsets;
- the order of adding does not matter; integer lanes are exact, and a world whose sums do not fit is refused by
  `encode`;
- a vector that is not finite on any rank gives a mean that is not finite on every rank; statistics that there are carry
  it as infinity, since a NaN would be lost in some reductions;
- vectors of zeros give exact zeros, and so does a granule of which nothing arrived;
- any length will do, 0 too; `unpack(pack(message)) == message` and `unpack_total(pack_total(total)) == total`, and both
  wire forms may be cut at granules.

Codes are pure: no clock, no I/O, no global random state. All randomness is hashed from (seed, step, bucket,
coordinate), and from the rank where it is private, so a round can be repeated bit for bit. Rounds of one bucket follow
each other: `observe` of a step comes before `encode` of the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["UNUSED_BUCKET", "Broadcast", "Count", "Round", "SumCode", "are_finite", "count_per_granule", "flat"]

Count: TypeAlias = int | Tensor
Broadcast: TypeAlias = Callable[[Tensor], None]

UNUSED_BUCKET = (1 << 31) - 1  # of no training: for trials


@dataclass(frozen=True, slots=True)
class Round:
    """Whose vector this is, and in which round.

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
            raise CodeError(f"rank {self.rank} is none of a world of {self.world}: ranks count from 0")


class SumCode(ABC):
    """The mean from one sum; see the module's laws.

    `repr` holds every setting that ranks must have in common: compare it before the first round.

    Attributes:
        name: short name for tables and configuration.
        granule: lanes that stay together when a message is cut into shards or packets, and that share one count.
        most_workers: largest world whose sums fit, or None where there is no bound.
    """

    name: str
    granule: int
    most_workers: int | None = None

    @abstractmethod
    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Statistics to be max-reduced over all ranks before `encode`: float32 `[few]`, perhaps `[0]`, never NaN.

        Args:
            vector: this rank's vector, floating point `[length]`, strided in any way.
            this_round: whose it is.

        Raises:
            CodeError: not one dense row of floating point numbers.
        """

    @abstractmethod
    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """The message: lanes `[lanes(length)]` in a type that holds the sum of `this_round.world` of them.

        Args:
            vector: as given to `measure`.
            stats: the maximum over all ranks of what `measure` gave.
            this_round: whose it is.

        Raises:
            CodeError: the vector or the statistics do not fit.
            ConfigurationError: the sums of so large a world do not fit the lanes.
        """

    @abstractmethod
    def decode(self, total: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """The mean of the vectors whose messages were added: float32 `[length]`.

        Args:
            total: sum of messages, `[lanes(length)]`, of any integer type that holds it (float32 for float lanes).
            stats: as given to `encode`.
            count: how many messages the total holds; or integers `[granules]`, one for each `granule` lanes. Where it
                is 0 the mean is 0.
            length: coordinates of the vectors.
            this_round: the round's; `rank` is not looked at.

        Raises:
            CodeError: total, statistics or count do not fit.
        """

    @abstractmethod
    def lanes(self, length: int, this_round: Round) -> int:
        """Lanes of a message for a vector of `length` coordinates."""

    @abstractmethod
    def up_width(self, this_round: Round) -> int:
        """Bits per lane of a packed message."""

    @abstractmethod
    def down_width(self, this_round: Round) -> int:
        """Bits per lane of a packed sum of up to `this_round.world` messages."""

    @abstractmethod
    def pack(self, message: Tensor, this_round: Round) -> Tensor:
        """The message, or any granules of it, as bytes: uint8 `[packed_bytes(lanes)]`."""

    @abstractmethod
    def unpack(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The lanes that `pack` was given, ready to be added."""

    @abstractmethod
    def pack_total(self, total: Tensor, this_round: Round) -> Tensor:
        """A sum of up to `this_round.world` messages, or any granules of it, as bytes: uint8 `[total_bytes(lanes)]`."""

    @abstractmethod
    def unpack_total(self, packed: Tensor, lanes: int, this_round: Round) -> Tensor:
        """The sums that `pack_total` was given."""

    def packed_bytes(self, lanes: int, this_round: Round) -> int:
        """Bytes of `lanes` packed lanes of a message."""
        return -(-lanes * self.up_width(this_round) // 8)

    def total_bytes(self, lanes: int, this_round: Round) -> int:
        """Bytes of `lanes` packed lanes of a sum."""
        return -(-lanes * self.down_width(this_round) // 8)

    def encode_packed(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """`pack` of what `encode` gives; a code may have a shorter way."""
        return self.pack(self.encode(vector, stats, this_round), this_round)

    def decode_packed(self, packed: Tensor, stats: Tensor, count: Count, length: int, this_round: Round) -> Tensor:
        """`decode` of the total that was packed; a code may have a shorter way."""
        total = self.unpack_total(packed, self.lanes(length, this_round), this_round)
        return self.decode(total, stats, count, length, this_round)

    def measure_owed(self, vector: Tensor, memory: Tensor, this_round: Round) -> Tensor:
        """`measure` of vector + memory; a code may have a shorter way.

        Args:
            vector: as for `measure`.
            memory: float32 `[length]`, contiguous, on the vector's device.
            this_round: whose they are.
        """
        return self.measure(flat(vector) + memory, this_round)

    def encode_owed(self, vector: Tensor, memory: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """`encode_packed` of vector + memory; a code may have a shorter way.

        Args:
            vector: as for `encode`.
            memory: as for `measure_owed`. Overwritten with what the message does not say of vector + memory: what is
                left after `decode` of this message alone.
            stats: as for `encode`, and all finite where the memory is to stay so.
            this_round: whose they are.
        """
        owed = flat(vector) + memory
        packed = self.encode_packed(owed, stats, this_round)
        message = self.unpack(packed, self.lanes(owed.numel(), this_round), this_round)
        memory.copy_(owed - self.decode(message, stats, 1, owed.numel(), this_round))
        return packed

    def add_packed(self, parts: Sequence[Tensor], lanes: int, this_round: Round) -> Tensor:
        """The sum of packed messages, or of the same granules of them: lanes in a type that holds it."""
        total = self.unpack(parts[0], lanes, this_round)
        for part in parts[1:]:
            total = total + self.unpack(part, lanes, this_round)
        return total

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:  # noqa: B027
        """Told, before the first round, the shapes of the parameters that make up a bucket's vector, in order.

        Most codes do not care. One that does treats a bucket it was told nothing of as a single row of numbers.

        Raises:
            CodeError: the bucket has been arranged otherwise before; its memories would be of the wrong parameters.
        """

    def prepare(self, world: int, device: torch.device) -> None:
        """Goes through a round of nothing but zeros: what is slow only in the first round is so now.

        A code that remembers what it has encoded forgets this again.

        Args:
            world: how many workers there will be.
            device: where the vectors will be.
        """
        this_round, vector = Round(0, world, bucket=UNUSED_BUCKET), torch.zeros(self.granule, device=device)
        stats = self.measure(vector, this_round)
        packed = self.encode_packed(vector, stats, this_round)
        lanes = self.lanes(self.granule, this_round)
        total = self.add_packed([packed], lanes, this_round)
        self.decode(total, stats, 1, self.granule, this_round)
        self.decode_packed(self.pack_total(total, this_round), stats, 1, self.granule, this_round)

    def observe(self, mean: Tensor, this_round: Round, broadcast: Broadcast) -> None:  # noqa: B027
        """What to learn from a finished round; called on every rank with the same mean. Most codes learn nothing.

        Args:
            mean: what `decode` gave.
            this_round: the round's.
            broadcast: overwrites its tensor with rank 0's on every rank; all ranks call it equally often.
        """

    def dropped(self, this_round: Round, lost: Tensor | None = None) -> None:  # noqa: B027
        """Told, before `observe`, when this rank's message was left out of the sum. Most codes remember nothing.

        Args:
            this_round: as given to `encode`.
            lost: booleans `[granules]`, true where it was left out; None for all of it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on identically: tensors, numbers and plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code.
        """
        if state:
            raise CodeError(f"{self.name} keeps no state, but was given {sorted(state)}: it is another code's")


def flat(vector: Tensor) -> Tensor:
    """The vector as contiguous float32, `[length]`.

    Raises:
        CodeError: sparse, not one row, or not floating point.
    """
    if vector.layout != torch.strided:
        raise CodeError("sparse gradients cannot be coded: make them dense")
    if vector.dim() != 1:
        raise CodeError(f"a sum code takes one row of numbers, found shape {tuple(vector.shape)}: flatten it first")
    if not vector.is_floating_point():
        raise CodeError(f"a sum code takes floating point numbers, found {vector.dtype}")
    return vector.detach().to(torch.float32).contiguous()


def are_finite(values: Tensor) -> Tensor:
    """Whether all numbers are finite, as a tensor."""
    # Extremes carry what is not finite, and take a twentieth of the time of looking at each number.
    extremes = torch.stack(torch.aminmax(values)) if values.numel() else values
    return extremes.isfinite().all()


def count_per_granule(count: Count, granules: int, this_round: Round, device: torch.device) -> Tensor:
    """The count, checked: integers `[granules]`, whichever way it was given.

    Raises:
        CodeError: a count that no round can have.
    """
    if isinstance(count, int):
        if not 0 <= count <= this_round.world:
            raise CodeError(
                f"a sum over {this_round.world} workers holds no more messages than that, found a count of {count}"
            )
        return torch.tensor(count, device=device).expand(granules)
    if count.shape != (granules,) or count.is_floating_point():
        raise CodeError(
            f"counts must be {granules} integers, one for each granule, found {count.dtype} {tuple(count.shape)}"
        )
    return count.to(device, torch.int64)
