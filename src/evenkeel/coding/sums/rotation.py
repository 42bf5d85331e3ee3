"""Rotates block by block, by the randomised Hadamard transform: spreads a block's energy evenly over its coordinates.

After it a block's coordinates look like N(0, |block|^2 / size), whatever they were before, so one table of levels fits
all blocks. The signs come from a key, which all ranks share and which changes with every step.
"""

import torch
from torch import Tensor

from evenkeel.coding.sums.counter_hash import Stream, key, signs
from evenkeel.coding.wire import Round

__all__ = ["hadamard", "padded_length", "rotate", "rotate_back", "signs_key"]


def signs_key(seed: int, this_round: Round) -> int:
    """Gives the key of a round's signs: the same on all ranks, another one in each step and bucket."""
    return key(seed, this_round.step, this_round.bucket, Stream.SIGNS)


def padded_length(length: int, block: int) -> int:
    """Counts the lanes of `length` coordinates: full blocks, and the rest padded to the next power of two."""
    whole, rest = divmod(length, block)
    return whole * block + (1 << (rest - 1).bit_length() if rest else 0)


def hadamard(lanes: Tensor, block: int) -> Tensor:
    """Multiplies each block by the Walsh-Hadamard matrix of ones and minus ones: float32 `[padded_length]`.

    Not normalised: twice is `size` times once. The butterflies go from neighbours outwards, (a, b) -> (a + b, a - b)
    at distance 1, 2, 4, ...; that order fixes every rounding, so kernels that keep it agree bit for bit.
    """
    whole = lanes.numel() // block * block
    parts = [part for part in (lanes[:whole].view(-1, block), lanes[whole:].view(1, -1)) if part.numel()]
    return torch.cat([_butterflies(part).view(-1) for part in parts]) if parts else lanes.clone()


def rotate(lanes: Tensor, block: int, secret: int) -> Tensor:
    """Gives H D x for each block x of padded lanes; D holds random signs from `secret`."""
    return hadamard(lanes * signs(lanes.numel(), secret, lanes.device), block)


def rotate_back(lanes: Tensor, block: int, secret: int) -> Tensor:
    """Gives D H x, which undoes `rotate`, but for the factor `size` of each block."""
    return hadamard(lanes, block) * signs(lanes.numel(), secret, lanes.device)


def _butterflies(blocks: Tensor) -> Tensor:
    count, size = blocks.shape
    distance = 1
    while distance < size:
        pairs = blocks.view(count, -1, 2, distance)
        blocks = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        distance *= 2
    return blocks.reshape(count, size)
