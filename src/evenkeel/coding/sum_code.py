"""Defines what every sum code does: it gives the mean of many vectors from one sum.

Each worker encodes its vector to a *message*, the bytes of a row of lanes that only ever need `+`; whoever adds them
knows the code's `Wire` (`wire.py`) and nothing else. One round of one bucket on every rank:

    stats = max over ranks of measure(vector)          # tiny
    message = encode(vector, stats)
    total = sum over ranks of the messages' lanes      # in any order, of any subset that arrived
    mean = decode(total, stats, length)                # the total says how many messages it holds
    observe(mean)                                      # codes that learn from what has been summed

Laws, tested over every code:

- `decode` of the sum of any subset is within the code's stated error of the mean of that subset's vectors, given
  how many there are; granules may hold different subsets;
- a world whose sums do not fit is refused by `wire` and by `encode`;
- a vector that is not finite on any rank gives a mean that is not finite on every rank; statistics that there are carry
  it as infinity, since a NaN would be lost in some reductions;
- vectors of zeros give exact zeros, and so does a granule of which nothing arrived;
- any length will do, 0 too.

Codes are pure: no clock, no I/O, no global random state. All randomness is hashed from (seed, step, bucket,
coordinate), and from the rank where it is private, so a round can be repeated bit for bit. Rounds of one bucket follow
each other: `observe` of a step comes before `encode` of the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evenkeel.coding.wire import Count, Round, Total, Wire
from evenkeel.errors import CodeError

__all__ = ["UNUSED_BUCKET", "Broadcast", "SumCode", "are_finite", "count_per_granule", "flat"]

Broadcast: TypeAlias = Callable[[Tensor], None]

UNUSED_BUCKET = (1 << 31) - 1  # of no training: for trials


class SumCode(ABC):
    """Gives the mean of vectors from the sum of their messages; see the module's laws.

    `repr` holds every setting that ranks must have in common: compare it before the first round.

    Attributes:
        name: short name for tables and configuration.
        granule: lanes that share one count; see `Wire`.
        max_workers: largest world whose sums fit, or None where there is no bound.
    """

    name: str
    granule: int
    max_workers: int | None = None

    @abstractmethod
    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives statistics to be max-reduced over all ranks before `encode`: float32 `[few]`, perhaps `[0]`, never NaN.

        Args:
            vector: this rank's vector, floating point `[length]`, strided in any way.
            this_round: whose it is.

        Raises:
            CodeError: not one dense row of floating point numbers.
        """

    @abstractmethod
    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Gives the message: uint8, the bytes of `lanes(length)` lanes. Nobody may write into it.

        Args:
            vector: as given to `measure`.
            stats: the maximum over all ranks of what `measure` gave.
            this_round: whose it is.

        Raises:
            CodeError: the vector or the statistics do not fit.
            ConfigurationError: the sums of so large a world do not fit the lanes.
        """

    @abstractmethod
    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives the mean of the vectors whose messages were added: float32 `[length]`, 0 where the count is 0.

        Args:
            total: sums of `lanes(length)` lanes, and how many messages they hold.
            stats: as given to `encode`.
            length: coordinates of the vectors.
            this_round: the round's; `rank` is not looked at.

        Raises:
            CodeError: total, statistics or count do not fit.
        """

    @abstractmethod
    def lanes(self, length: int, this_round: Round) -> int:
        """Counts the lanes of a message for a vector of `length` coordinates."""

    @abstractmethod
    def wire(self, world: int) -> Wire:
        """Gives the form of messages, and of sums of up to `world` of them: all that a reducer needs to know.

        Raises:
            ConfigurationError: the sums of so large a world do not fit the lanes.
        """

    def measure_owed(self, vector: Tensor, memory: Tensor, this_round: Round) -> Tensor:
        """Measures vector + memory; a code may have a shorter way.

        Args:
            vector: as for `measure`.
            memory: float32 `[length]`, contiguous, on the vector's device.
            this_round: whose they are.
        """
        return self.measure(flat(vector) + memory, this_round)

    def encode_owed(self, vector: Tensor, memory: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Encodes vector + memory; a code may have a shorter way.

        Args:
            vector: as for `encode`.
            memory: as for `measure_owed`. Overwritten with what the message does not say of vector + memory: what is
                left after `decode` of this message alone.
            stats: as for `encode`, and all finite where the memory is to stay so.
            this_round: whose they are.
        """
        owed = flat(vector) + memory
        message, length = self.encode(owed, stats, this_round), owed.numel()
        alone = Total(self.wire(this_round.world).unpack(message, self.lanes(length, this_round)), 1)
        memory.copy_(owed - self.decode(alone, stats, length, this_round))
        return message

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:  # noqa: B027
        """Takes, before the first round, the shapes of the parameters that make up a bucket's vector, in order.

        Most codes do not care. One that does treats a bucket that was not arranged as a single row of numbers.

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
        this_round, length = Round(0, world, bucket=UNUSED_BUCKET), self.granule
        vector, wire = torch.zeros(length, dtype=torch.float32, device=device), self.wire(world)
        stats = self.measure(vector, this_round)
        message = self.encode(vector, stats, this_round)
        sums = wire.add([message], self.lanes(length, this_round))
        self.decode(Total(sums, 1), stats, length, this_round)
        self.decode(Total(wire.pack_total(sums), 1, packed=True), stats, length, this_round)

    def observe(self, mean: Tensor, this_round: Round, broadcast: Broadcast) -> None:  # noqa: B027
        """Learns from a finished round; called on every rank with the same mean. Most codes learn nothing.

        Args:
            mean: what `decode` gave.
            this_round: the round's.
            broadcast: overwrites its tensor with rank 0's on every rank; all ranks call it equally often.
        """

    def dropped(self, this_round: Round, lost: Tensor | None = None) -> None:  # noqa: B027
        """Takes note, before `observe`, that this rank's message was left out of the sum. Most codes remember nothing.

        Args:
            this_round: as given to `encode`.
            lost: booleans `[granules]`, true where it was left out; None for all of it.
        """

    def state_dict(self) -> dict[str, Any]:
        """Gives what this rank must keep to go on identically: tensors, numbers and plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code, or malformed. Nothing has been loaded then.
        """
        if not isinstance(state, Mapping) or state:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise CodeError(f"{self.name} keeps no state, but was given {found}: it is another code's")


def flat(vector: Tensor) -> Tensor:
    """Gives the vector as contiguous float32, `[length]`.

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
    """Tells whether all numbers are finite, as a tensor."""
    # Extremes carry what is not finite, and take a twentieth of the time of looking at each number.
    extremes = torch.stack(torch.aminmax(values)) if values.numel() else values
    return extremes.isfinite().all()


def count_per_granule(count: Count, granules: int, this_round: Round, device: torch.device) -> Tensor:
    """Gives the count, checked: integers `[granules]`, whichever way it was given.

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
