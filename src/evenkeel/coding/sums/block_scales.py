"""One positive number for each block of lanes: how it is agreed on, inverted and spread out."""

import torch
from torch import Tensor

from evenkeel.errors import CodeError

__all__ = ["block_count", "check_scales", "inverse", "spread", "usable"]

# Between these a scale and its inverse are normal float32 numbers, which no processor flushes to zero.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**125


def block_count(length: int, block: int) -> int:
    """Blocks of `length` coordinates, the last one perhaps short."""
    return -(-length // block)


def usable(scales: Tensor) -> Tensor:
    """Scales as float32 that order: below 2**-126 they are 0; above 2**125, infinite or NaN they are infinite.

    The maximum over ranks then carries what is not finite; a NaN would be lost in some reductions.
    """
    scales = torch.where(scales <= _LARGEST, scales, torch.inf)  # NaN compares false
    return torch.where(scales < _SMALLEST, 0.0, scales).to(torch.float32)


def check_scales(scales: Tensor, length: int, block: int) -> None:
    """CodeError unless there is one scale for each block."""
    if scales.shape != (block_count(length, block),):
        raise CodeError(
            f"{length} coordinates in blocks of {block} have {block_count(length, block)} scales, found "
            f"{tuple(scales.shape)}: give the maximum over ranks of what measure gave for this vector"
        )


def inverse(scales: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0 or infinite."""
    return torch.where((scales > 0) & scales.isfinite(), 1 / scales, 0.0)


def spread(per_block: Tensor, lanes: int, block: int) -> Tensor:
    """Each block's number for each of its lanes; the last block takes what is left of `lanes`."""
    return per_block.repeat_interleave(block)[:lanes]
