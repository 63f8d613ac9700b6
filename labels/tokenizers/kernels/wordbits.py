"""Eight bytes or sixteen numbers at once, compiled: what numba has no function for."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from labels.tokenizers.kernels.table import Scalar
from labels.tokenizers.kernels.wordjit import inlined

_ONES, _HIGH = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_CASE = np.uint64(0x2020202020202020)
# Added to a byte below 0x80, these set its high bit from `a` on, and beyond `z`.
_FROM_A, _BEYOND_Z = np.uint64(0x80 - ord("a")) * _ONES, np.uint64(0x80 - ord("z") - 1) * _ONES
_EIGHT, _FULL, _THREE = np.uint64(8), np.uint64(64), np.uint64(3)


@intrinsic
def load(typingctx: Any, text: Any, at: Any) -> Any:
    """text[at : at + 8] as one number, the first byte lowest; the caller has looked that they are there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = cgutils.pointer_add(builder, array.data, arguments[1])
        number = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        number.align = 1
        return number

    return types.uint64(text, types.int64), emit


@intrinsic
def store(typingctx: Any, out: Any, at: Any, value: Any) -> Any:
    """Write a number to out[at : at + 8], the lowest byte first; the caller has looked that there is room."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = cgutils.pointer_add(builder, array.data, arguments[1])
        builder.store(arguments[2], builder.bitcast(place, ir.IntType(64).as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64), emit


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Have the cache line of array[at] fetched from memory while other work goes on; the caller has looked that it is there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def _trailing_zeros(typingctx: Any, value: Any) -> Any:
    """Number of zero bits below the lowest that is set; 64 of 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), emit


@intrinsic
def bit_width(typingctx: Any, value: Any) -> Any:
    """Number of bits up to the highest that is set; 0 of 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sub(ir.Constant(ir.IntType(64), 64), builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0)))

    return types.uint64(types.uint64), emit


@intrinsic
def ones(typingctx: Any, value: Any) -> Any:
    """Number of bits that are set."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), emit


def _comparing(relation: str) -> Any:
    vector = ir.VectorType(ir.IntType(32), 16)

    @intrinsic
    def compare(typingctx: Any, numbers: Any, at: Any, number: Any) -> Any:
        """A bit for each of int32 numbers[at : at + 16] that is equal to (less than) one, the first lowest; all 16 are read."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            place = builder.gep(array.data, [arguments[1]])
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()))
            loaded.align = 4
            nothing = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(nothing, arguments[2], ir.Constant(ir.IntType(32), 0))
            same = builder.shuffle_vector(first, nothing, ir.Constant(vector, [0] * 16))
            found = builder.bitcast(builder.icmp_signed(relation, loaded, same), ir.IntType(16))
            return builder.zext(found, ir.IntType(64))

        return types.uint64(numbers, types.int64, types.int32), emit

    return compare


equal_16, less_16 = _comparing("=="), _comparing("<")


@inlined
def lowest_bytes(value: Scalar, count: Scalar) -> Scalar:
    """The lowest 0 to 7 bytes of a number."""
    return value & ((np.uint64(1) << (_EIGHT * np.uint64(count))) - np.uint64(1))


@inlined
def leading_letters(text: np.ndarray, at: Scalar) -> tuple[Scalar, Scalar]:
    """How many of the eight bytes from `at` on, up to the first that is none, are ASCII letters; and these in lower case as one number.

    Any byte from 0x80 on is no letter; what its carry does above it is behind the first that is none.
    """
    folded = load(text, np.int64(at)) | _CASE  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
    letters = (folded + _FROM_A) & ~(folded + _BEYOND_Z) & _HIGH
    bits = _trailing_zeros(letters ^ _HIGH) & ~(_EIGHT - np.uint64(1))
    kept = folded if bits == _FULL else folded & ((np.uint64(1) << bits) - np.uint64(1))
    return np.int64(bits >> _THREE), kept
