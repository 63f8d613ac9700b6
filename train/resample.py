"""Antialiased bilinear resampling of a crop, compiled: the triangle filter, widened by the scale, as PIL's BILINEAR.

Vertical pass first, over contiguous rows, which the compiler turns into SIMD; then along the one row that is left.
"""

import math

import numpy as np
from numba import njit


@njit(inline="always")
def _taps(weights: np.ndarray, begin: float, scale: float, at: int, low: int, high: int) -> tuple[int, int]:
    """Fill `weights` for output pixel `at`; return first source pixel and number of taps.

    The filter is cut at [low, high), the crop's own pixels, and its weights are normed to 1.
    """
    support = max(scale, 1.0)
    centre = begin + (at + 0.5) * scale
    first = max(low, math.floor(centre - support + 0.5))
    last = min(high, math.floor(centre + support + 0.5))
    if last <= first:
        first = min(max(low, int(centre)), high - 1)
        weights[0] = 1.0
        return first, 1
    total = 0.0
    for tap in range(last - first):
        weight = max(0.0, 1.0 - abs(first + tap + 0.5 - centre) / support)
        weights[tap] = weight
        total += weight
    for tap in range(last - first):
        weights[tap] /= total
    return first, last - first


@njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", boundscheck=False)
def resize_crop(source: np.ndarray, left: float, top: float, width: float, height: float, flip: bool, out: np.ndarray) -> None:
    """Resample the box of `source` onto all of `out`.

    Args:
        source: uint8 [H, W * 3], rows of RGB pixels.
        left, top, width, height: the box, in source pixels; may lie between pixels.
        flip: mirror left and right.
        out: uint8 [S, S, 3], written.
    """
    size = out.shape[0]
    low_x, high_x = math.floor(left), min(math.ceil(left + width), source.shape[1] // 3)
    low_y, high_y = math.floor(top), min(math.ceil(top + height), source.shape[0])
    scale_x, scale_y = width / size, height / size
    taps = 2 * math.ceil(max(scale_x, 1.0)) + 2
    firsts, counts = np.empty(size, np.int64), np.empty(size, np.int64)
    weights_x = np.empty((size, taps), np.float32)
    for x in range(size):
        firsts[x], counts[x] = _taps(weights_x[x], left, scale_x, x, low_x, high_x)
    weights_y = np.empty(2 * math.ceil(max(scale_y, 1.0)) + 2, np.float32)
    row = np.empty((high_x - low_x) * 3, np.float32)
    for y in range(size):
        first, count = _taps(weights_y, top, scale_y, y, low_y, high_y)
        row[:] = 0.0
        for tap in range(count):
            weight = weights_y[tap]
            line = source[first + tap, low_x * 3 : high_x * 3]
            for at in range(len(row)):
                row[at] += weight * line[at]
        for x in range(size):
            red = green = blue = np.float32(0.5)
            base = (firsts[x] - low_x) * 3
            for tap in range(counts[x]):
                weight = weights_x[x, tap]
                red += weight * row[base + 3 * tap]
                green += weight * row[base + 3 * tap + 1]
                blue += weight * row[base + 3 * tap + 2]
            target = size - 1 - x if flip else x
            out[y, target, 0], out[y, target, 1], out[y, target, 2] = int(red), int(green), int(blue)
