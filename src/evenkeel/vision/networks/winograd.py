"""Makes a 3x3 convolution train twice as fast on a CPU with AVX2, as it multiplies four times less.

The map is cut into tiles of 4x4 results; each is computed as products of 6x6 transformed values, which turns the
convolution into 36 matrix products. The plain twin is `torch.nn.functional.conv2d`; they agree to about 1e-5.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4 (F(4x4, 3x3)).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from evenkeel.vision.networks.arithmetic import winograd_is_fast

__all__ = ["WinogradConv2d", "winograd_conv2d"]

# The paper's matrices for F(4, 3): of the data, of the filter, of the result.
_DATA = [
    [4.0, 0.0, -5.0, 0.0, 1.0, 0.0],
    [0.0, -4.0, -4.0, 1.0, 1.0, 0.0],
    [0.0, 4.0, -4.0, -1.0, 1.0, 0.0],
    [0.0, -2.0, -1.0, 2.0, 1.0, 0.0],
    [0.0, 2.0, -1.0, -2.0, 1.0, 0.0],
    [0.0, 4.0, 0.0, -5.0, 0.0, 1.0],
]
_FILTER = [
    [1 / 4, 0.0, 0.0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0.0, 0.0, 1.0],
]
_RESULT = [
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    [0.0, 1.0, -1.0, 2.0, -2.0, 0.0],
    [0.0, 1.0, 1.0, 4.0, 4.0, 0.0],
    [0.0, 1.0, -1.0, 8.0, -8.0, 1.0],
]


def _both_ways(matrix: list[list[float]]) -> Tensor:
    """Gives the matrix that transforms rows and columns at once."""
    one_way = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one_way, one_way).float()


_D, _F, _R = _both_ways(_DATA), _both_ways(_FILTER), _both_ways(_RESULT)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        count, before, height, width = images.shape
        after = len(weight)
        down, across = -(-height // 4), -(-width // 4)  # tiles; the last ones may stick out
        margins = (0, 0, 1, 4 * across + 1 - width, 1, 4 * down + 1 - height)
        padded = nn.functional.pad(images.permute(0, 2, 3, 1), margins)
        tiles = images.new_empty(6, 6, count, down, across, before)
        for row in range(6):
            for column in range(6):
                tiles[row, column] = _every_fourth(padded, row, column, down, across)
        data = (_D @ tiles.view(36, -1)).view(36, -1, before)
        filters = (_F @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, before, after)
        products = torch.bmm(data, filters)
        results = (_R @ products.view(36, -1)).view(4, 4, count, down, across, after)
        whole = results.permute(2, 3, 0, 4, 1, 5).reshape(count, 4 * down, 4 * across, after)
        ctx.save_for_backward(data, filters)
        ctx.shapes = (count, before, height, width, after, down, across)
        return whole[:, :height, :width].contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        # Each step of forward, transposed, in the opposite order.
        data, filters = ctx.saved_tensors
        count, before, height, width, after, down, across = ctx.shapes
        margins = (0, 0, 0, 4 * across - width, 0, 4 * down - height)
        whole = nn.functional.pad(gradients[0].permute(0, 2, 3, 1), margins)
        results = whole.view(count, down, 4, across, 4, after).permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
        products = (_R.T @ results).view(36, -1, after)
        of_filters = torch.bmm(data.transpose(1, 2), products)
        of_weight = (_F.T @ of_filters.view(36, -1)).view(3, 3, before, after).permute(3, 2, 0, 1)
        of_data = torch.bmm(products, filters.transpose(1, 2))
        tiles = (_D.T @ of_data.view(36, -1)).view(6, 6, count, down, across, before)
        padded = data.new_zeros(count, 4 * down + 2, 4 * across + 2, before)
        for row in range(6):
            for column in range(6):
                _every_fourth(padded, row, column, down, across).add_(tiles[row, column])
        return padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2), of_weight


def _every_fourth(padded: Tensor, row: int, column: int, down: int, across: int) -> Tensor:
    """Gives the values at (row, column) of all 6x6 tiles: a view of `padded` [n, 4 * down + 2, 4 * across + 2, c]."""
    return padded[:, row : row + 4 * down - 3 : 4, column : column + 4 * across - 3 : 4]


def winograd_conv2d(images: Tensor, weight: Tensor) -> Tensor:
    """Computes conv2d with padding 1 of float32 `images` [n, c, h, w] and `weight` [k, c, 3, 3], channels last."""
    return cast(Tensor, _Winograd.apply(images, weight))  # type: ignore[no-untyped-call]


class WinogradConv2d(nn.Conv2d):
    """Convolves 3x3, with padding 1 and without bias: the fast form in training in float32 where that is faster."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Turns `[n, before, h, w]` into `[n, after, h, w]`."""
        plain = not self.training or images.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if not plain and winograd_is_fast():
            return winograd_conv2d(images, self.weight)
        return super().forward(images)
