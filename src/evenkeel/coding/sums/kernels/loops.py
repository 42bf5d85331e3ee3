"""Compiles the loops of the CPU kernels by Numba: each does what the plain torch code does, in cache, block by block.

Every rounding is the twin's: the same operations in the same order, no fast-math, no fused multiply-add. Words stay 32
bits wide: Numba widens sums and products of them, so each is cut back at once, which LLVM turns into plain 32-bit
vector arithmetic. Loops over lanes hold no branch and no call that could keep LLVM from vectorising them.

Each function works on blocks (or runs of `RUN` lanes) `first` to `last - 1`, so that threads can share out a vector.
They release the GIL and never raise.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from evenkeel.coding.sums.kernels.simd import (
    butterfly_2,
    butterfly_4,
    butterfly_8,
    butterfly_within_8,
    flip_8,
    load_word,
    store_word,
)

__all__ = [
    "RUN",
    "add_parts",
    "decode_lanes",
    "decode_packed",
    "encode_owed",
    "encode_packed",
    "pack",
    "squares",
    "unpack",
]

RUN = 512  # lanes that are rounded or packed at a time: few enough that what passes between loops stays in L1
_FEW = 8  # wide gaps of a table up to which counting them beats looking numbers up
_LARGEST = np.float32(np.finfo(np.float32).max)

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(**options: Any) -> Callable[[Function], Function]:
    def compile_lazily(function: Function) -> Function:
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # nowhere to write: compiled anew by each process then
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return compile_lazily


@_compiled()
def _mix(word: Any) -> Any:
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    word = np.uint32(np.uint32(word ^ (word >> np.uint32(15))) * np.uint32(0x735A2D97))
    return np.uint32(word ^ (word >> np.uint32(15)))


@_compiled()
def _flip(lanes: Any, start: Any, secret: Any) -> None:
    word = np.uint32(0)
    for i in range(0, len(lanes), 8):
        bit = (start + i) & 31
        if bit == 0 or i == 0:
            word = _mix(np.uint32(np.uint32((start + i) >> 5) + secret))
        signs = np.uint32(word >> np.uint32(bit))
        if i + 8 <= len(lanes):
            flip_8(lanes, i, signs)
        else:
            for j in range(i, len(lanes)):
                if (signs >> np.uint32(j - i)) & np.uint32(1):
                    lanes[j] = -lanes[j]


@_compiled()
def _hadamard(lanes: Any) -> None:
    size = len(lanes)
    if size < 8:
        distance = 1
        while distance < size:
            for i in range(size):
                if not i & distance:
                    a, b = lanes[i], lanes[i + distance]
                    lanes[i], lanes[i + distance] = a + b, a - b
            distance *= 2
        return
    for i in range(0, size, 8):
        butterfly_within_8(lanes, i)
    distance = 8
    while 8 * distance <= size:
        for base in range(0, size, 8 * distance):
            for i in range(base, base + distance, 8):
                butterfly_8(lanes, i, distance)
        distance *= 8
    if 4 * distance == size:
        for i in range(0, distance, 8):
            butterfly_4(lanes, i, distance)
    elif 2 * distance == size:
        for i in range(0, distance, 8):
            butterfly_2(lanes, i, distance)


@_compiled()
def _size(count: Any, block: Any) -> Any:
    size = 1
    while size < count:
        size *= 2
    return min(size, block)


@_compiled()
def _rotated(lanes: Any, block: Any, start: Any, inverse: Any, secret: Any) -> None:
    for i in range(len(block)):
        share = block[i] * inverse
        share = np.float32(0) if share != share else share
        lanes[i] = min(max(share, -_LARGEST), _LARGEST)
    lanes[len(block) :] = np.float32(0)
    _flip(lanes, start, secret)
    _hadamard(lanes)


@_compiled()
def _thresholds(out: Any, start: Any, coder: Any) -> None:
    if coder.rounding == 0:
        out[:] = np.float32(0.5)
        return
    first = np.uint32(np.uint32(start) + coder.strata)
    for i in range(len(out)):
        word = _mix(np.uint32(np.uint32(i) + first))
        private = _mix(np.uint32(word ^ coder.private))
        uniform = np.float32(np.int32(private >> np.uint32(8))) * np.float32(2.0**-24)
        if coder.rounding == 2:
            # The upper half of word * world, from halves of the word, as there is no vector instruction for it.
            high = np.uint32((word >> np.uint32(16)) * coder.world)
            low = np.uint32((word & np.uint32(0xFFFF)) * coder.world)
            stratum = np.uint32((np.uint32(high + (low >> np.uint32(16))) >> np.uint32(16)) + coder.order)
            stratum = min(stratum, np.uint32(stratum - coder.world))  # wraps to a large number where it is below world
            uniform = (np.float32(np.int32(stratum)) + uniform) * coder.share
        out[i] = uniform


@_compiled()
def _rounded(levels: Any, lanes: Any, cuts: Any, found: Any, coder: Any) -> None:
    top = np.float32(coder.granularity)
    last = np.int32(coder.granularity - 1)
    for i in range(len(lanes)):
        position = lanes[i] * coder.factor + coder.half
        position = position if position > np.float32(0) else np.float32(0)  # NaN, too, so that no look-up goes astray
        position = position if position < top else top
        lanes[i] = position
        found[i] = min(np.int32(position), last)
    for i in range(len(lanes)):
        found[i] = coder.steps[np.uint32(found[i])]
    for i in range(len(lanes)):
        low = found[i] & np.int32(0x7FF)
        gap = (found[i] >> np.int32(11)) & np.int32(0x7FF)
        up = lanes[i] - np.float32(low) > cuts[i] * np.float32(gap)
        levels[i] = (found[i] >> np.int32(22)) + np.int32(up)


@_compiled()
def encode_packed(first: Any, last: Any, vector: Any, inverse: Any, coder: Any, out: Any) -> None:
    """Writes packed levels of blocks to `out[bytes]`."""
    scratch = np.empty(coder.block, np.float32)
    cuts = np.empty(RUN, np.float32)
    found = np.empty(RUN, np.int32)
    levels = np.empty(RUN, np.uint8)
    for index in range(first, last):
        start = index * coder.block
        block = vector[start : start + coder.block]
        lanes = scratch[: _size(len(block), coder.block)]
        _rotated(lanes, block, start, inverse[index], coder.signs)
        for at in range(0, len(lanes), RUN):
            run = lanes[at : at + RUN]
            _thresholds(cuts[: len(run)], start + at, coder)
            _rounded(levels, run, cuts, found, coder)
            _pack(out[(start + at) * coder.bits // 8 :], levels[: len(run)], coder.bits)


@_compiled()
def _decoded(lanes: Any, found: Any, levels: Any, coder: Any) -> None:
    """Writes what the levels say, as numbers around 0; `found` is where they were looked up."""
    for i in range(len(lanes)):
        low = found[i] & np.int32(0x7FF)
        gap = (found[i] >> np.int32(11)) & np.int32(0x7FF)
        number = low + (gap if np.int32(levels[i]) > (found[i] >> np.int32(22)) else np.int32(0))
        lanes[i] = np.float32(np.int32(number * np.int32(2) - np.int32(coder.granularity)))


@_compiled()
def encode_owed(first: Any, last: Any, vector: Any, memory: Any, inverse: Any, step: Any, coder: Any, out: Any) -> None:
    """Encodes blocks of vector + memory likewise; in `memory[length]` stays what their levels do not say."""
    scratch = np.empty(coder.block, np.float32)
    cuts = np.empty(RUN, np.float32)
    found = np.empty(RUN, np.int32)
    levels = np.empty(RUN, np.uint8)
    for index in range(first, last):
        start = index * coder.block
        block = vector[start : start + coder.block]
        owed = memory[start : start + coder.block]
        for i in range(len(owed)):
            owed[i] = block[i] + owed[i]
        lanes = scratch[: _size(len(block), coder.block)]
        _rotated(lanes, owed, start, inverse[index], coder.signs)
        for at in range(0, len(lanes), RUN):
            run = lanes[at : at + RUN]
            _thresholds(cuts[: len(run)], start + at, coder)
            _rounded(levels, run, cuts, found, coder)
            _pack(out[(start + at) * coder.bits // 8 :], levels[: len(run)], coder.bits)
            _decoded(run, found, levels, coder)
        _hadamard(lanes)
        _flip(lanes, start, coder.signs)
        for i in range(len(owed)):
            owed[i] = owed[i] - lanes[i] * step[index]


@_compiled()
def _mean(mean: Any, start: Any, lanes: Any, step: Any, cleared: Any, secret: Any) -> None:
    if cleared:
        mean[:] = np.float32(0)
        return
    _hadamard(lanes)
    _flip(lanes, start, secret)
    for i in range(len(mean)):
        mean[i] = lanes[i] * step


@_compiled()
def _centred(lanes: Any, total: Any, middle: Any) -> None:
    for i in range(len(lanes)):
        lanes[i] = np.float32(np.int32(np.int32(total[i]) * np.int32(2) - middle))


@_compiled()
def decode_lanes(
    first: Any, last: Any, total: Any, middle: Any, step: Any, cleared: Any, block: Any, secret: Any, mean: Any
) -> None:
    """Writes means of blocks to `mean[length]`, from sums of table numbers."""
    scratch = np.empty(block, np.float32)
    for index in range(first, last):
        start = index * block
        out = mean[start : start + block]
        lanes = scratch[: _size(len(out), block)]
        _centred(lanes, total[start : start + len(lanes)], middle[index])
        _mean(out, start, lanes, step[index], cleared[index], secret)


@_compiled()
def decode_packed(
    first: Any,
    last: Any,
    packed: Any,
    width: Any,
    middle: Any,
    step: Any,
    cleared: Any,
    block: Any,
    secret: Any,
    mean: Any,
) -> None:
    """Does what `decode_lanes` does, from sums packed `width` bits each."""
    scratch = np.empty(block, np.float32)
    narrow = np.empty(RUN, np.uint8)
    wide = np.empty(RUN, np.int32)
    for index in range(first, last):
        start = index * block
        out = mean[start : start + block]
        lanes = scratch[: _size(len(out), block)]
        for at in range(0, len(lanes), RUN):
            run = lanes[at : at + RUN]
            source = packed[(start + at) * width // 8 :]
            if width <= 8:
                _unpack(narrow[: len(run)], source, width)
                _centred(run, narrow, middle[index])
            else:
                _unpack_wide(wide[: len(run)], source, width)
                _centred(run, wide, middle[index])
        _mean(out, start, lanes, step[index], cleared[index], secret)


@_compiled()
def _join(word: Any, width: Any) -> Any:
    """Joins eight numbers, one to a byte: neighbours first, then pairs, then fours."""
    low, pair, four = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
    word = (word & low) | (((word >> np.uint64(8)) & low) << np.uint64(width))
    word = (word & pair) | (((word >> np.uint64(16)) & pair) << np.uint64(2 * width))
    return (word & four) | ((word >> np.uint64(32)) << np.uint64(4 * width))


@_compiled()
def _part(word: Any, width: Any) -> Any:
    """Gives what `_join` was given; what the word holds beyond the eight numbers does not matter."""
    one = np.uint64(1)
    low = ((one << np.uint64(width)) - one) * np.uint64(0x0001000100010001)
    pair = ((one << np.uint64(2 * width)) - one) * np.uint64(0x0000000100000001)
    four = (one << np.uint64(4 * width)) - one
    word = (word & four) | (((word >> np.uint64(4 * width)) & four) << np.uint64(32))
    word = (word & pair) | (((word >> np.uint64(2 * width)) & pair) << np.uint64(16))
    return (word & low) | (((word >> np.uint64(width)) & low) << np.uint64(8))


@_compiled()
def _bytes(data: Any, begin: Any, end: Any) -> Any:
    word = np.uint64(0)
    for i in range(begin, min(end, begin + 8, len(data))):
        word |= np.uint64(data[i]) << np.uint64(8 * (i - begin))
    return word


@_compiled()
def _pack(packed: Any, numbers: Any, width: Any) -> None:
    """Packs numbers of up to 8 bits."""
    end = (len(numbers) * width + 7) // 8
    safe = min(len(numbers) // 8, max(0, (end - 8) // width + 1)) if end >= 8 else 0
    for group in range(safe):  # what a word writes too much, the next one puts right
        store_word(packed, group * width, _join(load_word(numbers, 8 * group), width))
    for group in range(safe, (len(numbers) + 7) // 8):
        word = _join(_bytes(numbers, 8 * group, len(numbers)), width)
        for i in range(group * width, min(end, (group + 1) * width)):
            packed[i] = np.uint8(word)
            word >>= np.uint64(8)


@_compiled()
def _unpack(numbers: Any, packed: Any, width: Any) -> None:
    if width == 4:  # by far the commonest, and with bytes LLVM makes it as fast as copying
        for i in range(len(numbers) // 2):
            numbers[2 * i] = packed[i] & np.uint8(15)
            numbers[2 * i + 1] = packed[i] >> np.uint8(4)
        if len(numbers) & 1:
            numbers[len(numbers) - 1] = packed[len(numbers) // 2] & np.uint8(15)
        return
    safe = min(len(numbers) // 8, (len(packed) - 8) // width + 1) if len(packed) >= 8 else 0
    for group in range(safe):
        store_word(numbers, 8 * group, _part(load_word(packed, group * width), width))
    for group in range(safe, (len(numbers) + 7) // 8):
        word = _part(_bytes(packed, group * width, (group + 1) * width), width)
        for i in range(8 * group, min(len(numbers), 8 * group + 8)):
            numbers[i] = np.uint8(word)
            word >>= np.uint64(8)


@_compiled()
def _pack_wide(packed: Any, numbers: Any, width: Any) -> None:
    waiting, bits, to = np.uint64(0), 0, 0
    for i in range(len(numbers)):
        waiting |= np.uint64(np.uint32(numbers[i])) << np.uint64(bits)
        bits += width
        while bits >= 8:
            packed[to] = np.uint8(waiting)
            to += 1
            waiting >>= np.uint64(8)
            bits -= 8
    if bits:
        packed[to] = np.uint8(waiting)


@_compiled()
def _unpack_wide(numbers: Any, packed: Any, width: Any) -> None:
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    safe = min(len(numbers), max(0, (8 * len(packed) - 64) // width))
    for i in range(safe):
        numbers[i] = np.int32((load_word(packed, i * width >> 3) >> np.uint64(i * width & 7)) & mask)
    for i in range(safe, len(numbers)):
        begin = i * width >> 3
        numbers[i] = np.int32((_bytes(packed, begin, begin + 8) >> np.uint64(i * width & 7)) & mask)


@_compiled()
def pack(first: Any, last: Any, numbers: Any, width: Any, packed: Any) -> None:
    """Writes runs of numbers, `width` bits each, to `packed[bytes]`: uint8 where `width` is 8 or less, else int32."""
    run = numbers[first * RUN : last * RUN]
    if numbers.itemsize == 1:
        _pack(packed[first * RUN * width // 8 :], run, width)
    else:
        _pack_wide(packed[first * RUN * width // 8 :], run, width)


@_compiled()
def unpack(first: Any, last: Any, packed: Any, width: Any, numbers: Any) -> None:
    """Writes runs of what was packed to `numbers[length]`: uint8 where `width` is 8 or less, else int32."""
    run = numbers[first * RUN : last * RUN]
    if numbers.itemsize == 1:
        _unpack(run, packed[first * RUN * width // 8 :], width)
    else:
        _unpack_wide(run, packed[first * RUN * width // 8 :], width)


@_compiled()
def _add_numbers(total: Any, levels: Any, table: Any, jumps: Any, extras: Any) -> None:
    # A level's number is the level and, for each wide gap below it, what the gap is wider than 1.
    if len(jumps) > _FEW:
        for i in range(len(total)):
            total[i] += table[levels[i]]
        return
    for i in range(len(total)):
        total[i] += levels[i]
    for jump in range(len(jumps)):
        least, extra = jumps[jump], extras[jump]
        for i in range(len(total)):
            total[i] += extra * (levels[i] >= least)


@_compiled()
def add_parts(first: Any, last: Any, parts: Any, bits: Any, table: Any, jumps: Any, extras: Any, total: Any) -> None:
    """Writes runs of sums to `total[lanes]`, of the table numbers of `parts[n, bytes]`."""
    levels = np.empty(RUN, np.uint8)
    for index in range(first, last):
        run = total[index * RUN : (index + 1) * RUN]
        run[:] = 0
        for part in range(len(parts)):
            _unpack(levels[: len(run)], parts[part][index * RUN * bits // 8 :], bits)
            _add_numbers(run, levels, table, jumps, extras)


@_compiled(fastmath={"reassoc"})
def squares(first: Any, last: Any, vector: Any, memory: Any, block: Any, sums: Any) -> None:
    """Adds squares of blocks of vector + memory, which may be empty, in float64; the order of adding is free."""
    for index in range(first, last):
        part = vector[index * block : (index + 1) * block]
        sum_of_squares = 0.0
        if len(memory):
            kept = memory[index * block : (index + 1) * block]
            for i in range(len(part)):
                owed = np.float64(np.float32(part[i] + kept[i]))
                sum_of_squares += owed * owed
        else:
            for i in range(len(part)):
                sum_of_squares += np.float64(part[i]) * np.float64(part[i])
        sums[index] = sum_of_squares
