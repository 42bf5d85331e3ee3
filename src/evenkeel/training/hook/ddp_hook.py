"""Defines the hook that DistributedDataParallel calls with each bucket; no other file knows how it does that.

Annotations must be the objects themselves here, not strings: DDP compares them.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.futures import Future

from evenkeel.errors import ConfigurationError
from evenkeel.training.hook.buckets import Bucket, raise_failures_of

if TYPE_CHECKING:
    GradBucket = Bucket
else:
    from torch.distributed import GradBucket

__all__ = ["AveragesBuckets", "comm_hook"]


class AveragesBuckets(Protocol):
    """Averages buckets, as a state of `comm_hook`: HookState and PipeSGD."""

    def average(self, bucket: Bucket) -> "Future[Tensor]":
        """Gives the future of the bucket's new content."""


def comm_hook(
    state: AveragesBuckets, bucket: GradBucket, output: Tensor | None = None
) -> torch.futures.Future[torch.Tensor]:
    """Gives the future of a bucket's average, as `state` makes it.

        ddp_model.register_comm_hook(state, evenkeel.comm_hook)

    `output` is what FullyShardedDataParallel would give besides, which is refused.

    Raises:
        ConfigurationError: the ranks, the model or the way of training do not fit the state.
        ReducerError: a peer is gone or silent. Raised by the backward pass.
    """
    if isinstance(bucket, Tensor) or output is not None:
        raise ConfigurationError(
            "comm_hook was given a gradient instead of a bucket, as FSDP does: FullyShardedDataParallel (FSDP1) and "
            "fully_shard (FSDP2) are not supported, only DistributedDataParallel"
        )
    if isinstance(bucket, tuple):
        raise ConfigurationError(
            "compiled autograd hands the hook single gradients instead of buckets: do not compile the backward pass of "
            'this model (torch._dynamo.config.optimize_ddp must not be "python_reducer")'
        )
    if not hasattr(state, "average"):
        raise ConfigurationError(f"comm_hook needs a HookState or a PipeSGD as its state, found {state!r}")
    future = state.average(bucket)
    raise_failures_of([future], bucket)
    return future
