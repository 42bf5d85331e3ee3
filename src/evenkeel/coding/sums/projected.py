"""Turns a vector into fewer numbers, which then travel in another code."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode, flat
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.wire import Round, Total, Wire
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["Projected", "Projection", "Shapes", "check_arrangement"]

Shapes = list[tuple[int, ...]]


class Projection(ABC):
    """Maps a bucket's vectors linearly to fewer numbers, and back to vectors near them.

    Attributes:
        shapes: of the parameters that make up a vector, in order.
        length: coordinates of a vector.
    """

    shapes: Shapes
    length: int

    @property
    @abstractmethod
    def coded_length(self) -> int:
        """Counts the numbers of a projected vector."""

    @abstractmethod
    def project(self, vector: Tensor) -> Tensor:
        """Gives the numbers `[coded_length]` for a vector, contiguous float32 `[length]`."""

    @abstractmethod
    def expand(self, coded: Tensor) -> Tensor:
        """Gives the vector `[length]` that numbers stand for."""


class Projected(SumCode):
    """Sends the messages of `inner` for a vector's projection.

    A bucket that there is no projection for travels in `inner` as it is.

    Args:
        inner: codes what is projected. None: float32 as it is.

    Attributes:
        inner: as given.

    Raises:
        ConfigurationError: `inner` is no sum code, or remembers vectors of earlier rounds.
    """

    def __init__(self, inner: SumCode | None) -> None:
        if isinstance(inner, ErrorFeedback | Projected):
            raise ConfigurationError(
                f"inner: must be a code without memory, as messages change their length, found {inner!r}: "
                f"use ErrorFeedback({type(self).__name__}(...))"
            )
        if not isinstance(inner, SumCode | None):
            raise ConfigurationError(f"inner: must be a sum code such as THC(bits=4), or None, found {inner!r}")
        self.inner = Plain() if inner is None else inner
        self.granule = self.inner.granule
        self.max_workers = self.inner.max_workers
        self._measured: dict[int, _MeasuredVector] = {}

    @abstractmethod
    def _projection(self, bucket: int) -> Projection | None:
        """Gives the bucket's, in its next round; None where the bucket was not arranged."""

    def measure(self, vector: Tensor, this_round: Round) -> Tensor:
        """Gives what the inner code measures of the projection."""
        return self.inner.measure(self._project(vector, None, this_round).coded, this_round)

    def measure_owed(self, vector: Tensor, memory: Tensor, this_round: Round) -> Tensor:
        """Does the same for vector + memory."""
        return self.inner.measure(self._project(vector, memory, this_round).coded, this_round)

    def encode(self, vector: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Gives the inner code's message for the projection."""
        return self.inner.encode(self._projected(vector, None, this_round).coded, stats, this_round)

    def encode_owed(self, vector: Tensor, memory: Tensor, stats: Tensor, this_round: Round) -> Tensor:
        """Does the same for vector + memory, projected once for both `measure_owed` and this."""
        projected = self._projected(vector, memory, this_round)
        message = self.inner.encode(projected.coded, stats, this_round)
        lanes = self.inner.lanes(projected.coded.numel(), this_round)
        alone = Total(self.inner.wire(this_round.world).unpack(message, lanes), 1)
        torch.sub(projected.owed, self.decode(alone, stats, projected.owed.numel(), this_round), out=memory)
        return message

    def decode(self, total: Total, stats: Tensor, length: int, this_round: Round) -> Tensor:
        """Gives the vector that the mean projection stands for."""
        coded = self.inner.decode(total, stats, self._coded_length(length, this_round), this_round)
        projection = self._projection(this_round.bucket)
        return coded if projection is None else projection.expand(coded)

    def lanes(self, length: int, this_round: Round) -> int:
        """Counts the inner code's, of as many numbers as a projection has in the bucket's next round."""
        return self.inner.lanes(self._coded_length(length, this_round), this_round)

    def wire(self, world: int) -> Wire:
        """Asks the inner code."""
        return self.inner.wire(world)

    def _checked(self, length: int, this_round: Round) -> Projection | None:
        projection = self._projection(this_round.bucket)
        if projection is not None and length != projection.length:
            raise CodeError(
                f"the bucket was arranged with {projection.length} coordinates, but its vector has {length}"
            )
        return projection

    def _coded_length(self, length: int, this_round: Round) -> int:
        projection = self._checked(length, this_round)
        return length if projection is None else projection.coded_length

    def _project(self, vector: Tensor, memory: Tensor | None, this_round: Round) -> "_MeasuredVector":
        owed = flat(vector) if memory is None else flat(vector) + memory
        projection = self._checked(owed.numel(), this_round)
        coded = owed if projection is None else projection.project(owed)
        measured = _MeasuredVector(this_round, _contents(vector), _contents(memory), (vector, memory), owed, coded)
        self._measured[this_round.bucket] = measured
        return measured

    def _projected(self, vector: Tensor, memory: Tensor | None, this_round: Round) -> "_MeasuredVector":
        """Gives what the measurement before has projected, if it was of the same numbers; keeps it no longer."""
        found = self._measured.pop(this_round.bucket, None)
        if found is None or (found.this_round, found.vector, found.memory) != (
            this_round,
            _contents(vector),
            _contents(memory),
        ):
            found = self._project(vector, memory, this_round)
            del self._measured[this_round.bucket]
        return found


_Contents = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _MeasuredVector:
    """Keeps what was measured in a round, for its encoding.

    Attributes:
        this_round: the round's.
        vector: tells whether a vector is the one measured.
        memory: likewise.
        alive: both, so that their addresses are nobody else's.
        owed: their sum.
        coded: its projection.
    """

    this_round: Round
    vector: _Contents
    memory: _Contents
    alive: tuple[Tensor, Tensor | None]
    owed: Tensor
    coded: Tensor


def _contents(tensor: Tensor | None) -> _Contents:
    """Gives what differs between tensors that are another or have been written to since."""
    if tensor is None:
        return ()
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype


def check_arrangement(bucket: int, known: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises a CodeError unless a bucket is arranged as it was before."""
    if list(known) != list(shapes):
        raise CodeError(
            f"bucket {bucket} was arranged as {list(known)} before and now as {list(shapes)}: "
            "arrange buckets once they are final, with a new code"
        )
