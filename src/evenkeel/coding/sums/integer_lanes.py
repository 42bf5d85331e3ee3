"""Handles lanes that are whole numbers: a scale for each block of them, and a few bits each in bytes.

The wire form is one little-endian stream of bits: number i takes bits i * width to (i + 1) * width - 1, and bit b of
the stream is bit b % 8 (from the lowest) of byte b // 8. Unused bits at the end are 0.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from evenkeel.coding.sums.kernels import fast
from evenkeel.coding.wire import Wire
from evenkeel.errors import CodeError, ConfigurationError

__all__ = [
    "IntegerWire",
    "block_count",
    "check_scales",
    "inverse",
    "max_workers",
    "pack_bits",
    "spread",
    "unpack_bits",
    "usable",
]

_WIDEST = 31  # bits; int32 lanes are the widest there are
# Between these a scale and its inverse are normal float32 numbers, which no processor flushes to zero.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**125


def block_count(length: int, block: int) -> int:
    """Counts the blocks of `length` coordinates, the last one perhaps short."""
    return -(-length // block)


def usable(scales: Tensor) -> Tensor:
    """Gives scales as float32 that order: below 2**-126 they are 0; above 2**125, infinite or NaN they are infinite.

    The maximum over ranks then carries what is not finite; a NaN would be lost in some reductions.
    """
    scales = torch.where(scales <= _LARGEST, scales, torch.inf)  # NaN compares false
    return torch.where(scales < _SMALLEST, 0.0, scales).to(torch.float32)


def check_scales(scales: Tensor, length: int, block: int) -> None:
    """Raises a CodeError unless there is one scale for each block."""
    if scales.shape != (block_count(length, block),):
        raise CodeError(
            f"{length} coordinates in blocks of {block} have {block_count(length, block)} scales, found "
            f"{tuple(scales.shape)}: give the maximum over ranks of what measure gave for this vector"
        )


def inverse(scales: Tensor) -> Tensor:
    """Gives 1 / scale; 0 where the scale is 0 or infinite."""
    return torch.where((scales > 0) & scales.isfinite(), 1 / scales, 0.0)


def spread(per_block: Tensor, lanes: int, block: int) -> Tensor:
    """Gives each block's number for each of its lanes; the last block takes what is left of `lanes`."""
    return per_block.repeat_interleave(block)[:lanes]


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Writes numbers `[length]` from 0 to 2**width - 1 as uint8 `[ceil(length * width / 8)]`.

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
    """Gives the `length` numbers that `pack_bits` was given: uint8 where `width` is 8 or less, int32 otherwise.

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


def max_workers(largest: int) -> int:
    """Gives the largest world whose sums of lanes from 0 to `largest` fit into 32 bits."""
    return ((1 << _WIDEST) - 1) // largest


class IntegerWire(Wire):
    """Writes whole numbers in as few bits as hold them, and their sums likewise.

    Args:
        bits: of a lane of a message.
        largest: lane that there is; the smallest is 0.
        granule: see `Wire`.
        world: how many messages a sum holds at most.

    Attributes:
        lane_type: the smaller of uint8 and int32 that holds a sum; Gloo adds no 16-bit integers.

    Raises:
        ConfigurationError: neither does.
    """

    def __init__(self, bits: int, largest: int, granule: int, world: int) -> None:
        if world > max_workers(largest):
            raise ConfigurationError(
                f"sums over {world} workers of lanes up to {largest} do not fit into 32 bits: "
                f"use at most {max_workers(largest)} workers, or fewer bits or a smaller granularity"
            )
        self.granule = granule
        self.up_width = bits
        self.down_width = (largest * world).bit_length()
        self.lane_type = torch.uint8 if self.down_width <= 8 else torch.int32

    def unpack(self, message: Tensor, lanes: int) -> Tensor:
        """Gives the lanes."""
        return unpack_bits(message, self.up_width, lanes).to(self.lane_type)

    def pack_total(self, total: Tensor) -> Tensor:
        """Writes sums of `down_width` bits."""
        return pack_bits(total, self.down_width)

    def unpack_total(self, packed: Tensor, lanes: int) -> Tensor:
        """Gives the sums again."""
        return unpack_bits(packed, self.down_width, lanes).to(self.lane_type)


def _group(width: int) -> tuple[int, int]:
    """Gives the smallest run of numbers that ends at a byte: (numbers, bytes)."""
    if not 1 <= width <= _WIDEST:
        raise ConfigurationError(f"width: must be 1 to {_WIDEST} bits, found {width}")
    common = gcd(width, 8)
    return 8 // common, width // common


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Gives (number, byte, shift) for each byte of a group that holds a part of a number: byte |= number << shift."""
    per_group, _ = _group(width)
    return [
        (lane, byte, lane * width - 8 * byte)
        for lane in range(per_group)
        for byte in range(lane * width // 8, (lane * width + width - 1) // 8 + 1)
    ]
