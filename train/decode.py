"""One batch, compiled: find the sample, decode its JPEG as small as the crop allows, crop, resize, copy the labels.

S image side, B batch, K label limit. No Python runs per sample; the JPEG decoder's return code is checked for each.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from train.crops import flipped, random_crop
from train.jpeg import RGB, tj_decompress, tj_error
from train.places import BAD_JPEG, BAD_LABEL, BAD_READ, OK, TABLE_BYTES, Tables, copy_labels, find, read_sample
from train.resample import resize_crop

_GREY = 128
_FATAL = 1


@njit(inline="always")
def _shrink(width: int, height: int, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which the decoder may shrink a crop that has to fill `size` pixels."""
    factor = 1
    while factor < 8 and min(width, height) >= 2 * factor * size:
        factor *= 2
    return factor


class Crops(NamedTuple):
    """How images are cropped: shares of the area, width / height, whether half are mirrored, and the seed of it all."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    seed: int


class Rows(NamedTuple):
    """A batch in memory: images uint8 [B, S, S, 3], labels int32 [B, K], positions int64 [B] of their rows among all, status uint8 [B]."""

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    status: np.ndarray


@njit(nogil=True, cache=True)
def load_rows(
    tables: Tables, samples: np.ndarray, epochs: np.ndarray, begin: int, end: int, crops: Crops, vocabulary: int, handle: int,
    scratch: np.ndarray, rows: Rows,
) -> int:  # fmt: skip
    """Fill rows [begin, end) of a batch.

    Args:
        tables: of a BetonSet.
        samples, epochs: int64 [B], what to load.
        begin, end: the rows that are this call's.
        crops: what part of each image is taken.
        vocabulary: V; a label id of V or more is an error.
        handle: TurboJPEG's, of this thread.
        scratch: uint8, any length from TABLE_BYTES; the sample's bytes are read into it, and its pixels decoded behind them.
        rows: written.

    Returns:
        0, or the bytes of scratch that the row at which it stopped needs; that row and later ones are not filled.
    """
    images, labels, status = rows.images, rows.labels, rows.status
    size, limit = images.shape[1], labels.shape[1]
    for row in range(begin, end):
        images[row] = _GREY
        labels[row] = -1
        place = find(tables, samples[row], limit, scratch)
        rows.positions[row], status[row] = place.row, place.status
        if place.status != OK:
            continue
        left, top, w, h = random_crop(place.width, place.height, crops.scale, crops.ratio, crops.seed, epochs[row], place.row)
        shrink = _shrink(w, h, size)
        pixel_width, pixel_height = (place.width + shrink - 1) // shrink, (place.height + shrink - 1) // shrink
        labels_at = TABLE_BYTES + place.bytes
        pixels_at = (labels_at + 4 * limit + 63) // 64 * 64
        needed = pixels_at + pixel_width * pixel_height * 3
        if needed > scratch.shape[0]:
            return needed
        if not read_sample(place, limit, scratch):
            status[row] = BAD_READ
            continue
        failed = tj_decompress(
            handle,
            np.uint64(scratch.ctypes.data + TABLE_BYTES),
            np.uint64(place.bytes),
            np.uint64(scratch.ctypes.data + pixels_at),
            pixel_width,
            pixel_width * 3,
            pixel_height,
            RGB,
            0,
        )
        # The decoder also returns -1 for warnings, e.g. bytes too many behind a marker; the picture is there then.
        if failed != 0 and tj_error(handle) == _FATAL:
            status[row] = BAD_JPEG
            continue
        pixels = scratch[pixels_at:needed].reshape(pixel_height, pixel_width * 3)
        mirror = crops.flip and flipped(crops.seed, epochs[row], place.row)
        resize_crop(pixels, left / shrink, top / shrink, w / shrink, h / shrink, mirror, images[row])
        if not copy_labels(scratch, labels_at, vocabulary, labels[row]):
            status[row] = BAD_LABEL
    return 0
