"""Whole numbers of a few bits each, packed into bytes and back: the wire forms of sum codes.

The form is one little-endian stream of bits: number i takes bits i * width to (i + 1) * width - 1, and bit b of the
stream is bit b % 8 (from the lowest) of byte b // 8. Unused bits at the end are 0.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.coding.sums.kernels import fast
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["Lanes", "pack_bits", "unpack_bits"]

_WIDEST = 31  # bits; int32 lanes are the widest there are


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Numbers `[length]` from 0 to 2**width - 1, as uint8 `[ceil(length * width / 8)]`.

    Raises:
        ConfigurationError: `width` is not 1 to 31.
    """
    per_group, group_bytes = _group(width)
    length = numbers.numel()
    if width == 8:
        return numbers.to(torch.uint8)
    if kernels := fast(numbers, types=(torch.uint8, torch.int32)):
        return kernels.pack_bits(numbers, width)
    groups = pad(numbers.to(torch.int32), (0, -length % per_group)).view(-1, per_group)
    packed = torch.zeros(len(groups), group_bytes, dtype=torch.int32, device=numbers.device)
    for lane, byte, shift in _overlaps(width):
        packed[:, byte] |= groups[:, lane] << shift if shift >= 0 else groups[:, lane] >> -shift
    return (packed & 255).to(torch.uint8).view(-1)[: -(-length * width // 8)]


def unpack_bits(packed: Tensor, width: int, length: int) -> Tensor:
    """The `length` numbers that `pack_bits` was given: uint8 where `width` is 8 or less, int32 otherwise.

    Raises:
        ConfigurationError: `width` is not 1 to 31.
        CodeError: not as many bytes as so many numbers take.
    """
    per_group, group_bytes = _group(width)
    if packed.shape != (-(-length * width // 8),) or packed.dtype != torch.uint8:
        raise CodeError(
            f"{length} numbers of {width} bits take {-(-length * width // 8)} bytes, "
            f"found {packed.dtype} {tuple(packed.shape)}: the peer packs in another way"
        )
    if width == 8:
        return packed.clone()
    if kernels := fast(packed, types=(torch.uint8,)):
        return kernels.unpack_bits(packed, width, length)
    groups = pad(packed.to(torch.int32), (0, -packed.numel() % group_bytes)).view(-1, group_bytes)
    numbers = torch.zeros(len(groups), per_group, dtype=torch.int32, device=packed.device)
    for lane, byte, shift in _overlaps(width):
        numbers[:, lane] |= groups[:, byte] >> shift if shift >= 0 else groups[:, byte] << -shift
    numbers &= (1 << width) - 1
    return numbers.view(-1)[:length].to(torch.uint8 if width <= 8 else torch.int32)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Integer lanes of 0 to `largest`: in which type, and in how many bits on the wire, sums of them fit."""

    largest: int

    @property
    def most_workers(self) -> int:
        """Largest world whose sums fit into 32-bit lanes."""
        return ((1 << _WIDEST) - 1) // self.largest

    def dtype(self, world: int) -> torch.dtype:
        """The smaller of uint8 and int32 that holds the sum of `world` lanes; Gloo adds no 16-bit integers.

        Raises:
            ConfigurationError: neither does.
        """
        if self.largest * world <= 255:
            return torch.uint8
        if world <= self.most_workers:
            return torch.int32
        raise ConfigurationError(
            f"sums over {world} workers of lanes up to {self.largest} do not fit into 32 bits: "
            f"use at most {self.most_workers} workers, or fewer bits or a smaller granularity"
        )

    def width(self, world: int) -> int:
        """Bits of a sum of `world` lanes."""
        return (self.largest * world).bit_length()

    def pack(self, total: Tensor, world: int) -> Tensor:
        """Sums of `world` lanes as bytes."""
        return pack_bits(total, self.width(world))

    def unpack(self, packed: Tensor, lanes: int, world: int) -> Tensor:
        """The sums again."""
        return unpack_bits(packed, self.width(world), lanes).to(self.dtype(world))


def _group(width: int) -> tuple[int, int]:
    """Smallest run of numbers that ends at a byte: (numbers, bytes)."""
    if not 1 <= width <= _WIDEST:
        raise ConfigurationError(f"width: must be 1 to {_WIDEST} bits, found {width}")
    common = gcd(width, 8)
    return 8 // common, width // common


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """(number, byte, shift) for each byte of a group that holds a part of a number: byte |= number << shift."""
    per_group, _ = _group(width)
    return [
        (lane, byte, lane * width - 8 * byte)
        for lane in range(per_group)
        for byte in range(lane * width // 8, (lane * width + width - 1) // 8 + 1)
    ]
