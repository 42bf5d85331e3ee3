"""Reads tiles with the user's own classifier: its graph and weights, at the resolution of a tile."""

import torch
from torch import Tensor, nn

from evenkeel.models.black_box import BlackBox
from evenkeel.models.classifier_form import GREY_WEIGHTS
from evenkeel.vision.networks.trainable_graph import TrainableGraph

__all__ = ["OwnTiles"]


class OwnTiles(nn.Module):
    """Gives scores `[n, classes]` of tiles `[n, 3, side, side]`, which `mean` and `std` normalised before.

    Args:
        classifier: the user's.
        side: pixels along one side of a tile.
        mean: of what the tiles were normalised with.
        std: of the same.
        left_out: late residual blocks of the classifier that are passed by; see `TrainableGraph`.

    Raises:
        ConfigurationError: its graph cannot be trained, cannot take images of this side, or has fewer such blocks; the
            message says why.
    """

    factor: Tensor
    grey: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(
        self, classifier: BlackBox, side: int, mean: tuple[float, ...], std: tuple[float, ...], left_out: int = 0
    ) -> None:
        super().__init__()
        form = classifier.form
        self.graph = TrainableGraph.load(
            classifier.path, classifier.input_name, classifier.output_name, form.shape, form.layout, left_out
        )
        self.graph.resize(side, side)
        self.colours, self.layout = form.colours, form.layout
        # From what a tile holds to pixels of 0..255, and on to what the graph takes, in one step.
        spread, centre = 255 * torch.tensor(std), 255 * torch.tensor(mean)
        factor, offset = torch.ones(3), torch.zeros(3)
        if form.dtype != "u1":
            factor = form.normalisation.scale / torch.tensor(form.normalisation.std)
            offset = -torch.tensor(form.normalisation.mean) / torch.tensor(form.normalisation.std)
        self.register_buffer("factor", (spread * factor).reshape(3, 1, 1))
        self.register_buffer("offset", (centre * factor + offset).reshape(3, 1, 1))
        self.register_buffer("grey", torch.tensor(GREY_WEIGHTS).reshape(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tiles: Tensor) -> Tensor:
        """Gives scores [n, classes]."""
        rows = tiles * self.factor + self.offset
        if self.colours == "BGR":
            rows = rows.flip(1)
        elif self.colours == "GREY":
            rows = (rows * self.grey).sum(1, keepdim=True)
        if self.layout == "NHWC":
            rows = rows.permute(0, 2, 3, 1)
        scores: Tensor = self.graph(rows)
        return scores * self.scale

    @torch.no_grad()
    def scale_scores(self, factor: float) -> None:
        """Multiplies all scores from now on by `factor`."""
        self.scale.mul_(factor)
