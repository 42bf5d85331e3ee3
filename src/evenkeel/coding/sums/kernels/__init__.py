"""Does fast, bit for bit, what plain torch code does in `plain_thc.py` and `integer_lanes.py`, which is its twin.

`fast` says which to use for given tensors: Numba's for CPU tensors, Triton's for CUDA tensors, and None, so the twin,
where the library is not installed or the tensors are unusual. Nobody else needs to know.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from evenkeel.coding.sums.kernels.coder import Coder

__all__ = ["MAX_WORKERS", "Kernels", "fast", "twins_only"]

MAX_WORKERS = 1 << 15  # up to which all sums of THC's numbers, and what is computed with them, stay in 32 bits
_MODULES = {
    "cpu": ("numba", "evenkeel.coding.sums.kernels.cpu"),
    "cuda": ("triton", "evenkeel.coding.sums.kernels.gpu"),
}
_off = False


class Kernels(Protocol):
    """Says what a module of kernels offers. Tensors are contiguous and on the module's device.

    Attributes:
        LARGEST_BLOCK: that it can encode and decode.
    """

    LARGEST_BLOCK: int

    def encode_packed(self, vector: Tensor, inverse: Tensor, lanes: int, coder: Coder) -> Tensor:
        """Gives packed levels, uint8 `[ceil(lanes * bits / 8)]`, of a float32 vector, blocks times `inverse`."""

    def encode_owed(
        self, vector: Tensor, memory: Tensor, inverse: Tensor, step: Tensor, lanes: int, coder: Coder
    ) -> Tensor:
        """Encodes vector + memory likewise. In memory stays that less what the message says, in steps of `step`."""

    def decode(
        self, total: Tensor, middle: Tensor, step: Tensor, cleared: Tensor, length: int, block: int, signs: int
    ) -> Tensor:
        """Rotates 2 * total - middle back, times step, to float32 `[length]`; zeros where a block is cleared."""

    def decode_packed(
        self,
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

    def add_packed(self, parts: Sequence[Tensor], lanes: int, lane_type: torch.dtype, table: tuple[int, ...]) -> Tensor:
        """Adds the table's numbers, `[lanes]`, of packed levels."""

    def pack_bits(self, numbers: Tensor, width: int) -> Tensor:
        """Does what `integer_lanes.pack_bits` does, for uint8 or int32 numbers."""

    def unpack_bits(self, packed: Tensor, width: int, length: int) -> Tensor:
        """Does what `integer_lanes.unpack_bits` does."""

    def squares(self, vector: Tensor, memory: Tensor | None, block: int) -> Tensor:
        """Adds the squares of each block of vector + memory, float64 `[blocks]`.

        It may differ from the twin's in its last bits.
        """


def fast(*tensors: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> Kernels | None:
    """Gives the kernels for these tensors; None where the twin has to do.

    Args:
        tensors: that the kernels would read.
        types: which they can read.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device or tensor.dtype not in types or not tensor.is_contiguous() or not tensor.numel():
            return None
    return None if _off else _of_device(device.type)


@contextmanager
def twins_only() -> Iterator[None]:
    """Turns kernels off, in all threads, inside this `with`: to compare with them."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@lru_cache
def _of_device(kind: str) -> Kernels | None:
    library, module = _MODULES.get(kind, ("", ""))
    if not library or sys.byteorder != "little":  # the wire forms are written a word at a time
        return None
    try:
        found = import_module(library)
    except ImportError:
        return None
    # Under NUMBA_DISABLE_JIT=1 the loops would have to run as Python, which their intrinsics cannot.
    if kind == "cpu" and found.config.DISABLE_JIT:
        return None
    return cast(Kernels, import_module(module))
