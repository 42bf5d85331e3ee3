"""Exchanges between threads of one process: for laws, tests and simulations, without a network."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from evenkeel.errors import ReducerError
from evenkeel.reducers.ranks.collectives import Collectives, broadcast_sends, ring_bytes, swap_bytes

__all__ = ["ThreadCollectives", "thread_collectives"]

Value = TypeVar("Value")


@dataclass
class _Meeting:
    """Holds one exchange: what each rank brought, and how many have taken it."""

    brought: dict[int, Any] = field(default_factory=dict)
    taken: int = 0


@dataclass
class _MeetingPlace:
    """Holds what the ranks meet over."""

    world: int
    timeout_s: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    meetings: dict[int, _Meeting] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)


class ThreadCollectives(Collectives):
    """Is one rank's side of exchanges between threads; `thread_collectives` makes it."""

    def __init__(self, room: _MeetingPlace, rank: int) -> None:
        self.sent_bytes = 0
        self.exchanged_s = 0.0
        self._room = room
        self._rank = rank
        self._calls = 0
        self._broken: str | None = None

    @property
    def rank(self) -> int:
        """Gives the number of this rank in the group, 0 up."""
        return self._rank

    @property
    def world(self) -> int:
        """Counts the ranks of the group."""
        return self._room.world

    def largest(self, values: Tensor) -> Tensor:
        """Gives the largest of all ranks' `values`, elementwise."""
        self.sent_bytes += ring_bytes(values, self.world)
        return torch.stack(self._meet(values.clone())).amax(0)

    def add(self, values: Tensor) -> Tensor:
        """Adds all ranks' `values`, elementwise, in their own type."""
        self.sent_bytes += ring_bytes(values, self.world)
        return torch.stack(self._meet(values.clone())).sum(0, dtype=values.dtype)

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Gives what every rank has for this one: part r goes to rank r, `sizes[r]` elements come from it."""
        self.sent_bytes += swap_bytes(parts, self._rank)
        received = [theirs[self._rank] for theirs in self._meet([part.clone() for part in parts])]
        if [part.numel() for part in received] != list(sizes):
            raise ReducerError(f"rank {self._rank} expected rows of {list(sizes)}, found {[len(r) for r in received]}")
        return received

    def broadcast(self, values: Tensor) -> None:
        """Overwrites `values` with those of rank 0."""
        self.sent_bytes += broadcast_sends(self._rank, self.world) * values.numel() * values.element_size()
        values.copy_(self._meet(values.clone())[0])

    def close(self) -> None:
        """Leaves the room; the others' exchanges fail from now on."""
        self._broken = self._broken or "the reducer was closed"
        with self._room.changed:
            self._room.left.add(self._rank)
            self._room.changed.notify_all()

    def _meet(self, value: Value) -> list[Value]:
        if self._broken is not None:
            raise ReducerError(f"the ranks cannot exchange gradients any more: {self._broken}")
        room, number, begin = self._room, self._calls, time.perf_counter()
        self._calls += 1
        with room.changed:
            meeting = room.meetings.setdefault(number, _Meeting())
            meeting.brought[self._rank] = value
            room.changed.notify_all()
            complete = room.changed.wait_for(self._settled(meeting), room.timeout_s)
            if len(meeting.brought) < room.world:
                silent = set(range(room.world)) - meeting.brought.keys()
                gone = sorted(silent & room.left)
                self._broken = f"ranks {gone} are gone" if complete else f"ranks {sorted(silent)} stayed silent"
                raise ReducerError(
                    f"rank {self._rank} of {room.world} lost a peer while exchanging gradients, or waited longer than "
                    f"timeout_s={room.timeout_s:g}: {self._broken}"
                )
            meeting.taken += 1
            if meeting.taken == room.world:
                del room.meetings[number]
            self.exchanged_s += time.perf_counter() - begin
            return [meeting.brought[rank] for rank in range(room.world)]

    def _settled(self, meeting: _Meeting) -> Callable[[], bool]:
        room = self._room
        return lambda: len(meeting.brought) == room.world or bool(room.left - meeting.brought.keys())


def thread_collectives(world: int, *, timeout_s: float = 30.0) -> list[ThreadCollectives]:
    """Gives the sides of `world` ranks that exchange within this process, each to be used by a thread of its own.

    Args:
        world: how many ranks.
        timeout_s: how long a rank may stay silent.
    """
    room = _MeetingPlace(world, timeout_s)
    return [ThreadCollectives(room, rank) for rank in range(world)]
