"""Exchanges over a process group of torch.distributed: Gloo or NCCL."""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evenkeel.coding.checks import number
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks.collectives import Collectives, broadcast_sends, ring_bytes, swap_bytes

__all__ = ["GroupCollectives", "collectives_over"]

# How often a GPU is asked whether an exchange is done: far below what one takes on a network worth compressing for.
_POLL_S = 1e-4
_LONGEST_S = 1e9  # thirty years; ten times as long overflows where torch counts nanoseconds
# Shorter rows go directly, in one step instead of one for each rank.
_RING_BYTES = 2**14


class GroupCollectives(Collectives):
    """Exchanges over `group`, by default over a new group of all ranks, which the first call opens on all of them.

    A group pairs calls by their order, and DDP exchanges a model's buffers on its own group from another thread. So a
    group that is given here must be used for nothing else: make one with `torch.distributed.new_group`, and give it a
    timeout too, or a frozen peer keeps the process from ending.

    NCCL may choose other algorithms than those that `sent_bytes` counts; they send about as much.

    Args:
        group: over which to exchange.
        timeout_s: how long a peer may stay silent. Default: as long as in `group`, or in the default group.

    Raises:
        ConfigurationError: a timeout that is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None and not 0 < number("timeout_s", timeout_s) <= _LONGEST_S:
            raise ConfigurationError(f"timeout_s must be above zero and at most {_LONGEST_S:g}, found {timeout_s!r}")
        if group is not None and dist.is_initialized() and group is dist.group.WORLD:
            raise ConfigurationError(
                "group: this is the group that DistributedDataParallel exchanges buffers on, from another thread; give "
                "one of its own, made with torch.distributed.new_group(), or none"
            )
        self.sent_bytes = 0
        self.exchanged_s = 0.0
        self._given = group
        self._group: Any = group
        self._timeout_s = timeout_s
        self._process = os.getpid() if group is not None else None  # whose connections the group has
        self._broken: str | None = None

    @property
    def rank(self) -> int:
        """Gives the number of this rank in the group, 0 up."""
        _need_process_group()
        return int(dist.get_rank(self._given))

    @property
    def world(self) -> int:
        """Counts the ranks of the group."""
        _need_process_group()
        return int(dist.get_world_size(self._given))

    @property
    def members(self) -> list[int]:
        """Gives the ranks of the group, by their numbers among all ranks."""
        _need_process_group()
        return sorted(dist.get_process_group_ranks(self._given or dist.group.WORLD))

    def largest(self, values: Tensor) -> Tensor:
        """Gives the largest of all ranks' `values`, elementwise."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def add(self, values: Tensor) -> Tensor:
        """Adds all ranks' `values`, elementwise, in their own type."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Gives what every rank has for this one: part r goes to rank r, `sizes[r]` elements come from it."""
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(sizes))
        lengths = [part.numel() for part in parts]
        self._run(
            lambda group: dist.all_to_all_single(received, sent, list(sizes), lengths, group=group, async_op=True), sent
        )
        self.sent_bytes += swap_bytes(parts, self.rank)
        return list(torch.split(received, list(sizes)))

    def gather(self, row: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Gives all ranks' rows; long ones along a ring, where nobody is sent to by all others at once."""
        sizes = list(sizes or [row.numel()] * self.world)
        longest = max(sizes)
        if longest * row.element_size() < _RING_BYTES:
            return super().gather(row, sizes)
        padded = torch.nn.functional.pad(row, (0, longest - row.numel()))
        rows = [padded.new_empty(longest) for _ in sizes]
        self._run(lambda group: dist.all_gather(rows, padded, group=group, async_op=True), padded)
        self.sent_bytes += (self.world - 1) * longest * row.element_size()
        return [each[:size] for each, size in zip(rows, sizes, strict=True)]

    def broadcast(self, values: Tensor) -> None:
        """Overwrites `values` with those of rank 0."""
        root = 0 if self._given is None else dist.get_global_rank(self._given, 0)
        whole = values.contiguous()
        self._run(lambda group: dist.broadcast(whole, root, group=group, async_op=True), whole)
        values.copy_(whole)
        self.sent_bytes += broadcast_sends(self.rank, self.world) * whole.numel() * whole.element_size()

    def close(self) -> None:
        """Closes the connections, unless the group was given; peers that still wait for this rank get an error."""
        self._broken = self._broken or "the reducer was closed"
        if self._given is None:
            self._drop()
        # Threads of a group that is still referred to when the interpreter ends take the process down.
        self._group = self._given = None

    def _all_reduce(self, values: Tensor, operation: Any) -> Tensor:
        reduced = values.clone(memory_format=torch.contiguous_format)
        self._run(lambda group: dist.all_reduce(reduced, operation, group=group, async_op=True), reduced)
        self.sent_bytes += ring_bytes(reduced, self.world)
        return reduced

    def _run(self, start: Callable[[Any], Any], values: Tensor) -> None:
        if self._broken is not None:
            raise ReducerError(f"the ranks cannot exchange gradients any more: {self._broken}")
        if self._process not in (None, os.getpid()):
            raise ConfigurationError(
                "this process was forked from the one whose process group it would exchange gradients over: make the "
                "group, and what uses it, in the process that trains"
            )
        _need_process_group()
        timeout_s = _timeout_of(self._given or dist.group.WORLD) if self._timeout_s is None else self._timeout_s
        try:
            if self._group is None:
                self._process = os.getpid()
                self._group = dist.new_group(timeout=timedelta(seconds=timeout_s))
            begin = time.perf_counter()
            start(self._group).wait(timedelta(seconds=timeout_s))
            if values.is_cuda:
                self._wait_for_gpu(timeout_s)
            self.exchanged_s += time.perf_counter() - begin
        except (RuntimeError, TimeoutError) as error:  # what torch raises for a lost peer and for a silent one
            self._broken = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            who = f"rank {self.rank} of {self.world}"
            # Only neighbours notice a rank that is gone; they pass it on by going as well.
            self._drop()
            raise ReducerError(
                f"{who} lost a peer while exchanging gradients, or waited longer than "
                f"timeout_s={timeout_s:g}: {self._broken}; see the other ranks' output for the first failure"
            ) from error

    def _drop(self) -> None:
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _wait_for_gpu(self, timeout_s: float) -> None:
        # NCCL's wait only orders streams; a peer that is gone would show up nowhere but in a hanging GPU.
        cuda: Any = torch.cuda
        done = cuda.Event()
        done.record()
        deadline = time.monotonic() + timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no reply within {timeout_s:g} s")
            time.sleep(_POLL_S)


def collectives_over(over: Collectives | dist.ProcessGroup | None, timeout_s: float | None) -> Collectives:
    """Gives the ranks that are given, or those of a group; of a new group of all ranks by default."""
    return over if isinstance(over, Collectives) else GroupCollectives(over, timeout_s=timeout_s)


def _timeout_of(group: Any) -> float:
    """Gives the seconds that a group waits for a peer, of its backend for CPU tensors where it has several."""
    backends = [group._get_backend(device) for device in sorted(group._device_types, key=str)]
    waits = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return min(_LONGEST_S, float((waits[0] if waits else dist.default_pg_timeout).total_seconds()))


def _need_process_group() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigurationError(
            "there is no process group yet: call torch.distributed.init_process_group before gradients are exchanged"
        )
