"""Runs ranks of one Gloo group as processes of this machine: for tests, examples and measurements."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from evenkeel.errors import ReducerError

__all__ = ["local_ranks"]


def local_ranks(world: int, work: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Gives what `work(*args)` gives on each of `world` ranks; None for a rank whose process ended without an answer.

    Each rank is a process with one thread and an initialised default process group. All of them have ended on return.

    Args:
        world: how many ranks.
        work: a function that a new process can import.
        args: for `work`, the same on every rank; pickled.
        timeout_s: for everything together.

    Raises:
        ReducerError: a rank raised an error (its traceback is in the message), or the time is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])  # torch takes seconds to import; so it is imported once
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        ends: list[Connection] = []
        processes = []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                ends.append(ours)
                process = context.Process(target=_rank, args=(theirs, folder, rank, world, work, args), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
            return _results(ends, deadline, timeout_s)
        finally:
            for process in processes:
                process.join(max(0.0, min(5.0, deadline - time.monotonic())))
                if process.exitcode is None:
                    process.kill()
                    process.join()
                process.close()
            for end in ends:
                end.close()


def _results(ends: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: list[Any] = [None] * len(ends)
    waiting = dict(zip(ends, range(len(ends)), strict=True))
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ReducerError(f"ranks {sorted(waiting.values())} were not done within {timeout_s:g} s")
        for end in ready:
            assert isinstance(end, Connection)
            rank = waiting.pop(end)
            try:
                error, results[rank] = end.recv()
            except EOFError:
                continue
            if error is not None:
                raise ReducerError(f"rank {rank} of {len(ends)} failed:\n{error}")
    return results


def _rank(end: Connection, folder: str, rank: int, world: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        outcome: tuple[str | None, Any] = (None, work(*args))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    end.send(outcome)
    end.close()
    # At once: a group whose peer is gone can keep an orderly end waiting.
    os._exit(0)
