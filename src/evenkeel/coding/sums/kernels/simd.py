"""Gives vector instructions that a plain loop does not turn into, and unaligned words, as numba intrinsics.

They are written in LLVM's own vector types, eight float32 wide, so they compile for any processor.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types

__all__ = ["butterfly_2", "butterfly_4", "butterfly_8", "butterfly_within_8", "flip_8", "load_word", "store_word"]

_intrinsic: Any = extending.intrinsic  # its types describe the generator, not what is called
_WIDTH = 8
_FLOATS = ir.VectorType(ir.FloatType(), _WIDTH)
_BITS = ir.VectorType(ir.IntType(32), _WIDTH)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, to: ir.Type) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _butterfly_across(radix: int) -> Any:
    """Does `log2(radix)` stages at once, for eight neighbours: lanes i, i + distance, ..., i + (radix - 1) distance."""

    @_intrinsic
    def butterfly(typing_context: Any, lanes: Any, index: Any, distance: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, first, apart = arguments
            pointers = [
                _pointer(context, builder, lanes, array, builder.add(first, builder.mul(apart, apart.type(k))), _FLOATS)
                for k in range(radix)
            ]
            values = [builder.load(pointer, align=4) for pointer in pointers]
            stage = 1
            while stage < radix:
                for low in range(radix):
                    if not low & stage:
                        a, b = values[low], values[low + stage]
                        values[low], values[low + stage] = builder.fadd(a, b), builder.fsub(a, b)
                stage *= 2
            for pointer, value in zip(pointers, values, strict=True):
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(lanes, types.intp, types.intp), generate

    return butterfly


butterfly_2 = _butterfly_across(2)
butterfly_4 = _butterfly_across(4)
butterfly_8 = _butterfly_across(8)


@_intrinsic
def butterfly_within_8(typing_context: Any, lanes: Any, index: Any) -> Any:
    """Does the stages at distance 1, 2 and 4 of eight neighbours."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first = arguments
        pointer = _pointer(context, builder, lanes, array, first, _FLOATS)
        value = builder.load(pointer, align=4)
        for distance in (1, 2, 4):
            # The upper of each pair gives a - b as a + (-b), which is the same bits.
            upper = ir.Constant(_BITS, [1 << 31 if lane & distance else 0 for lane in range(_WIDTH)])
            partner = ir.Constant(_BITS, [lane ^ distance for lane in range(_WIDTH)])
            other = builder.shuffle_vector(value, value, partner)
            turned = builder.bitcast(builder.xor(builder.bitcast(value, _BITS), upper), _FLOATS)
            value = builder.fadd(other, turned)
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(lanes, types.intp), generate


@_intrinsic
def flip_8(typing_context: Any, lanes: Any, index: Any, signs: Any) -> Any:
    """Turns the sign of those of eight neighbours whose bit in `signs` is 1, from the lowest bit on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, bits = arguments
        pointer = _pointer(context, builder, lanes, array, first, _FLOATS)
        spread = builder.insert_element(ir.Constant(_BITS, ir.Undefined), bits, ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(spread, spread, ir.Constant(_BITS, [0] * _WIDTH))
        turned = builder.shl(spread, ir.Constant(_BITS, [31 - lane for lane in range(_WIDTH)]))
        turned = builder.and_(turned, ir.Constant(_BITS, [1 << 31] * _WIDTH))
        value = builder.bitcast(builder.load(pointer, align=4), _BITS)
        builder.store(builder.bitcast(builder.xor(value, turned), _FLOATS), pointer, align=4)
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.uint32), generate


@_intrinsic
def load_word(typing_context: Any, data: Any, index: Any) -> Any:
    """Reads eight bytes from `index` on, as one uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first = arguments
        return builder.load(_pointer(context, builder, data, array, first, ir.IntType(64)), align=1)

    return types.uint64(data, types.intp), generate


@_intrinsic
def store_word(typing_context: Any, data: Any, index: Any, word: Any) -> Any:
    """Writes one uint64 as the eight bytes from `index` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, value = arguments
        builder.store(value, _pointer(context, builder, data, array, first, ir.IntType(64)), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), generate
