"""Antialiased bicubic resampling of a crop on the CPU, compiled: PIL's BICUBIC, to the level, its 8 bits between the passes included.

The pass along rows sums groups of four neighbouring pixels, the pass across rows pairs of neighbouring rows (train/simd.py).
Nothing is allocated: all memory is a part of `work`.

S image side.
"""

import math

import numpy as np

from labels.native import njit
from train.simd import COLUMNS, OVERREAD, PAIR, TAPS, WEIGHT_BITS, WEIGHT_OFFSETS, column_sum, copy_bytes, pixel_sum

_A = -0.5  # of PIL's cubic


@njit(inline="always")
def _cubic(x: float) -> float:
    """Cubic convolution (Keys, 1981) with a = -1/2."""
    x = min(abs(x), 2.0)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * _A  # 0 at 2


@njit(inline="always")
def vertical_first(width: float, height: float, size: int) -> bool:
    """Whether the columns of a crop are resampled before its rows: Pillow's choice, since its version 13."""
    return height - size > max(0.0, 2.0 * (width - size))


@njit(inline="always")
def _steps(scale: float, taps: int) -> int:
    """Steps of `taps` source pixels that hold the filter: 2 pixels to each side, widened by the scale."""
    return math.ceil(math.ceil(4.0 * max(scale, 1.0)) / taps)


@njit(inline="always")
def _taps(begin: float, scale: float, at: int, extent: int, weights: np.ndarray) -> int:
    """Fill `weights`, float32 [T], for output pixel `at`; return the first source pixel.

    The crop begins at `begin`, which may lie between two source pixels; the filter is cut at [0, extent), its weights normed to 1.
    """
    widen = max(scale, 1.0)
    centre = begin + (at + 0.5) * scale
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
    source: np.ndarray, pitch: int, rows: int, columns: int, begin: float, scale: float, flip: bool, size: int, out: np.ndarray,
    out_pitch: int, work: np.ndarray,
) -> None:  # fmt: skip
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
            at = tap // TAPS * 16 + WEIGHT_OFFSETS[tap % TAPS]
            fixed[to, at] = fixed[to, at + 2] = fixed[to, at + 4] = _fixed(weights[tap])
    line, other_line, weights_at = address_of(lines[0]), address_of(lines[1]), address_of(fixed)
    data, target = address_of(source), address_of(out)
    for y in range(0, rows, 2):
        row = data + y * pitch
        other = row + pitch if y + 1 < rows else row
        # With a constant number of groups the sum is unrolled: one and two are nearly all there are.
        if groups == 1:
            for x in range(size):
                pixel_sum(row + firsts[x], other + firsts[x], weights_at + 32 * x, 1, line + 3 * x, other_line + 3 * x)
        elif groups == 2:
            for x in range(size):
                pixel_sum(row + firsts[x], other + firsts[x], weights_at + 64 * x, 2, line + 3 * x, other_line + 3 * x)
        else:
            for x in range(size):
                pixel_sum(row + firsts[x], other + firsts[x], weights_at + 32 * groups * x, groups, line + 3 * x, other_line + 3 * x)
        copy_bytes(target + y * out_pitch, line, width)
        if y + 1 < rows:
            copy_bytes(target + (y + 1) * out_pitch, other_line, width)


@njit(inline="always")
def _across_rows(
    source: np.ndarray, pitch: int, rows: int, width: int, begin: float, scale: float, size: int, out: np.ndarray, out_pitch: int,
    work: np.ndarray,
) -> None:  # fmt: skip
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
    source: np.ndarray, pitch: int, rows: int, columns: int, x: float, y: float, width: float, height: float, flip: bool, size: int,
    out: np.ndarray, out_pitch: int, work: np.ndarray,
) -> None:  # fmt: skip
    """Resample a box of a picture, as PIL's `resize((S, S), BICUBIC, box)` does.

    Args:
        source: uint8, the picture's RGB bytes and `margin_bytes` behind them.
        pitch: bytes from row to row.
        rows, columns: the picture, in pixels.
        x, y, width, height: the box, in pixels of the picture; may lie between them.
        flip: mirror left and right.
        size: S.
        out, out_pitch: uint8, written: S rows of 3 S bytes, `out_pitch` bytes apart.
        work: uint8 [work_bytes], aligned to 4 bytes.
    """
    between_pitch, between_bytes = _between(rows, columns, width, height, size)
    between, work = work[:between_bytes], work[between_bytes:]
    if vertical_first(width, height, size):
        _across_rows(source, pitch, rows, 3 * columns, y, height / size, size, between, between_pitch, work)
        _along_rows(between, between_pitch, size, columns, x, width / size, flip, size, out, out_pitch, work)
    else:
        _along_rows(source, pitch, rows, columns, x, width / size, flip, size, between, between_pitch, work)
        _across_rows(between, between_pitch, rows, 3 * size, y, height / size, size, out, out_pitch, work)
