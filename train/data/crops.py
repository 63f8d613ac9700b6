"""Which part of an image is taken: random resized crops from a counter-based generator, and the central square.

A sample's crop depends on (seed, epoch, index) alone: not on threads, ranks or restarts.
"""

import math

import numpy as np

from labels.native import GOLDEN, mix, njit

_U = np.uint64


@njit(inline="always")
def uniform(seed: int, epoch: int, index: int, draw: int) -> float:
    """Draw number `draw` of a sample: float64 in [0, 1)."""
    key = mix(_U(seed) + GOLDEN)
    key = mix(key ^ (_U(epoch) * _U(0xD1342543DE82EF95) + _U(1)))
    key = mix(key ^ (_U(index) * _U(0xA24BAED4963EE407) + _U(2)))
    key = mix(key + _U(draw) * GOLDEN)
    return np.float64(key >> _U(11)) / 9007199254740992.0


@njit
def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (torchvision's rule: ten tries of area and aspect, then the centre).

    Args:
        width, height: the image, in pixels.
        scale: share of the area, low and high.
        ratio: width / height, low and high.
        seed, epoch, index: what the draw depends on.

    Returns:
        left, top, width, height in pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for trial in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, index, 4 * trial))
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, index, 4 * trial + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(uniform(seed, epoch, index, 4 * trial + 2) * (width - w + 1))
            top = int(uniform(seed, epoch, index, 4 * trial + 3) * (height - h + 1))
            return left, top, w, h
    if width < ratio[0] * height:
        w, h = width, min(height, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w, h = min(width, round(height * ratio[1])), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@njit
def flipped(seed: int, epoch: int, index: int) -> bool:
    """Whether a sample is mirrored in this epoch: one half of all are."""
    return uniform(seed, epoch, index, 40) < 0.5
