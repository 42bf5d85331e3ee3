"""Buckets of gradients: what a hook reads of one, and one that outlives its backward pass."""

from typing import Protocol

import torch
from torch import Tensor

from evenkeel.errors import ConfigurationError

__all__ = ["Bucket", "BucketCopy", "check_dense"]


class Bucket(Protocol):
    """What is used of `torch.distributed.GradBucket`."""

    def index(self) -> int:
        """The bucket's place in the backward pass."""

    def is_last(self) -> bool:
        """True for the last bucket of a backward pass."""

    def buffer(self) -> Tensor:
        """All gradients of the bucket, flat, not yet divided by anything."""

    def gradients(self) -> list[Tensor]:
        """Views of the buffer, one for each parameter, with the parameter's strides."""

    def parameters(self) -> list[Tensor]:
        """The parameters that the gradients belong to."""


class BucketCopy:
    """What a DDP hook reads of a bucket, over a clone of its gradients: the next backward pass overwrites the original.

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
        """The bucket's place in the backward pass."""
        return self._index

    def is_last(self) -> bool:
        """True for the last bucket of a backward pass."""
        return self._is_last

    def buffer(self) -> Tensor:
        """All gradients of the bucket, flat."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Let `buffer` hold the gradients from now on."""
        moved = buffer.storage_offset() - self._buffer.storage_offset()
        self._gradients = [
            buffer.as_strided(view.size(), view.stride(), view.storage_offset() + moved) for view in self._gradients
        ]
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """Views of the buffer, one for each parameter."""
        return self._gradients

    def parameters(self) -> list[Tensor]:
        """The parameters that the gradients belong to."""
        return self._parameters


def check_dense(buffer: Tensor) -> None:
    """Refuse a bucket of sparse gradients.

    Raises:
        ConfigurationError: it is one.
    """
    if buffer.layout != torch.strided:
        raise ConfigurationError(
            f"a parameter of shape {tuple(buffer.shape)} has sparse gradients, which cannot be added in lanes: use "
            "torch.nn.Embedding(..., sparse=False)"
        )
