"""Defines the two networks: a classifier for one image, and a Collage-CNN that reads a grid of them in one pass.

Both take normalised float images `[n, 3, height, width]`; `Served` adds what a model file does by itself.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evenkeel.vision.networks.winograd import WinogradConv2d

__all__ = ["ClassifierNet", "CollageNet", "Served", "TileNet", "count_macs", "count_parameters"]


class ClassifierNet(nn.Module):
    """Gives scores `[n, classes]` of images `[n, 3, side, side]`: the model that a replica holds.

    A fixed whitening convolution, then three blocks of two 3x3 convolutions each; the first convolution of a block
    stands before its pooling, so that every block sees the finer map once. Batch norm has no gain of its own, since the
    next convolution can learn it. Logits are divided by 9, as the features are a maximum over 9 places and large.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), section 3 and its airbench94 listing.
    """

    activation: type[nn.Module] = nn.GELU

    def __init__(self, classes: int = 10, widths: tuple[int, int, int] = (64, 256, 256), stem_stride: int = 1) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, stem_stride)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(cast(Tensor, self.whiten.bias))
        self.activate = self.activation()
        blocks: list[nn.Module] = []
        before = 24
        for width in widths:
            blocks += [_block(before, width, self.activation)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes, bias=False)

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Sets the first filters from normalised `images`: eigenvectors of 2x2 patches, both signs, unit variance."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        """Gives scores [n, classes]."""
        features = self.blocks(self.activate(self.whiten(images)))
        return cast(Tensor, self.head(features.amax((2, 3)))) / 9

    @property
    def filters(self) -> list[Tensor]:
        """Gives the filters of the convolutions that learn, each followed by a norm."""
        return [module.weight for module in self.blocks.modules() if isinstance(module, nn.Conv2d)]

    @property
    def biases(self) -> list[Tensor]:
        """Gives the biases of the norms and of the whitening."""
        norms = [module.bias for module in self.blocks.modules() if isinstance(module, nn.BatchNorm2d)]
        return [cast(Tensor, self.whiten.bias), *norms]


class TileNet(ClassifierNet):
    """Gives scores `[n, classes]` of tiles `[n, 3, side, side]`: what a Collage-CNN does to each of its tiles.

    The classifier above, thinner, with ReLU, on which ONNX Runtime spends a tenth less of a pass than on GELU and which
    8-bit convolutions take in for nothing. A tile of 64 pixels or more is halved first, until it has less than 64, and
    a coarse network halves it once more: it costs a third, better spent on channels where there would be few.
    At equal training time this is a point better than residual blocks at half the resolution with as many
    multiplications; and ONNX Runtime runs every kind of convolution tried, depthwise too, at the same rate per
    multiplication.

    Args:
        classes: how many scores a tile gets.
        widths: channels of the three blocks.
        side: pixels along one side of a tile, 32 or more.
        coarse: halve the tile once more, before the first block.
    """

    activation = nn.ReLU

    def __init__(
        self, classes: int, widths: tuple[int, int, int] = (24, 88, 128), side: int = 32, coarse: bool = False
    ) -> None:
        halvings = max(0, side.bit_length() - 6) + coarse
        super().__init__(classes, widths, 2 if halvings else 1)
        self.halvings = halvings  # of the tile before the first block: the weights alone do not show it
        self.blocks = nn.Sequential(*(_halving(24) for _ in range(halvings - 1)), *self.blocks)

    @torch.no_grad()
    def scale_scores(self, factor: float) -> None:
        """Multiplies all scores from now on by `factor`."""
        self.head.weight.mul_(factor)


def _block(before: int, width: int, activation: type[nn.Module]) -> nn.Sequential:
    first, second = _dirac(_three_by_three(before, width)), _dirac(_three_by_three(width, width))
    return nn.Sequential(
        first, nn.MaxPool2d(2), _biased_norm(width), activation(), second, _biased_norm(width), activation()
    )


def _halving(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 2, 2, bias=False), _biased_norm(width), nn.ReLU())


def _three_by_three(before: int, width: int) -> nn.Conv2d:
    # With few channels the transforms cost more than they save.
    if before >= 48:
        return WinogradConv2d(before, width)
    return nn.Conv2d(before, width, 3, padding=1, bias=False)


def _dirac(convolution: nn.Conv2d) -> nn.Conv2d:
    """Hands its input on at the start, which makes the first epoch count."""
    nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return convolution


def _biased_norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.05)
    norm.weight.requires_grad_(False)
    return norm


class CollageNet(nn.Module):
    """Gives scores `[n, grid * grid, classes]` of collages `[n, 3, grid * side, grid * side]`, cells row by row.

    The canvas is cut along the borders of its tiles, and the tiles go through one network side by side: what is said of
    a tile depends on that tile alone. No neighbour, blank cell or place changes it, one set of weights reads every
    grid, and no user's image can influence the answer to another's. No boxes, no objectness, no suppression: where the
    tiles are is known.
    """

    def __init__(self, tiles: nn.Module, grid: int, side: int) -> None:
        super().__init__()
        self.tiles, self.grid, self.side = tiles, grid, side

    def forward(self, canvases: Tensor) -> Tensor:
        """Gives scores [n, grid * grid, classes]."""
        rows = canvases.reshape(-1, 3, self.grid, self.side, self.grid, self.side)
        tiles = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, self.side, self.side)
        scores = self.tiles(tiles)
        return cast(Tensor, scores.reshape(-1, self.grid * self.grid, scores.shape[1]))


class Served(nn.Module):
    """Runs `network` as a model file does: from uint8 NHWC pixels to scores, normalisation inside."""

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        spread = torch.tensor(std).reshape(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("offset", -torch.tensor(mean).reshape(3, 1, 1) / spread)

    def forward(self, images: Tensor) -> Tensor:
        """Runs `network` on uint8 `images` [n, height, width, 3]."""
        return cast(Tensor, self.network(images.permute(0, 3, 1, 2).float() * self.scale + self.offset))


@torch.no_grad()
def count_macs(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Counts the multiply-accumulates of convolutions and matrix products in one pass over one image of `shape`."""
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counted:
        network(torch.zeros(1, *shape))
    network.train(was_training)
    return counted.get_total_flops() // 2


def count_parameters(network: nn.Module) -> int:
    """Counts the numbers that were learned or set, batch-norm statistics left out."""
    return sum(parameter.numel() for parameter in network.parameters())
