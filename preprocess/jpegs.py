"""What a JPEG's header says, compiled: for one image, or for all images of a shard where they lie.

Plain JPEGs, which a beton takes byte for byte, are told from all others here; the others are for preprocess/betons/images.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from labels import beton
from labels.native import njit
from labels.settings import Build, ShorterSide

MAX_SIDE = 65_500  # libjpeg's own limit
MAX_BYTES = beton.MAX_PAGE_BYTES >> 1  # of an image file: its label row has to lie on the same page
_MIN_BYTES = 4


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG's header says. `plain`: 8-bit colour of a usual coding; `exif`: it may ask for another orientation;
    `frame_at`: offset in bytes of the frame header, after which every end mark is the image's own."""

    width: int
    height: int
    plain: bool
    exif: bool
    frame_at: int


@dataclass(frozen=True)
class Scan:
    """Of N images: `plain` bool [N], taken as they are; `width`, `height` int64 [N], pixels, where `plain`."""

    plain: np.ndarray
    width: np.ndarray
    height: np.ndarray


def jpeg_header(data: bytes) -> Jpeg | None:
    """Read the markers up to the first frame; None if `data` is no JPEG or its header is damaged."""
    if len(data) < _MIN_BYTES:
        return None
    frame_at, width, height, plain, exif = _header(np.frombuffer(data, np.uint8), 0, len(data))
    return None if frame_at < 0 else Jpeg(width, height, plain, exif, frame_at)


def scan_jpegs(data: np.ndarray, places: np.ndarray, settings: Build) -> Scan:
    """Which images a beton takes byte for byte, by their headers alone.

    Args:
        data: uint8 [bytes], what the images lie in.
        places: int64 [N, 2], begin and end of each; begin -1 where there is none.
        settings: limits of pixels, what is shrunk, and whether an end mark is asked for.
    """
    shorter = settings.images.shorter_side if isinstance(settings.images, ShorterSide) else MAX_SIDE
    plain, size = np.zeros(len(places), np.bool_), np.zeros((2, len(places)), np.int64)
    _scan(data, places, settings.max_pixels, shorter, settings.decode_check != "none", plain, size)
    return Scan(plain, size[0], size[1])


@njit(nogil=True, cache=True)
def _number(data: np.ndarray, at: Any) -> Any:
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])


@njit(nogil=True, cache=True)
def _header(data: np.ndarray, begin: int, end: int) -> Any:
    """Offset of the frame header from `begin` (-1: none found), width, height, whether it is plain, whether EXIF comes before it."""
    exif = False
    if end - begin < 3 or data[begin] != 0xFF or data[begin + 1] != 0xD8 or data[begin + 2] != 0xFF:
        return np.int64(-1), np.int64(0), np.int64(0), False, exif
    at = np.int64(begin + 2)
    while at + 4 <= end:
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            at += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            if at + 10 > end:
                break
            # 8 bits, 3 components, and a coding that every decoder reads: baseline, extended or progressive Huffman
            plain = data[at + 4] == 8 and data[at + 9] == 3 and marker <= 0xC2
            return at - begin, _number(data, at + 7), _number(data, at + 5), plain, exif
        if (
            marker == 0xE1
            and at + 8 <= end
            and data[at + 4] == 0x45
            and data[at + 5] == 0x78
            and data[at + 6] == 0x69
            and data[at + 7] == 0x66
        ):
            exif = True
        at += 2 + _number(data, at + 2)
    return np.int64(-1), np.int64(0), np.int64(0), False, exif


@njit(nogil=True, cache=True)
def _has_end(data: np.ndarray, begin: int, end: int) -> bool:
    """Whether an end mark stands anywhere between; looked for from the end, where it usually is."""
    for at in range(end - 2, begin - 1, -1):  # noqa: SIM110 - numba compiles no generator
        if data[at] == 0xFF and data[at + 1] == 0xD9:
            return True
    return False


@njit(nogil=True, cache=True)
def _scan(
    data: np.ndarray, places: np.ndarray, max_pixels: int, shorter: int, needs_end: bool, plain: np.ndarray, size: np.ndarray
) -> None:
    """Fill plain bool [N] and size int64 [2, N]."""
    for row in range(len(places)):
        begin, end = places[row, 0], places[row, 1]
        if begin < 0 or end - begin > MAX_BYTES:
            continue
        frame_at, width, height, usual, exif = _header(data, begin, end)
        if frame_at < 0 or not usual or exif or width < 1 or height < 1:
            continue
        if width * height > max_pixels or max(width, height) > MAX_SIDE or min(width, height) > shorter:
            continue
        if needs_end and not _has_end(data, begin + frame_at, end):
            continue
        plain[row], size[0, row], size[1, row] = True, width, height
