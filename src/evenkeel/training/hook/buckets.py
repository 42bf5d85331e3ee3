"""Reads buckets of gradients, finds the pass and model that show them, and copies one that must outlive its pass."""

import gc
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from evenkeel.errors import ConfigurationError

__all__ = [
    "Bucket",
    "BucketCopy",
    "as_gradient_of",
    "check_dense",
    "gradient_views",
    "models_of",
    "raise_failures_of",
    "runs_backward",
]

_GRAD_BUCKET: Any = vars(torch.distributed)["GradBucket"]  # torch's type stubs do not have it


class Bucket(Protocol):
    """Names what is used of `torch.distributed.GradBucket`."""

    def index(self) -> int:
        """Gives the bucket's place in the backward pass."""

    def is_last(self) -> bool:
        """True for the last bucket of a backward pass."""

    def buffer(self) -> Tensor:
        """Gives all gradients of the bucket, flat, not yet divided by anything."""

    def gradients(self) -> list[Tensor]:
        """Gives views of the buffer, one for each parameter, with the parameter's strides."""

    def parameters(self) -> list[Tensor]:
        """Gives the parameters that the gradients belong to."""


class BucketCopy:
    """Gives what a DDP hook reads of a bucket, over a clone of its gradients: backward overwrites the original.

    Offers `torch.distributed.GradBucket`'s methods, so that hooks written in Python take it.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._index = bucket.index()
        self._is_last = bucket.is_last()
        self._parameters = list(bucket.parameters())
        original = bucket.buffer()
        self._buffer = original.clone()
        self._gradients = [
            self._buffer.as_strided(view.size(), view.stride(), view.storage_offset() - original.storage_offset())
            for view in bucket.gradients()
        ]

    def index(self) -> int:
        """Gives the bucket's place in the backward pass."""
        return self._index

    def is_last(self) -> bool:
        """True for the last bucket of a backward pass."""
        return self._is_last

    def buffer(self) -> Tensor:
        """Gives all gradients of the bucket, flat."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Lets `buffer` hold the gradients from now on."""
        moved = buffer.storage_offset() - self._buffer.storage_offset()
        self._gradients = [
            buffer.as_strided(view.size(), view.stride(), view.storage_offset() + moved) for view in self._gradients
        ]
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """Gives views of the buffer, one for each parameter."""
        return self._gradients

    def parameters(self) -> list[Tensor]:
        """Gives the parameters that the gradients belong to."""
        return self._parameters


def gradient_views(bucket: Bucket) -> list[Tensor]:
    """Gives views of the bucket's buffer, one for each parameter, that hold every number of it.

    A complex parameter's view has its real and imaginary parts side by side, `[*shape, 2]`: DDP's buffer holds both,
    but DDP's own views of it name only half of the numbers, at wrong places.

    Raises:
        ConfigurationError: the gradients are sparse, or do not make up the buffer.
    """
    buffer = bucket.buffer()
    check_dense(buffer)
    views, parameters = list(bucket.gradients()), list(bucket.parameters())
    if any(parameter.is_complex() for parameter in parameters) and 2 * _numbers(views) == buffer.numel():
        pairs = torch.view_as_complex(buffer.view(-1, 2))
        moved = pairs.storage_offset() - buffer.storage_offset()
        views = [pairs.as_strided(view.size(), view.stride(), view.storage_offset() + moved) for view in views]
    views = [torch.view_as_real(view) if view.is_complex() else view for view in views]
    if _numbers(views) != buffer.numel():
        kinds = ", ".join(sorted({str(parameter.dtype) for parameter in parameters}))
        raise ConfigurationError(
            f"a bucket of {buffer.numel()} numbers holds gradients of {_numbers(views)}, for parameters in {kinds}: "
            "what they leave out would not be averaged; train this model without the hook"
        )
    return views


def as_gradient_of(parameter: Tensor, view: Tensor) -> Tensor:
    """Gives a view of `gradient_views`, or a copy of it, in the type and shape of its parameter."""
    return torch.view_as_complex(view) if parameter.is_complex() else view


def check_dense(buffer: Tensor) -> None:
    """Refuses a bucket of sparse gradients.

    Raises:
        ConfigurationError: it is one.
    """
    if buffer.layout != torch.strided:
        raise ConfigurationError(
            f"a parameter of shape {tuple(buffer.shape)} has sparse gradients, which cannot be added in lanes: use "
            "torch.nn.Embedding(..., sparse=False)"
        )


def _numbers(views: Sequence[Tensor]) -> int:
    return sum(view.numel() for view in views)


def raise_failures_of(futures: Sequence["Future[Tensor]"], bucket: object) -> None:
    """Lets the running backward pass raise the own error of the first of `futures` that fails.

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


def models_of(parameter: Tensor) -> list[tuple[str, DistributedDataParallel]]:
    """Finds the models that `parameter` is in, with its name there.

    Hooks are never given the model, so all objects of the process are looked through. That takes many milliseconds.
    """
    return [
        (name, each)
        for each in gc.get_objects()
        if issubclass(type(each), DistributedDataParallel) and hasattr(each, "module")
        for name, candidate in each.module.named_parameters()
        if candidate is parameter
    ]


def _wait_for(futures: Sequence["Future[Tensor]"]) -> None:
    for future in futures:
        future.wait()
