"""Shares out a kernel's blocks among threads.

Not Numba's own threads: one of its threading layers kills the process when two Python threads start kernels at once,
as a gradient hook and a communication thread do.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["share_out"]

_WORTH_A_THREAD = 1 << 16  # lanes; some 100 microseconds of work


def share_out(kernel: Callable[..., None], parts: int, part_lanes: int, *arguments: Any) -> None:
    """Calls `kernel(first, last, *arguments)` over all of 0..parts - 1, in as many threads as torch uses and pay.

    Args:
        kernel: releases the GIL; does the parts from first to last - 1.
        parts: how many there are.
        part_lanes: lanes of one part.
        arguments: passed on.
    """
    threads = max(1, min(torch.get_num_threads(), parts * part_lanes // _WORTH_A_THREAD))
    bounds = [parts * thread // threads for thread in range(threads + 1)]
    others = [_pool().submit(kernel, first, last, *arguments) for first, last in pairwise(bounds[1:])]
    kernel(0, bounds[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="evenkeel-kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, but not its threads
