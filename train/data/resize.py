"""Resampling of a crop on the CPU, compiled: PIL's antialiased bicubic, exactly, with 8 bits between the passes.

    resize_crop: RGB bytes, a box -> _along_rows (pixel_sum), _across_rows (column_sum), in Pillow 13's order -> S x S

The pass along rows sums groups of four neighbouring pixels, the pass across rows pairs of neighbouring rows. Both sums
are written for LLVM's vectors, which loops over bytes and changing offsets do not become by themselves: they multiply
neighbours in pairs and add the two products, one instruction on x86 (pmaddwd) and a few elsewhere. So the cubic is as
cheap as a triangle filter. Nothing is allocated: all memory is a part of `work`. S image side.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from labels.native import njit

WEIGHT_BITS = 14  # fraction of the int16 weights: a cubic's stay below 2; sums are rounded and cut to 0..255
TAPS = 4  # neighbouring pixels that `pixel_sum` takes at once, a group
PAIR = 2  # neighbouring rows that `column_sum` takes at once
COLUMNS = 16  # bytes that `column_sum` writes
OVERREAD = 64  # bytes beyond a row that may be read, with weight 0; rows that are written need as many
_A = -0.5  # of PIL's cubic

# From 4 RGB pixels in 12 bytes to pairs of neighbours by channel, R0 R1 G0 G1 B0 B1 - - R2 R3 G2 G3 B2 B3 - -, each
# with a zero (number 16) behind it, which makes 16 bits of 8.
_PAIRS = tuple(byte for number in (0, 3, 1, 4, 2, 5, 16, 16, 6, 9, 7, 10, 8, 11, 16, 16) for byte in (number, 16))
# Indices of the weights of a group's taps among its 16, for red; those of green and blue are 2 and 4 higher.
WEIGHT_OFFSETS = (0, 1, 8, 9)

# void* memcpy(void* to, const void* from, size_t bytes): LLVM does not make it from loops over computed offsets
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
    value = builder.add(sums, _numbers(*[1 << (WEIGHT_BITS - 1)] * length))
    value = builder.ashr(value, _numbers(*[WEIGHT_BITS] * length))
    for limit, predicate in ((_numbers(*[0] * length), ">"), (_numbers(*[255] * length), "<")):
        value = builder.select(builder.icmp_signed(predicate, value, limit), value, limit)
    return builder.trunc(value, _vector(8, length))


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _pixel_sum(typing_context, source, other_source, weights, groups, target, other_target) -> Any:
    """The pixel of one column in two rows, each from `groups` groups of neighbours in its row.

    All but `groups` are addresses: sources of RGB bytes, `weights` of int16 [groups, 16], see WEIGHT_OFFSETS, targets
    of 4 bytes, the last of which is overwritten with 0.
    """
    address = types.int64
    signature = types.void(address, address, address, types.intp, address, address)

    def generate(context, builder, sig, arguments):  # noqa: ANN202
        *sources, weights, groups, target, other_target = arguments
        sums = [cgutils.alloca_once_value(builder, _numbers(*[0] * 8)) for _ in sources]
        with cgutils.for_range(builder, groups) as loop:
            factors = _load(builder, _step(builder, weights, loop.index, ir.Constant(groups.type, 32)), _vector(16, 16))
            for source, total in zip(sources, sums, strict=True):
                group = _step(builder, source, loop.index, ir.Constant(groups.type, 3 * TAPS))
                pixels = _load(builder, group, _vector(8, 16))
                pairs = builder.shuffle_vector(pixels, ir.Constant(pixels.type, [0] * 16), _numbers(*_PAIRS))
                pairs = builder.bitcast(pairs, _vector(16, 16))
                builder.store(builder.add(builder.load(total), _multiply_add(builder, pairs, factors)), total)
        first, second = map(builder.load, sums)
        halves = [_numbers(*range(begin, begin + 4), *range(begin + 8, begin + 12)) for begin in (0, 4)]
        low, high = (builder.shuffle_vector(first, second, half) for half in halves)
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
    interleaved = [
        [row * COLUMNS + column for column in range(first, first + half) for row in range(PAIR)] for first in (0, half)
    ]

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
        sums = builder.shuffle_vector(*map(builder.load, halves), _numbers(*range(COLUMNS)))
        _store(builder, _rounded(builder, sums), target)
        return context.get_dummy_value()

    return signature, generate


pixel_sum: Any = intrinsic(_pixel_sum)
column_sum: Any = intrinsic(_column_sum)


@njit(inline="always")
def _cubic(x: float) -> float:
    """Cubic convolution (Keys, 1981) with a = -1/2."""
    x = min(abs(x), 2.0)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * _A  # 0 at 2


@njit(inline="always")
def vertical_first(width: float, height: float, size: int) -> bool:
    """Whether the columns of a crop are resampled before its rows: the choice of Pillow from version 13 on."""
    return height - size > max(0.0, 2.0 * (width - size))


@njit(inline="always")
def _steps(scale: float, taps: int) -> int:
    """Steps of `taps` source pixels that hold the filter: 2 pixels to each side, widened by the scale."""
    return math.ceil(math.ceil(4.0 * max(scale, 1.0)) / taps)


@njit(inline="always")
def _taps(begin: float, scale: float, pixel: int, extent: int, weights: np.ndarray) -> int:
    """Fill `weights`, float32 [T], for an output pixel; return the first source pixel.

    `begin` of the crop may be between two source pixels; the filter is cut at [0, extent), its weights normed to 1.
    """
    widen = max(scale, 1.0)
    centre = begin + (pixel + 0.5) * scale
    first = max(0, math.floor(centre - 2.0 * widen + 0.5))
    last = min(extent, math.floor(centre + 2.0 * widen + 0.5))
    total, narrow = 0.0, 1.0 / widen
    for tap in range(len(weights)):
        weight = _cubic((first + tap + 0.5 - centre) * narrow) if first + tap < last else 0.0
        weights[tap] = weight
        total += weight
    norm = 1.0 / total
    for tap in range(len(weights)):
        weights[tap] *= norm
    return first


@njit(inline="always")
def _fixed(weight: float) -> np.int16:
    return np.int16(round(weight * (1 << WEIGHT_BITS)))


@njit(inline="always")
def address_of(array: np.ndarray) -> np.int64:
    """Signed: numba makes a float of the sum of an unsigned and a signed integer."""
    return np.int64(array.ctypes.data)


@njit(inline="always")
def _along_rows(
    source: np.ndarray,
    pitch: int,
    rows: int,
    columns: int,
    begin: float,
    scale: float,
    flip: bool,
    size: int,
    out: np.ndarray,
    out_pitch: int,
    work: np.ndarray,
) -> None:
    """Resample `rows` rows of `columns` pixels, `pitch` bytes apart, to as many rows of S pixels."""
    groups, width = _steps(scale, TAPS), 3 * size
    firsts, work = work[: 4 * size].view(np.int32), work[4 * size :]
    fixed, work = work[: 32 * groups * size].view(np.int16).reshape(size, 16 * groups), work[32 * groups * size :]
    weights, work = work[: 4 * TAPS * groups].view(np.float32), work[4 * TAPS * groups :]
    lines = work[: 2 * (width + OVERREAD)].reshape(2, width + OVERREAD)
    for x in range(size):
        to = size - 1 - x if flip else x
        firsts[to] = 3 * _taps(begin, scale, x, columns, weights)
        for tap in range(TAPS * groups):
            red = tap // TAPS * 16 + WEIGHT_OFFSETS[tap % TAPS]
            fixed[to, red] = fixed[to, red + 2] = fixed[to, red + 4] = _fixed(weights[tap])
    line, next_line, weights_at = address_of(lines[0]), address_of(lines[1]), address_of(fixed)
    data, target = address_of(source), address_of(out)
    for y in range(0, rows, 2):
        row = data + y * pitch
        next_row = row + pitch if y + 1 < rows else row
        # A constant number of groups unrolls the sum: nearly all crops have one or two.
        if groups == 1:
            for x in range(size):
                pixel_sum(
                    row + firsts[x], next_row + firsts[x], weights_at + 32 * x, 1, line + 3 * x, next_line + 3 * x
                )
        elif groups == 2:
            for x in range(size):
                pixel_sum(
                    row + firsts[x], next_row + firsts[x], weights_at + 64 * x, 2, line + 3 * x, next_line + 3 * x
                )
        else:
            for x in range(size):
                first, weight_row = firsts[x], weights_at + 32 * groups * x
                pixel_sum(row + first, next_row + first, weight_row, groups, line + 3 * x, next_line + 3 * x)
        copy_bytes(target + y * out_pitch, line, width)
        if y + 1 < rows:
            copy_bytes(target + (y + 1) * out_pitch, next_line, width)


@njit(inline="always")
def _across_rows(
    source: np.ndarray,
    pitch: int,
    rows: int,
    width: int,
    begin: float,
    scale: float,
    size: int,
    out: np.ndarray,
    out_pitch: int,
    work: np.ndarray,
) -> None:
    """Resample the columns of `rows` rows of `width` bytes, `pitch` bytes apart, to S rows."""
    pairs = _steps(scale, PAIR)
    weights, fixed = work[: 8 * pairs].view(np.float32), work[8 * pairs : 12 * pairs].view(np.int16)
    line = work[12 * pairs :][: width + OVERREAD]
    target, weights_at, data = address_of(line), address_of(fixed), address_of(source)
    for y in range(size):
        row = data + _taps(begin, scale, y, rows, weights) * pitch
        for tap in range(PAIR * pairs):
            fixed[tap] = _fixed(weights[tap])
        if pairs == 2:
            for x in range(0, width, COLUMNS):
                column_sum(row + x, pitch, weights_at, 2, target + x)
        elif pairs == 3:
            for x in range(0, width, COLUMNS):
                column_sum(row + x, pitch, weights_at, 3, target + x)
        else:
            for x in range(0, width, COLUMNS):
                column_sum(row + x, pitch, weights_at, pairs, target + x)
        copy_bytes(address_of(out) + y * out_pitch, target, width)


@njit(inline="always")
def margin_bytes(pitch: int, height: float, size: int) -> int:
    """Bytes behind a source that `resize_crop` may read; they weigh nothing."""
    return PAIR * _steps(height / size, PAIR) * pitch + OVERREAD


@njit(inline="always")
def aligned(count: int) -> int:
    """The next multiple of 64."""
    return (count + 63) // 64 * 64


@njit(inline="always")
def _between(rows: int, columns: int, width: float, height: float, size: int) -> tuple[int, int]:
    """Of the picture between the passes: the bytes from row to row, and all."""
    if vertical_first(width, height, size):
        return 3 * columns, aligned(size * 3 * columns + OVERREAD)
    pitch = aligned(3 * size)
    return pitch, aligned(rows * pitch + margin_bytes(pitch, height, size))


@njit
def work_bytes(rows: int, columns: int, width: float, height: float, size: int) -> int:
    """Bytes of `work` that `resize_crop` needs."""
    tables = 4 * size + (32 * size + 4 * TAPS) * _steps(width / size, TAPS) + 12 * _steps(height / size, PAIR)
    return _between(rows, columns, width, height, size)[1] + tables + 6 * max(size, columns) + 2 * OVERREAD


@njit(error_model="numpy", boundscheck=False)
def resize_crop(
    source: np.ndarray,
    pitch: int,
    rows: int,
    columns: int,
    x: float,
    y: float,
    width: float,
    height: float,
    flip: bool,
    size: int,
    out: np.ndarray,
    out_pitch: int,
    work: np.ndarray,
) -> None:
    """Resample a box of a picture, as PIL's `resize((S, S), BICUBIC, box)` does.

    source: uint8, the picture's RGB bytes, rows `pitch` bytes apart, and `margin_bytes` behind them. rows, columns: the
    picture; x, y, width, height: the box, both in pixels, the box also between them. out uint8: S rows of 3 S bytes are
    written, `out_pitch` bytes apart. work: uint8 [work_bytes], aligned to 4 bytes. flip mirrors left and right.
    """
    between_pitch, between_bytes = _between(rows, columns, width, height, size)
    between, work = work[:between_bytes], work[between_bytes:]
    if vertical_first(width, height, size):
        _across_rows(source, pitch, rows, 3 * columns, y, height / size, size, between, between_pitch, work)
        _along_rows(between, between_pitch, size, columns, x, width / size, flip, size, out, out_pitch, work)
    else:
        _along_rows(source, pitch, rows, columns, x, width / size, flip, size, between, between_pitch, work)
        _across_rows(between, between_pitch, rows, 3 * size, y, height / size, size, out, out_pitch, work)
