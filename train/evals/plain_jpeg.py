"""Plain JPEGs -> pixels, compiled and without the interpreter's lock: what Pillow gives, within two levels, at a third of the time.

Everything that is not a healthy JPEG in grey or YCbCr is left to Pillow (pixels.py), from which the words of a fault come.

S image side.
"""

import math
import threading

import numpy as np

from labels.native import Decompressor, njit, tj_error, tj_header
from train.data.crops import flipped, random_crop
from train.evals.pixels import CROP_RATIO, CROP_SCALE
from train.pixels import BOX, DONE, Crops, Window, decode_row, shrink_to_fill, shrunk

_UNFIT = -2
_MOST_PIXELS = 89_478_485  # Pillow warns beyond
_YCBCR, _GREY = 1, 2  # TJCS
_WARNING = 0
_CUBIC_REACH = 2.0


@njit
def _window(width: int, height: int, side: int, centre: bool, seed: int, epoch: int, index: int) -> Window:
    """The part of an image that Pillow's `resize((S, S), BICUBIC, box)` reads, and the box in it; shrunk by the decoder as `draft` does."""
    flip, shrink = False, 1
    if centre:
        shrink = shrink_to_fill(width, height, 2 * side)
        width, height = shrunk(width, shrink), shrunk(height, shrink)
        w = h = min(width, height)
        x, y = (width - w) / 2, (height - h) / 2
    else:
        left, top, w, h = random_crop(width, height, CROP_SCALE, CROP_RATIO, seed, epoch, index)
        x, y = float(left), float(top)
        flip = flipped(seed, epoch, index)
    across, down = _CUBIC_REACH * max(1.0, w / side), _CUBIC_REACH * max(1.0, h / side)
    first_column, first_row = max(0, math.floor(x - across)), max(0, math.floor(y - down))
    columns = min(width, math.ceil(x + w + across)) - first_column
    rows = min(height, math.ceil(y + h + down)) - first_row
    return Window(shrink, first_column, first_row, columns, rows, x - first_column, y - first_row, float(w), float(h), flip)


@njit(nogil=True, cache=True)
def _decode_plain(
    encoded: np.ndarray, side: int, centre: bool, seed: int, epoch: int, index: int, handle: int, scratch: np.ndarray, image: np.ndarray
) -> int:
    """Fill `image`, uint8 [S, S, 3]; DONE, _UNFIT, or the bytes of scratch that are needed."""
    header, box = np.empty(4, np.int32), np.empty(BOX, np.float32)
    address, size, at = encoded.ctypes.data, len(encoded), header.ctypes.data
    if tj_header(handle, address, np.uint64(size), at, at + 4, at + 8, at + 12) != 0:
        return _UNFIT
    width, height = int(header[0]), int(header[1])
    if header[3] not in (_YCBCR, _GREY) or width * height > _MOST_PIXELS:
        return _UNFIT
    crops = Crops((1.0, 1.0), (1.0, 1.0), False, 0, side, centre, False)
    window = _window(width, height, side, centre, seed, epoch, index)
    found = decode_row(address, size, width, height, window, crops, handle, scratch, image, box)
    if found == DONE and tj_error(handle) == _WARNING:  # e.g. cut short: Pillow says what it thinks of it
        return _UNFIT
    return found if found >= DONE else _UNFIT


class _OfThread(threading.local):
    """What each thread decodes with: a TurboJPEG handle, and memory that grows with the largest image."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(1 << 20, np.uint8)


_own = _OfThread()


def decode_plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """Pixels, uint8 [S, S, 3], of a JPEG; None where Pillow has to decide.

    Args:
        side: S.
        crop: None for the central crop, or (seed, epoch, index) of a random resized crop with its flip.

    Raises:
        UserError: libturbojpeg is not installed.
    """
    own, image = _own, np.empty((side, side, 3), np.uint8)
    data, draw = np.frombuffer(encoded, np.uint8), crop or (0, 0, 0)
    while True:
        found = _decode_plain(data, side, crop is None, *draw, own.decompressor.handle, own.scratch, image)
        if found <= DONE:
            return image if found == DONE else None
        own.scratch = np.empty(found + found // 4, np.uint8)
