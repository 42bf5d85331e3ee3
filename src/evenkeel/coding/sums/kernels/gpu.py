"""Runs the kernels for CUDA tensors, in Triton.

NOT YET RUN ON A GPU: none was at hand when they were written. They agree with their twins in Triton's interpreter, and
Triton compiles them for compute capability 9.0; their speed is unknown. The tests marked `gpu` run where there is one.

One program does one block, or `_RUN` lanes. Multiply-adds are not fused, so that every rounding is the twin's.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from evenkeel.coding.sums.kernels.coder import Coder
from evenkeel.coding.sums.rotation import padded_length

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

LARGEST_BLOCK = 1 << 15  # a block lives in the registers of one program

_RUN = 1024
_EXACT = {"enable_fp_fusion": False}


def encode_packed(vector: Tensor, inverse: Tensor, lanes: int, coder: Coder) -> Tensor:
    """Gives packed levels, uint8 `[ceil(lanes * bits / 8)]`, of a float32 vector, blocks times `inverse`."""
    packed = torch.empty(-(-lanes * coder.bits // 8), dtype=torch.uint8, device=vector.device)
    _launch_encode(vector, vector, inverse, inverse, lanes, coder, packed)
    return packed


def encode_owed(vector: Tensor, memory: Tensor, inverse: Tensor, step: Tensor, lanes: int, coder: Coder) -> Tensor:
    """Encodes vector + memory likewise. In memory stays that less what the message says, in steps of `step`."""
    packed = torch.empty(-(-lanes * coder.bits // 8), dtype=torch.uint8, device=vector.device)
    _launch_encode(vector, memory, inverse, step.contiguous(), lanes, coder, packed, owed=True)
    return packed


def decode(total: Tensor, middle: Tensor, step: Tensor, cleared: Tensor, length: int, block: int, signs: int) -> Tensor:
    """Rotates 2 * total - middle back, times step, to float32 `[length]`; zeros where a block is cleared."""
    return _launch_decode(total, 0, middle, step, cleared, length, block, signs)


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
    return _launch_decode(packed, width, middle, step, cleared, length, block, signs)


def add_packed(parts: Sequence[Tensor], lanes: int, lane_type: torch.dtype, table: tuple[int, ...]) -> Tensor:
    """Adds the table's numbers, `[lanes]`, of packed levels."""
    stacked = torch.stack(list(parts))
    total = torch.empty(lanes, dtype=lane_type, device=stacked.device)
    numbers = _on(table, stacked.device)
    arguments = stacked, len(parts), stacked.shape[1], lanes, numbers, total
    with torch.cuda.device_of(total):
        _add[(triton.cdiv(lanes, _RUN),)](*arguments, BITS=_bits(table), RUN=_RUN, **_EXACT)
    return total


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Does what `integer_lanes.pack_bits` does, for uint8 or int32 numbers."""
    packed = torch.empty(-(-numbers.numel() * width // 8), dtype=torch.uint8, device=numbers.device)
    arguments = numbers, numbers.numel(), packed.numel(), packed
    with torch.cuda.device_of(packed):
        _pack[(triton.cdiv(packed.numel(), _RUN),)](*arguments, WIDTH=width, RUN=_RUN, **_EXACT)
    return packed


def unpack_bits(packed: Tensor, width: int, length: int) -> Tensor:
    """Does what `integer_lanes.unpack_bits` does."""
    numbers = torch.empty(length, dtype=torch.uint8 if width <= 8 else torch.int32, device=packed.device)
    arguments = packed, packed.numel(), length, numbers
    with torch.cuda.device_of(packed):
        _unpack[(triton.cdiv(length, _RUN),)](*arguments, WIDTH=width, RUN=_RUN, **_EXACT)
    return numbers


def squares(vector: Tensor, memory: Tensor | None, block: int) -> Tensor:
    """Adds the squares of each block of vector + memory, float64 `[blocks]`."""
    sums = torch.empty(triton.cdiv(vector.numel(), block), dtype=torch.float64, device=vector.device)
    with torch.cuda.device_of(vector):
        arguments = vector, vector if memory is None else memory, vector.numel(), sums
        constants = {"BLOCK": block, "RUN": min(block, _RUN), "OWED": memory is not None}
        _squares[(sums.numel(),)](*arguments, **constants, **_EXACT)
    return sums


def _launch_encode(
    vector: Tensor,
    memory: Tensor,
    inverse: Tensor,
    back: Tensor,
    lanes: int,
    coder: Coder,
    out: Tensor,
    *,
    owed: bool = False,
) -> None:
    arguments = (
        vector,
        memory,
        vector.numel(),
        inverse,
        back,
        lanes,
        _on(coder.steps, vector.device),
        _signed(coder.signs),
        _signed(coder.strata),
        _signed(coder.private),
        coder.world,
        coder.order,
        coder.share,
        coder.factor,
        out,
    )
    constants = _of_block(coder.block) | {
        "GRANULARITY": coder.granularity,
        "ROUNDING": coder.rounding,
        "BITS": coder.bits,
        "OWED": owed,
    }
    with torch.cuda.device_of(out):
        _encode[(inverse.numel(),)](*arguments, **constants, **_EXACT)


def _launch_decode(
    total: Tensor, width: int, middle: Tensor, step: Tensor, cleared: Tensor, length: int, block: int, signs: int
) -> Tensor:
    mean = torch.empty(length, dtype=torch.float32, device=total.device)
    arguments = (
        total,
        total.numel(),
        padded_length(length, block),
        middle.to(torch.int32).contiguous(),
        step.contiguous(),
        cleared.contiguous(),
        length,
        _signed(signs),
        mean,
    )
    with torch.cuda.device_of(mean):
        _decode[(step.numel(),)](*arguments, **_of_block(block), WIDTH=width, **_EXACT)
    return mean


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def _words(counter, key):
    return _mix(counter.to(tl.uint32) + key.to(tl.uint32, bitcast=True))


@triton.jit
def _flipped(x, lane, signs):
    word = _words(lane // 32, signs)
    return tl.where((word >> (lane % 32).to(tl.uint32)) & 1 != 0, -x, x)


@triton.jit
def _hadamard(x, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    # Zeros after a shorter block do no harm: at its own distances they stay zeros, and beyond a + 0 is a.
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (BLOCK >> (stage + 1), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (BLOCK,))
    return x


@triton.jit
def _bits_at(packed, size, number, mask, WIDTH: tl.constexpr):
    bit = number * WIDTH
    word = tl.zeros_like(bit).to(tl.uint64)
    for byte in tl.static_range((WIDTH + 14) // 8):
        at = bit // 8 + byte
        part = tl.load(packed + at, mask=mask & (at < size), other=0)
        word |= part.to(tl.uint64) << (8 * byte)
    return ((word >> (bit % 8).to(tl.uint64)) & ((1 << WIDTH) - 1)).to(tl.int32)


@triton.jit(do_not_specialize=["length", "lanes", "signs", "strata", "private", "world", "order"])
def _encode(
    vector,
    memory,
    length,
    inverse,
    back,
    lanes,
    steps,
    signs,
    strata,
    private,
    world,
    order,
    share,
    factor,
    out,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    GRANULARITY: tl.constexpr,
    ROUNDING: tl.constexpr,
    BITS: tl.constexpr,
    OWED: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lane = block * BLOCK + tl.arange(0, BLOCK)
    owed = tl.load(vector + lane, mask=lane < length, other=0.0)
    if OWED:
        owed += tl.load(memory + lane, mask=lane < length, other=0.0)
    x = owed * tl.load(inverse + block)
    x = tl.where(x != x, 0.0, x)
    x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    x = _hadamard(_flipped(x, lane, signs), BLOCK, STAGES)
    position = x * factor + GRANULARITY / 2
    position = tl.where(position > 0, position, 0.0)
    position = tl.where(position < GRANULARITY, position, GRANULARITY * 1.0)
    step = tl.load(steps + tl.minimum(position.to(tl.int32), GRANULARITY - 1))
    if ROUNDING == 0:
        cut = tl.full((BLOCK,), 0.5, tl.float32)
    else:
        word = _words(lane, strata)
        cut = (_mix(word ^ private.to(tl.uint32, bitcast=True)) >> 8).to(tl.float32) * (2.0**-24)
        if ROUNDING == 2:
            stratum = tl.umulhi(word, tl.zeros_like(word) + world.to(tl.uint32)).to(tl.int32) + order
            stratum = tl.where(stratum >= world, stratum - world, stratum)
            cut = (stratum.to(tl.float32) + cut) * share
    low = step & 0x7FF
    gap = (step >> 11) & 0x7FF
    up = position - low.to(tl.float32) > cut * gap.to(tl.float32)
    if OWED:
        number = tl.where(up, low + gap, low)
        decoded = tl.where(lane < lanes, 2 * number - GRANULARITY, 0).to(tl.float32)
        decoded = _flipped(_hadamard(decoded, BLOCK, STAGES), lane, signs) * tl.load(back + block)
        tl.store(memory + lane, owed - decoded, mask=lane < length)
    level = tl.where(lane < lanes, (step >> 22) + up.to(tl.int32), 0).to(tl.int64)
    places = tl.arange(0, 8).to(tl.int64) * BITS
    word = tl.sum(tl.reshape(level, (BLOCK // 8, 8)) << places[None, :], axis=1)
    first = (block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)) * BITS
    for byte in tl.static_range(BITS):
        tl.store(out + first + byte, (word >> (8 * byte)) & 255, mask=first + byte < (lanes * BITS + 7) // 8)


@triton.jit(do_not_specialize=["size", "lanes", "length", "signs"])
def _decode(
    total,
    size,
    lanes,
    middle,
    step,
    cleared,
    length,
    signs,
    mean,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lane = block * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    if WIDTH == 0:
        numbers = tl.load(total + lane, mask=inside, other=0).to(tl.int32)
    else:
        numbers = _bits_at(total, size, lane, inside, WIDTH)
    centred = tl.where(inside, 2 * numbers - tl.load(middle + block), 0).to(tl.float32)
    back = _flipped(_hadamard(centred, BLOCK, STAGES), lane, signs) * tl.load(step + block)
    tl.store(mean + lane, tl.where(tl.load(cleared + block), 0.0, back), mask=lane < length)


@triton.jit(do_not_specialize=["count", "size", "lanes"])
def _add(parts, count, size, lanes, table, total, BITS: tl.constexpr, RUN: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = lane < lanes
    sums = tl.zeros((RUN,), tl.int32)
    for part in range(count):
        level = _bits_at(parts + part * size.to(tl.int64), size, lane, inside, BITS)
        sums += tl.load(table + level)
    tl.store(total + lane, sums, mask=inside)


@triton.jit(do_not_specialize=["length", "size"])
def _pack(numbers, length, size, packed, WIDTH: tl.constexpr, RUN: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    value = tl.zeros((RUN,), tl.int64)
    for part in tl.static_range(7 // WIDTH + 2):
        index = byte * 8 // WIDTH + part
        number = tl.load(numbers + index, mask=(byte < size) & (index < length), other=0).to(tl.int64)
        left = index * WIDTH - byte * 8
        right = tl.maximum(-left, 0)
        value |= tl.where(left < 8, number << tl.minimum(tl.maximum(left, 0), 8), 0) >> right
    tl.store(packed + byte, value & 255, mask=byte < size)


@triton.jit(do_not_specialize=["size", "length"])
def _unpack(packed, size, length, numbers, WIDTH: tl.constexpr, RUN: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = lane < length
    tl.store(numbers + lane, _bits_at(packed, size, lane, inside, WIDTH), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _squares(vector, memory, length, sums, BLOCK: tl.constexpr, RUN: tl.constexpr, OWED: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((RUN,), tl.float64)
    for at in range(0, BLOCK, RUN):
        lane = block * BLOCK + at + tl.arange(0, RUN)
        x = tl.load(vector + lane, mask=lane < length, other=0.0)
        if OWED:
            x += tl.load(memory + lane, mask=lane < length, other=0.0)
        total += x.to(tl.float64) * x.to(tl.float64)
    tl.store(sums + block, tl.sum(total))


def _bits(table: tuple[int, ...]) -> int:
    return len(table).bit_length() - 1


def _signed(word: int) -> int:
    """Gives the same 32 bits as a number that Triton always takes for 32 bits."""
    return word - (1 << 32) if word >> 31 else word


def _of_block(block: int) -> dict[str, int]:
    return {"BLOCK": block, "STAGES": block.bit_length() - 1, "num_warps": min(max(block // 256, 1), 16)}


@lru_cache(maxsize=64)
def _on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
