"""Convolves channel by channel, with a gradient of the weights that a CPU computes fast where maps are small.

PyTorch's own takes much of the time of training such networks on tiles: for 1,152 channels of 2x2 and kernels of 5x5 it
needs 14 ms for 64 tiles, the forward pass 0.3 ms.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["depthwise"]

_MOST_PAIRS = 4096  # places of a map times places of the map behind it: up to 8x8
_MOST_PAIRS_OF_SMALL = 64  # with kernels up to 3x3, where PyTorch's own way is slow on the smallest maps alone
_SMALL = 9  # weights in a kernel

_ConvolutionForm = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def depthwise(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
) -> Tensor:
    """Gives `conv2d` of `images` [n, c, h, w] with `weight` [c, 1, kh, kw], each channel by itself."""
    form = tuple(strides), tuple(padding), tuple(dilations)
    return cast(Tensor, _Depthwise.apply(images, weight, bias, form))  # type: ignore[no-untyped-call]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, weight: Tensor, bias: Tensor | None, form: _ConvolutionForm) -> Tensor:  # type: ignore[override]
        context.save_for_backward(images, weight)
        context.form = form
        return functional.conv2d(images, weight, bias, *form, len(weight))

    @staticmethod
    def backward(context: Any, given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, weight = context.saved_tensors
        before, behind, kernel = (tuple(each.shape[2:]) for each in (images, given, weight))
        pairs, wanted = math.prod(before) * math.prod(behind), list(context.needs_input_grad[:3])
        own = wanted[1] and pairs <= (_MOST_PAIRS if math.prod(kernel) > _SMALL else _MOST_PAIRS_OF_SMALL)
        # Its gradient of the bias is made with that of the weights, and as slowly.
        of_bias = given.sum((0, 2, 3)) if wanted[2] else None
        wanted[1:] = wanted[1] and not own, False
        strides, padding, dilations = context.form
        found = torch.ops.aten.convolution_backward(
            given, images, weight, None, strides, padding, dilations, False, [0, 0], len(weight), wanted
        )
        if not own:
            return found[0], found[1], of_bias, None
        # Every pair of places, multiplied over all images at once; the pairs that a weight joins are added. Copied
        # before, since matrices whose rows lie apart are multiplied ten times as slowly.
        left = given.permute(1, 2, 3, 0).flatten(1, 2).contiguous()
        right = images.permute(1, 0, 2, 3).flatten(2).contiguous()
        joined = _joined(before, behind, kernel, context.form)
        return found[0], ((left @ right).flatten(1) @ joined.to(left)).reshape(weight.shape), of_bias, None


@lru_cache(256)
def _joined(
    before: tuple[int, ...], behind: tuple[int, ...], kernel: tuple[int, ...], form: _ConvolutionForm
) -> Tensor:
    """Gives ones [pairs, kh * kw] where a weight joins a place behind with a place before."""
    axes = []
    for old, new, size, stride, pad, reach in zip(before, behind, kernel, *form, strict=True):
        places = torch.arange(new)[:, None] * stride - pad + torch.arange(size) * reach
        axes.append((places[:, None, :] == torch.arange(old)[:, None]).float())  # [new, old, size]
    return torch.einsum("aci,bdj->abcdij", *axes).reshape(math.prod(before) * math.prod(behind), math.prod(kernel))
