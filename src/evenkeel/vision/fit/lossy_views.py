"""Shows a network what a link that loses packets leaves of an image: JPEG, some blocks missing, the holes concealed.

What the classifier said of the whole image is taught of its remains, so that the network learns to make do with them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenkeel.backends.lossy.conceal import conceal
from evenkeel.backends.lossy.intervals import JpegForm

__all__ = ["LossyViews"]

_WHOLE = 0.25  # of the views lose nothing


@dataclass(frozen=True)
class LossyViews:
    """Changes views as a link does.

    Each view has a loss of its own, from none to `loss`, so that one network serves a good link and a bad one; blocks
    are lost one by one, as the transport scatters those of a packet.

    Attributes:
        loss: largest share of the blocks that a view may lose.
        quality: of JPEG.
    """

    loss: float
    quality: int

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Gives uint8 [n, 3, h, w] for the like; the same for the same generator."""
        images = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
        form = JpegForm(images.shape[2], images.shape[1], self.quality)
        drawn = torch.rand(len(images), 2 + form.rows * form.columns, generator=generator).numpy()
        for place, (whole, share, *blocks) in enumerate(drawn):
            seen, _ = form.decode(form.encode(images[place]))
            lost = np.array(blocks).reshape(form.rows, form.columns) < (0.0 if whole < _WHOLE else self.loss * share)
            if not lost.all():
                conceal(seen, ~lost, form.side)
            images[place] = seen
        return torch.from_numpy(images).permute(0, 3, 1, 2)
