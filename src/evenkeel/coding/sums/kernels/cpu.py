"""Runs the kernels for CPU tensors: makes memory for the results, and the loops of `loops.py` fill it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenkeel.coding.sums.kernels import loops
from evenkeel.coding.sums.kernels.coder import Coder
from evenkeel.coding.sums.kernels.threads import share_out

__all__ = [
    "LARGEST_BLOCK",
    "add_packed",
    "decode",
    "decode_packed",
    "encode_owed",
    "encode_packed",
    "pack_bits",
    "squares",
    "unpack_bits",
]

LARGEST_BLOCK = 1 << 30


def encode_packed(vector: Tensor, inverse: Tensor, lanes: int, coder: Coder) -> Tensor:
    """Gives packed levels, uint8 `[ceil(lanes * bits / 8)]`, of a float32 vector, blocks times `inverse`."""
    packed = torch.empty(-(-lanes * coder.bits // 8), dtype=torch.uint8, device="cpu")
    arguments = vector.numpy(), inverse.numpy(), _typed(coder), packed.numpy()
    share_out(loops.encode_packed, inverse.numel(), coder.block, *arguments)
    return packed


def encode_owed(vector: Tensor, memory: Tensor, inverse: Tensor, step: Tensor, lanes: int, coder: Coder) -> Tensor:
    """Encodes vector + memory likewise. In memory stays that less what the message says, in steps of `step`."""
    packed = torch.empty(-(-lanes * coder.bits // 8), dtype=torch.uint8, device="cpu")
    scales = inverse.numpy(), step.numpy()
    arguments = vector.numpy(), memory.numpy(), *scales, _typed(coder), packed.numpy()
    share_out(loops.encode_owed, inverse.numel(), coder.block, *arguments)
    return packed


def decode(total: Tensor, middle: Tensor, step: Tensor, cleared: Tensor, length: int, block: int, signs: int) -> Tensor:
    """Rotates 2 * total - middle back, times step, to float32 `[length]`; zeros where a block is cleared."""
    mean = torch.empty(length, dtype=torch.float32, device="cpu")
    arguments = total.numpy(), *_blocks(middle, step, cleared), block, np.uint32(signs), mean.numpy()
    share_out(loops.decode_lanes, step.numel(), block, *arguments)
    return mean


def decode_packed(
    packed: Tensor,
    width: int,
    middle: Tensor,
    step: Tensor,
    cleared: Tensor,
    length: int,
    block: int,
    signs: int,
) -> Tensor:
    """Does the same for a total that is packed, `width` bits each."""
    mean = torch.empty(length, dtype=torch.float32, device="cpu")
    arguments = packed.numpy(), width, *_blocks(middle, step, cleared), block, np.uint32(signs), mean.numpy()
    share_out(loops.decode_packed, step.numel(), block, *arguments)
    return mean


def add_packed(parts: Sequence[Tensor], lanes: int, lane_type: torch.dtype, table: tuple[int, ...]) -> Tensor:
    """Adds the table's numbers, `[lanes]`, of packed levels."""
    total = torch.empty(lanes, dtype=lane_type, device="cpu")
    bits = len(table).bit_length() - 1
    arguments = torch.stack(list(parts)).numpy(), bits, *_numbers(table, total.numpy().dtype), total.numpy()
    share_out(loops.add_parts, -(-lanes // loops.RUN), loops.RUN * len(parts), *arguments)
    return total


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Does what `integer_lanes.pack_bits` does, for uint8 or int32 numbers."""
    numbers = numbers.to(torch.uint8 if width <= 8 else torch.int32)
    packed = torch.empty(-(-numbers.numel() * width // 8), dtype=torch.uint8, device="cpu")
    share_out(loops.pack, -(-numbers.numel() // loops.RUN), loops.RUN, numbers.numpy(), width, packed.numpy())
    return packed


def unpack_bits(packed: Tensor, width: int, length: int) -> Tensor:
    """Does what `integer_lanes.unpack_bits` does."""
    numbers = torch.empty(length, dtype=torch.uint8 if width <= 8 else torch.int32, device="cpu")
    share_out(loops.unpack, -(-length // loops.RUN), loops.RUN, packed.numpy(), width, numbers.numpy())
    return numbers


def squares(vector: Tensor, memory: Tensor | None, block: int) -> Tensor:
    """Adds the squares of each block of vector + memory, float64 `[blocks]`."""
    sums = torch.empty(-(-vector.numel() // block), dtype=torch.float64, device="cpu")
    memory = vector[:0] if memory is None else memory
    share_out(loops.squares, sums.numel(), block, vector.numpy(), memory.numpy(), block, sums.numpy())
    return sums


def _typed(coder: Coder) -> Coder:
    """Gives the same with numpy's types, which Numba compiles for."""
    words: dict[str, Any] = {
        name: np.uint32(getattr(coder, name)) for name in ("signs", "strata", "private", "world", "order")
    }
    reals: dict[str, Any] = {name: np.float32(getattr(coder, name)) for name in ("factor", "half", "share")}
    return coder._replace(**words, **reals, steps=_array(coder.steps))


@lru_cache(maxsize=64)
def _array(numbers: tuple[int, ...]) -> Any:
    return np.array(numbers, np.int32)


def _blocks(middle: Tensor, step: Tensor, cleared: Tensor) -> tuple[Any, Any, Any]:
    return middle.to(torch.int32).contiguous().numpy(), step.contiguous().numpy(), cleared.contiguous().numpy()


@lru_cache(maxsize=64)
def _numbers(table: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    """Gives the table, and from which levels on it jumps by more than 1, and by how much more."""
    numbers = np.array(table, np.int64)
    gaps = np.diff(numbers)
    jumps = np.flatnonzero(gaps > 1) + 1
    return numbers.astype(dtype), jumps.astype(np.uint8), (gaps[jumps - 1] - 1).astype(dtype)
