"""Weighted sums of 8-bit pixels, written for LLVM's vectors: what loops over bytes and changing offsets do not become by themselves.

Both functions multiply neighbours in pairs and add the two products, which is one instruction on x86 (pmaddwd) and a few elsewhere.
Weights are int16, fixed point with `WEIGHT_BITS` of fraction: a cubic's stay below 2. Sums are rounded and cut to 0..255.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WEIGHT_BITS = 14
TAPS = 4
"""Neighbouring pixels that `pixel_sum` takes at once, a group."""
PAIR = 2
"""Neighbouring rows that `column_sum` takes at once."""
COLUMNS = 16
"""Bytes that `column_sum` writes."""
OVERREAD = 64
"""Bytes beyond a row that may be read (they weigh nothing), and that rows to be written need beside their pixels."""

# From 4 RGB pixels in 12 bytes to pairs of neighbours by channel, R0 R1 G0 G1 B0 B1 - - R2 R3 G2 G3 B2 B3 - -, each with a zero
# (number 16) behind it, which makes 16 bits of 8.
_PAIRS = tuple(byte for at in (0, 3, 1, 4, 2, 5, 16, 16, 6, 9, 7, 10, 8, 11, 16, 16) for byte in (at, 16))
WEIGHT_OFFSETS = (0, 1, 8, 9)
"""Where the weight of each tap of a group stands among its 16, first for red; green and blue follow, 2 and 4 further."""

# void* memcpy(void* to, const void* from, size_t bytes): loops over computed offsets stay loops
copy_bytes = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


def _vector(bits: int, length: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), length)


def _numbers(*values: int) -> ir.Constant:
    return ir.Constant(_vector(32, len(values)), values)


def _load(builder: Any, address: Any, kind: ir.VectorType) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def _step(builder: Any, address: Any, number: Any, bytes_each: Any) -> Any:
    return builder.add(address, builder.mul(number, bytes_each))


def _multiply_add(builder: Any, pixels: Any, weights: Any) -> Any:
    """Two times int16 [2 n] -> int32 [n]: products of neighbours, added."""
    length = pixels.type.count
    products = builder.mul(builder.sext(pixels, _vector(32, length)), builder.sext(weights, _vector(32, length)))
    even, odd = (builder.shuffle_vector(products, products, _numbers(*range(first, length, 2))) for first in (0, 1))
    return builder.add(even, odd)


def _rounded(builder: Any, sums: Any) -> Any:
    """Weighted sums as bytes."""
    length = sums.type.count
    value = builder.ashr(builder.add(sums, _numbers(*[1 << (WEIGHT_BITS - 1)] * length)), _numbers(*[WEIGHT_BITS] * length))
    for limit, predicate in ((_numbers(*[0] * length), ">"), (_numbers(*[255] * length), "<")):
        value = builder.select(builder.icmp_signed(predicate, value, limit), value, limit)
    return builder.trunc(value, _vector(8, length))


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _pixel_sum(typing_context, source, other_source, weights, groups, target, other_target) -> Any:
    """The pixel at the same place of two rows, each from `groups` groups of neighbours in its row.

    All but `groups` are addresses: sources of RGB bytes, `weights` of int16 [groups, 16], see WEIGHT_OFFSETS, targets of 4 bytes, the
    last of which is overwritten with 0.
    """
    address = types.int64
    signature = types.void(address, address, address, types.intp, address, address)

    def generate(context, builder, sig, arguments):  # noqa: ANN202
        *sources, weights, groups, target, other_target = arguments
        sums = [cgutils.alloca_once_value(builder, _numbers(*[0] * 8)) for _ in sources]
        with cgutils.for_range(builder, groups) as loop:
            factors = _load(builder, _step(builder, weights, loop.index, ir.Constant(groups.type, 32)), _vector(16, 16))
            for source, total in zip(sources, sums, strict=True):
                pixels = _load(builder, _step(builder, source, loop.index, ir.Constant(groups.type, 3 * TAPS)), _vector(8, 16))
                pairs = builder.shuffle_vector(pixels, ir.Constant(pixels.type, [0] * 16), _numbers(*_PAIRS))
                pairs = builder.bitcast(pairs, _vector(16, 16))
                builder.store(builder.add(builder.load(total), _multiply_add(builder, pairs, factors)), total)
        first, second = map(builder.load, sums)
        low, high = (builder.shuffle_vector(first, second, _numbers(*half, *(at + 8 for at in half))) for half in (range(4), range(4, 8)))
        rounded = _rounded(builder, builder.add(low, high))
        for half, address in ((range(4), target), (range(4, 8), other_target)):
            _store(builder, builder.shuffle_vector(rounded, rounded, _numbers(*half)), address)
        return context.get_dummy_value()

    return signature, generate


def _column_sum(typing_context, source, pitch, weights, pairs, target) -> Any:
    """16 neighbouring bytes from `pairs` pairs of rows, `pitch` bytes apart.

    `source`, `weights` and `target` are addresses: of the first row, of int16 [pairs, 2] and of 16 bytes.
    """
    signature = types.void(types.int64, types.intp, types.int64, types.intp, types.int64)
    half = COLUMNS // 2
    interleaved = [[row * COLUMNS + column for column in range(first, first + half) for row in range(PAIR)] for first in (0, half)]

    def generate(context, builder, sig, arguments):  # noqa: ANN202
        source, pitch, weights, pairs, target = arguments
        halves = [cgutils.alloca_once_value(builder, _numbers(*[0] * half)) for _ in interleaved]
        with cgutils.for_range(builder, pairs) as loop:
            first = _step(builder, source, loop.index, builder.mul(pitch, ir.Constant(pitch.type, PAIR)))
            rows = [_load(builder, address, _vector(8, COLUMNS)) for address in (first, builder.add(first, pitch))]
            pair = _load(builder, _step(builder, weights, loop.index, ir.Constant(pitch.type, 4)), _vector(16, PAIR))
            factors = builder.shuffle_vector(pair, pair, _numbers(*[0, 1] * half))
            for sums, order in zip(halves, interleaved, strict=True):
                pixels = builder.zext(builder.shuffle_vector(*rows, _numbers(*order)), _vector(16, COLUMNS))
                builder.store(builder.add(builder.load(sums), _multiply_add(builder, pixels, factors)), sums)
        _store(builder, _rounded(builder, builder.shuffle_vector(*map(builder.load, halves), _numbers(*range(COLUMNS)))), target)
        return context.get_dummy_value()

    return signature, generate


pixel_sum: Any = intrinsic(_pixel_sum)
column_sum: Any = intrinsic(_column_sum)
