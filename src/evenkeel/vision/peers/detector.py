"""Defines the paper's Collage-CNN: a YOLO-type detector that finds the tiles of a collage and names them.

Source: Narra et al., Collage Inference, section 2; layers and loss in the manner of the authors' public code, a
YOLOv3-tiny with its coarse head only. It is kept as a baseline: where the tiles are is known, so boxes, objectness and
the gradient that they take are spent for nothing (`architecture.CollageNet` does without). Where this departs from it:

- three halvings in place of five and fewer convolutions behind them, since tiles are 32 pixels and not 139: a tile is
  four places of the head wide, as in the paper (4.3);
- anchors are half, once and twice the tile (theirs are those of another data set);
- the picture is padded by half a place on every side, so that the middle of a tile is the middle of a place.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from evenkeel.vision.networks.architecture import count_macs
from evenkeel.vision.networks.winograd import WinogradConv2d

__all__ = ["Boxes", "Detector", "detector_loss", "widest_detector"]

_STRIDE = 8  # pixels in a place of the head: three poolings
_PADDING = _STRIDE // 2
_ANCHORS = (0.5, 1.0, 2.0)  # sides, in tiles
_MATCHED = 1  # the anchor that a tile resembles most
_BOX = 5  # x, y, width, height, objectness; classes follow

# The authors' (an early open YOLOv3 has them too); the four coordinates count once each.
_OBJECTNESS_WEIGHT = 64.0
_CLASS_WEIGHT = 0.25


class Detector(nn.Module):
    """Predicts [n, anchors, rows, columns, 5 + classes], raw, for collages [n, 3, height, width], normalised.

    The last axis holds x and y (before the sigmoid, in places of the head), the logarithms of width and height over the
    anchor's, objectness (before the sigmoid) and class scores. Any multiple of 8 pixels will do as height and width; 96
    give 13 x 13 places.

    Args:
        classes: how many.
        width: channels of the first convolution; all others are multiples of it.
    """

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.classes = classes
        self.features = nn.Sequential(
            _layer(3, width, padding=1 + _PADDING),
            nn.MaxPool2d(2),
            _layer(width, 2 * width),
            nn.MaxPool2d(2),
            _layer(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _layer(4 * width, 8 * width),
            _layer(8 * width, 16 * width),
            _layer(16 * width, 4 * width, side=1),
            _layer(4 * width, 8 * width),
        )
        self.head = nn.Conv2d(8 * width, len(_ANCHORS) * (_BOX + classes), 1)
        with torch.no_grad():  # nearly every anchor is empty; to learn that first would take many steps
            cast(Tensor, self.head.bias).view(len(_ANCHORS), -1)[:, _BOX - 1] = -4.0

    def forward(self, canvases: Tensor) -> Tensor:
        """Gives the raw predictions."""
        maps = cast(Tensor, self.head(self.features(canvases)))
        count, _, rows, columns = maps.shape
        return maps.reshape(count, len(_ANCHORS), -1, rows, columns).movedim(2, 4)


def _layer(before: int, width: int, side: int = 3, padding: int = 1) -> nn.Sequential:
    if (side, padding) == (3, 1) and before >= 48:  # with few channels the transforms cost more than they save
        convolution: nn.Conv2d = WinogradConv2d(before, width)
    else:
        convolution = nn.Conv2d(before, width, side, padding=padding if side == 3 else 0, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU(0.1))


def detector_loss(raw: Tensor, labels: Tensor, blank: Tensor, grid: int, tile_side: int) -> Tensor:
    """Computes the loss of the paper's detector.

    Mean squared error of the sigmoids of x and y and of the logarithms of width and height, over anchors that match a
    tile; binary cross-entropy of objectness over all anchors; cross-entropy of the class over matched ones.

    Args:
        raw: predictions of a `Detector` [n, anchors, rows, columns, 5 + classes].
        labels: class of every cell [n, grid * grid], row by row.
        blank: bool [n, grid * grid], cells that hold nothing: no tile, hence no box; one tile at least is not blank.
        grid: cells along one side.
        tile_side: pixels along one side of a cell.
    """
    middles = (torch.arange(grid) + 0.5) * tile_side / _STRIDE + _PADDING / _STRIDE  # in places
    places, offsets = middles.long(), middles.frac()
    rows, columns = (axis.flatten() for axis in torch.meshgrid(places, places, indexing="ij"))
    down, across = (axis.flatten() for axis in torch.meshgrid(offsets, offsets, indexing="ij"))
    there = ~blank
    matched = raw[:, _MATCHED, rows, columns][there]  # [tiles, 5 + classes]
    where = torch.stack([across, down], dim=1).expand(len(raw), -1, -1)[there]
    size = math.log(1 / _ANCHORS[_MATCHED])  # all tiles are alike
    position = (matched[:, :2].sigmoid() - where).square().mean(0).sum()
    extent = (matched[:, 2:4] - size).square().mean(0).sum()
    objects = torch.zeros_like(raw[..., _BOX - 1])
    objects[:, _MATCHED, rows, columns] = there.float()
    objectness = nn.functional.binary_cross_entropy_with_logits(raw[..., _BOX - 1], objects)
    named = nn.functional.cross_entropy(matched[:, _BOX:], labels[there])
    return position + extent + _OBJECTNESS_WEIGHT * objectness + _CLASS_WEIGHT * named


class Boxes(nn.Module):
    """Gives boxes [n, boxes, 5 + classes], as `coding.answers.boxes.BoxCollage` reads them, of normalised collages.

    x0, y0, x1, y1 in pixels of the collage; confidence, which is objectness times the largest class probability; class
    scores. Every anchor gives a box. Nothing is suppressed: of the boxes in a cell the decoder takes the surest anyway.
    """

    def __init__(self, detector: Detector, tile_side: int) -> None:
        super().__init__()
        self.detector = detector
        self.tile_side = tile_side

    def forward(self, canvases: Tensor) -> Tensor:
        """Gives the boxes."""
        raw = self.detector(canvases)
        down = torch.arange(raw.shape[2], device=raw.device).float()[:, None, None]
        across = torch.arange(raw.shape[3], device=raw.device).float()[:, None]
        anchors = torch.tensor(_ANCHORS, device=raw.device).reshape(-1, 1, 1, 1) * self.tile_side
        x = (raw[..., 0:1].sigmoid() + across) * _STRIDE - _PADDING
        y = (raw[..., 1:2].sigmoid() + down) * _STRIDE - _PADDING
        # No box is 50 times its anchor; the bound keeps an untrained network's boxes finite.
        width = raw[..., 2:3].clamp(max=4.0).exp() * anchors / 2
        height = raw[..., 3:4].clamp(max=4.0).exp() * anchors / 2
        scores = raw[..., _BOX:]
        sure = raw[..., 4:5].sigmoid() * scores.softmax(-1).amax(-1, keepdim=True)
        return torch.cat([x - width, y - height, x + width, y + height, sure, scores], -1).flatten(1, 3)


def widest_detector(max_macs: float, classes: int, grid: int, tile_side: int) -> Detector:
    """Makes the widest detector that costs at most `max_macs` multiply-accumulates a pass over one collage."""
    shape = (3, grid * tile_side, grid * tile_side)
    width = 1
    while count_macs(Detector(classes, width + 1), shape) <= max_macs:
        width += 1
    return Detector(classes, width)
