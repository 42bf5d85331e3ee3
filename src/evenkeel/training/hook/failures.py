"""Failures of futures, raised as what they are."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.futures import Future

from evenkeel.training.hook.buckets import BucketCopy

__all__ = ["raise_failures_of", "runs_backward"]

_GRAD_BUCKET: Any = vars(torch.distributed)["GradBucket"]  # torch's type stubs do not have it


def raise_failures_of(futures: Sequence["Future[Tensor]"], bucket: object) -> None:
    """Let the running backward pass raise the own error of the first of `futures` that fails.

    DDP waits for futures in C++, where an error is only a text. A callback at the end of the backward pass, queued
    before DDP queues its own, waits for them in Python. Nothing is done for a bucket that DDP did not make. Ranks that
    have run out of inputs (`join`) exchange without a backward pass: there it waits at once.
    """
    if not futures or not isinstance(bucket, _GRAD_BUCKET):
        return
    try:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _wait_for(futures))
    except RuntimeError:  # no backward pass is running
        _wait_for(futures)


def runs_backward(bucket: object) -> bool:
    """Says whether a backward pass shows this bucket: ranks that have run out of inputs (`join`) exchange without one.

    A bucket that DDP did not make is taken to be shown by one.
    """
    if not isinstance(bucket, _GRAD_BUCKET | BucketCopy):
        return True
    try:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: None)
    except RuntimeError:
        return False
    return True


def _wait_for(futures: Sequence["Future[Tensor]"]) -> None:
    for future in futures:
        future.wait()
