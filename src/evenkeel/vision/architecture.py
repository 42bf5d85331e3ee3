"""The two networks: a classifier for one image, and a Collage-CNN that reads a grid of them in one pass.

Both take normalised float images `[n, 3, height, width]`; `Served` adds what a model file does by itself.
"""

from typing import cast

import torch
from torch import Tensor, nn

from evenkeel.vision.winograd import WinogradConv2d

__all__ = ["Classifier", "CollageNet", "Served", "count_macs", "count_parameters"]


class Classifier(nn.Module):
    """Scores `[n, classes]` of images `[n, 3, 32, 32]`: the model that a replica holds.

    A fixed whitening convolution, then three blocks of two 3x3 convolutions each; the first convolution of a block
    stands before its pooling, so that every block sees the finer map once. Batch norm has no gain of its own, since the
    next convolution can learn it. Logits are divided by 9, as the features are a maximum over 9 places and large.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), section 3 and its airbench94 listing.
    """

    def __init__(self, classes: int = 10, widths: tuple[int, int, int] = (64, 256, 256)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(cast(Tensor, self.whiten.bias))
        blocks: list[nn.Module] = []
        before = 24
        for width in widths:
            blocks += [_airbench_block(before, width)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes, bias=False)

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Set the first filters from normalised `images`: eigenvectors of 2x2 patches, both signs, unit variance."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        """Scores [n, classes]."""
        features = self.blocks(nn.functional.gelu(self.whiten(images)))
        features = nn.functional.max_pool2d(features, 3).flatten(1)
        return cast(Tensor, self.head(features)) / 9


def _airbench_block(before: int, width: int) -> nn.Sequential:
    first, second = _three_by_three(before, width), _three_by_three(width, width)
    for convolution in (first, second):  # hands its input on at the start, which makes the first epoch count
        nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return nn.Sequential(first, nn.MaxPool2d(2), _biased_norm(width), nn.GELU(), second, _biased_norm(width), nn.GELU())


def _three_by_three(before: int, width: int) -> nn.Conv2d:
    # With few channels the transforms cost more than they save.
    if before >= 48:
        return WinogradConv2d(before, width)
    return nn.Conv2d(before, width, 3, padding=1, bias=False)


def _biased_norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class CollageNet(nn.Module):
    """Scores `[n, grid * grid, classes]` of collages `[n, 3, grid * 32, grid * 32]`, cells row by row, for any grid.

    Fully convolutional, and convolutions run over tile borders: one pass reads the whole canvas. Down to 4x4 places per
    32x32 tile, a mean over each cell, and one linear head that all cells share. No boxes, no objectness, no
    suppression: where the tiles are is known. ReLU and plain 3x3 convolutions at low resolution, because those are what
    a CPU does fastest per multiply-accumulate in ONNX Runtime.
    """

    def __init__(self, classes: int = 10, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.features = nn.Sequential(
            _convolution(3, fine, side=4, stride=2),
            _convolution(fine, middle, stride=2),
            _convolution(middle, middle),
            _convolution(middle, coarse, stride=2),
            _convolution(coarse, coarse),
        )
        self.head = nn.Conv2d(coarse, classes, 1)

    def forward(self, canvases: Tensor) -> Tensor:
        """Scores [n, grid * grid, classes]."""
        cells = nn.functional.avg_pool2d(self.features(canvases), 4)
        return cast(Tensor, self.head(cells)).flatten(2).transpose(1, 2)


def _convolution(before: int, width: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    if (side, stride) == (3, 1):
        layer = _three_by_three(before, width)
    else:
        layer = nn.Conv2d(before, width, side, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class Served(nn.Module):
    """`network` as a model file holds it: from uint8 NHWC pixels to scores, normalisation inside."""

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        spread = torch.tensor(std).reshape(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("offset", -torch.tensor(mean).reshape(3, 1, 1) / spread)

    def forward(self, images: Tensor) -> Tensor:
        """What `network` gives for uint8 `images` [n, height, width, 3]."""
        return cast(Tensor, self.network(images.permute(0, 3, 1, 2).float() * self.scale + self.offset))


@torch.no_grad()
def count_macs(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and linear layers in one pass over one image of `shape`."""
    total = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * cast(Tensor, module.weight)[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    was_training = network.training
    network.eval()(torch.zeros(1, *shape))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return total


def count_parameters(network: nn.Module) -> int:
    """How many numbers were learned or set, batch-norm statistics left out."""
    return sum(parameter.numel() for parameter in network.parameters())
