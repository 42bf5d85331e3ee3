"""Images and networks that take no time to learn or to make."""

import numpy as np
import torch
from numpy.typing import NDArray

from evenkeel.vision.networks.data import LabelledImages

__all__ = ["easy_images", "easy_pixels", "trained_a_little"]


def easy_images(count: int, seed: int) -> LabelledImages:
    """Ten flat colours under noise: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    colours = torch.randint(40, 216, (10, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-20, 21, (count, 3, 32, 32), generator=generator)
    return LabelledImages((colours[labels] + noise).to(torch.uint8), labels)


def easy_pixels(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The same as arrays: uint8 [n, 32, 32, 3] and labels [n]."""
    images = easy_images(count, seed)
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy(), images.labels.numpy()


def trained_a_little(network: torch.nn.Module) -> torch.nn.Module:
    """`network` with weights and statistics away from their start, so that folding a norm has something to lose."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(size, generator=generator))
    return network.eval()
