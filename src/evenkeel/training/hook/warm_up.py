"""Does before the first step what is slow only once: there it would look like a hang, and peers would wait."""

import logging
import time
from functools import lru_cache
from typing import Any

import torch

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.kernels import fast
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.collectives import Collectives

__all__ = ["warm_up"]

_CUDA: Any = torch.cuda
_log = logging.getLogger(__name__)
# One with sums of a byte, and one with larger ones: kernels differ only by that.
_SMALL, _LARGE = 1, 256


def warm_up(code: SumCode, ranks: Collectives) -> None:
    """Has `code` compile the kernels that it will need, where the gradients will probably be.

    Says at level INFO, once in a process, why this takes seconds: on a machine's first use. Later processes find the
    compiled kernels on disk.
    """
    device = torch.device("cpu")
    if _CUDA.is_available() and _CUDA.is_initialized():
        device = torch.device("cuda", _CUDA.current_device())
    begin = time.perf_counter()
    if fast(torch.zeros(1, dtype=torch.float32, device=device)) is not None:
        _announce()
    for world in _worlds(ranks):
        code.prepare(world if code.max_workers is None else min(world, code.max_workers), device)
    _log.debug("%r was ready after %.1f s", code, time.perf_counter() - begin)


@lru_cache(maxsize=1)
def _announce() -> None:
    _log.info(
        "getting the kernels of sum codes ready: compiling them takes some seconds of processor time when a machine "
        "does it for the first time, and next to nothing after that"
    )


def _worlds(ranks: Collectives) -> list[int]:
    try:
        return [ranks.world]
    except ConfigurationError:  # a process group that is opened later
        return [_SMALL, _LARGE]
