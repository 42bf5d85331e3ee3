"""Measures the constants of the timing model, on the group that will train and on its own step.

All ranks call the same function at the same time, and all get the same answer.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from evenkeel.errors import ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.training.plan.timing import NetworkLink, Step, ddp_segments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "MeasuredLink",
    "fit_link",
    "group_from_environment",
    "measure_link",
    "measure_step",
]

_SMALL_REPEATS = 20
_REPEATS = 3
_FIRST_BYTES, _MAX_BYTES = 2**16, 2**28
_FEWEST_SIZES = 3
_ADDED_BYTES = 2**22  # beyond most caches, as gradients are
_TIMEOUT_S = 120.0  # for a peer to come or to answer


@dataclass(frozen=True)
class MeasuredLink:
    """Holds a group's link, and the times from which it was fitted."""

    link: NetworkLink
    workers: int
    points: tuple[tuple[int, float], ...]  # bytes and seconds of all-reduces


def fit_link(
    message_s: float, small_s: float, points: Sequence[tuple[float, float]], gamma_s_per_byte: float, workers: int
) -> NetworkLink:
    """Finds the constants that explain what was measured.

    `message_s` is alpha; a sum of nearly nothing takes 2(p-1) alpha + S, which gives S; and the slope of sums over
    their size (least squares) is 2(p-1)/p beta + (p-1)/p gamma, which gives beta.

    Args:
        message_s: one tiny message's way.
        small_s: an all-reduce of one number.
        points: bytes and seconds of all-reduces, of at least two sizes.
        gamma_s_per_byte: adding one array to another.
        workers: 2 or more.
    """
    if workers < 2:
        raise ConfigurationError(f"workers: must be 2 or more, found {workers}; one alone has no link")
    sizes, seconds = [size for size, _ in points], [time_s for _, time_s in points]
    if len(set(sizes)) < 2:
        raise EvenkeelError("a link's bandwidth needs all-reduces of two sizes at least")
    slope = statistics.linear_regression(sizes, seconds).slope
    share = (workers - 1) / workers
    return NetworkLink(
        alpha_s=message_s,
        beta_s_per_byte=max(0.0, (slope - share * gamma_s_per_byte) / (2 * share)),
        gamma_s_per_byte=gamma_s_per_byte,
        sync_s=max(0.0, small_s - 2 * (workers - 1) * message_s),
    )


def measure_link(group: "ProcessGroup | None" = None, device: Any = "cpu", budget_s: float = 8.0) -> MeasuredLink:
    """Fits the link of a running group to the times of messages, barriers and all-reduces of growing size.

    Args:
        group: the default group, unless another is given; of 2 ranks or more.
        device: where the gradients will be.
        budget_s: sizes grow as long as it is likely to last; three sizes are measured in any case.

    Raises:
        ConfigurationError: no group is running, or it has one rank only.
    """
    torch = _torch()
    dist = torch.distributed
    if not dist.is_initialized():
        raise ConfigurationError("no process group is running; call torch.distributed.init_process_group first")
    workers, rank = dist.get_world_size(group), dist.get_rank(group)
    if workers < 2:
        raise ConfigurationError("the process group has one rank only: there is no link to measure")
    first, last = (dist.get_global_rank(group or dist.group.WORLD, place) for place in (0, workers - 1))
    began = time.perf_counter()
    one = torch.zeros(1, dtype=torch.float32, device=device)

    def settle() -> None:
        if one.is_cuda:
            torch.cuda.synchronize(one.device)

    def all_reduce_s(values: Any) -> float:
        dist.barrier(group)
        settle()
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        settle()
        return time.perf_counter() - start

    def bounce_s() -> float:
        """Times half a round trip between the first rank and the last, the likeliest to be on different machines."""
        start = time.perf_counter()
        if rank == 0:
            dist.send(one, last, group=group)
            dist.recv(one, last, group=group)
        elif rank == workers - 1:
            dist.recv(one, first, group=group)
            dist.send(one, first, group=group)
        settle()
        return (time.perf_counter() - start) / 2

    def shared(number: float) -> float:
        """Gives rank 0's number to all ranks; as two halves, since not every backend carries double precision."""
        halves = torch.tensor([number], dtype=torch.float64).view(torch.int32).to(device)
        dist.broadcast(halves, first, group=group)
        return float(halves.cpu().view(torch.float64)[0])

    all_reduce_s(one)  # connections are made by the first
    bounce_s()
    dist.barrier(group)
    message_s = statistics.median(bounce_s() for _ in range(_SMALL_REPEATS))
    small_s = statistics.median(all_reduce_s(one) for _ in range(_SMALL_REPEATS))
    points: list[tuple[int, float]] = []
    size = _FIRST_BYTES
    while True:
        values = torch.zeros(size // 4, dtype=torch.float32, device=device)
        points.append((size, statistics.median(all_reduce_s(values) for _ in range(_REPEATS))))
        size *= 4
        left_s = budget_s - (time.perf_counter() - began)
        go_on = size <= _MAX_BYTES and (len(points) < _FEWEST_SIZES or 4 * _REPEATS * points[-1][1] < left_s)
        # Clocks differ: rank 0 decides for all.
        if not shared(float(go_on)):
            break
    gamma_s_per_byte = _adding_s_per_byte(torch, device, settle)
    link = fit_link(message_s, small_s, points, gamma_s_per_byte, workers) if rank == 0 else NetworkLink(0, 0)
    numbers = (link.alpha_s, link.beta_s_per_byte, link.gamma_s_per_byte, link.sync_s)
    link = NetworkLink(*(shared(number) for number in numbers))
    seconds = [shared(time_s) for _, time_s in points]
    return MeasuredLink(link, workers, tuple(zip((size for size, _ in points), seconds, strict=True)))


def measure_step(
    forward: Callable[[], Any],
    backward: Callable[[Any], object],
    update: Callable[[], object],
    parameters: int,
    *,
    segments: int | None = None,
    repeats: int = 10,
    settle: Callable[[], object] = lambda: None,
) -> Step:
    """Times one worker's own step without any communication: medians, after one run that is not counted.

    Start it on all ranks at the same time where they share a machine, since they will do so in training.

    Args:
        forward: gives the loss.
        backward: is given what `forward` gave. Under DDP call it inside `no_sync()`.
        update: the optimiser's step.
        parameters: how many numbers the workers will share.
        segments: buckets; as many as DDP makes by default.
        repeats: how often, 1 or more.
        settle: waits for the device, such as torch.cuda.synchronize.
    """
    if repeats < 1:
        raise ConfigurationError(f"repeats: must be 1 or more, found {repeats}")
    seconds: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        moments = [time.perf_counter()]
        loss = forward()
        for part in (lambda: None, lambda loss=loss: backward(loss), update):
            part()
            settle()
            moments.append(time.perf_counter())
        seconds.append((moments[1] - moments[0], moments[2] - moments[1], moments[3] - moments[2]))
    forward_s, backward_s, update_s = (statistics.median(times) for times in zip(*seconds[1:], strict=True))
    segments = ddp_segments(parameters) if segments is None else segments
    return Step(forward_s, backward_s, parameters, update_s=update_s, segments=segments)


@contextmanager
def group_from_environment(backend: str) -> Iterator[int]:
    """Makes a process group as torchrun's variables say; gives this process's rank in it, and ends with the context.

    Raises:
        ConfigurationError: a variable is missing or wrong, or the backend is.
        EvenkeelError: the others did not come.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} must be set, as torchrun and `evenkeel lab run` do")
    torch = _torch()
    dist = torch.distributed
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ConfigurationError(
            "backend: nccl needs a GPU and a torch that was built with CUDA and NCCL, which is not so here; "
            "choose --backend gloo"
        )
    try:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT_S))
    except ValueError as error:
        raise ConfigurationError(f"the process group cannot be made: {error}") from error
    except RuntimeError as error:
        raise EvenkeelError(f"the process group could not be made: {_first_line(error)}") from error
    try:
        yield dist.get_rank()
    except RuntimeError as error:
        raise EvenkeelError(f"the group failed while it was measured: {_first_line(error)}") from error
    finally:
        dist.destroy_process_group()


def _adding_s_per_byte(torch: Any, device: Any, settle: Callable[[], None]) -> float:
    total, share = (torch.zeros(_ADDED_BYTES // 4, dtype=torch.float32, device=device) for _ in range(2))
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        total.add_(share)
        settle()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / _ADDED_BYTES


def _torch() -> Any:
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        raise MissingExtraError("torch", "train") from error
    return torch


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
