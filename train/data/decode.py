"""One batch, compiled: find each sample, read it, decode the part of its image that is needed, copy its labels.

    host:    JPEG -> pixels of the decoder, shrunk by 1, 2, 4 or 8 -> train/data/resize.py -> S x S
    device:  JPEG -> the same pixels, into the batch's canvas: the whole image where it fits, else the crop alone;
             train/data/inputs.py resamples them on the device

libturbojpeg is called directly, by symbol name: its return code is checked, it can shrink while it decodes, and numba
can cache the code. FFCV's wrapper ignores the return code; CUDA's decoder takes Python calls per sample and cannot
shrink. B batch, S image side, K label limit, H x W canvas.
"""

import math
from typing import NamedTuple

import numpy as np

from labels.native import RGB, njit, tj_decompress, tj_error
from train.data.image_index import (
    BAD_JPEG,
    BAD_LABEL,
    BAD_READ,
    OK,
    TABLE_BYTES,
    Tables,
    copy_labels,
    find_sample,
    read_sample,
)
from train.data.order import flipped, random_crop
from train.data.resize import address_of, aligned, copy_bytes, margin_bytes, resize_crop, work_bytes

_GREY = 128
_CANVAS_STEP = 16  # few sizes, so that memory is reused
DONE, DAMAGED = 0, -1
# A box: x, y, width, height of the crop in pixels of its canvas; left, top, columns, rows of what the filter sees;
# 1 if mirrored.
BOX = 9
# In S: larger crops (huge images, very narrow crops) are resampled on the host: one would set the size of the canvas.
_LARGEST_CANVAS = 3
_REACH = 2.0  # of the cubic, in output pixels
_FATAL = 1


class Crops(NamedTuple):
    """Which part of each image is taken, and who resamples it: a random crop, or with `centre` the central square."""

    scale: tuple[float, float]  # of a random crop: range of its share of the area
    ratio: tuple[float, float]  # range of width / height
    flip: bool  # mirror half
    seed: int
    size: int  # S
    centre: bool  # the shorter side becomes S
    device: bool  # leave the decoder's pixels to the device


class Window(NamedTuple):
    """The needed pixels of a shrunk image, and the crop's box among them."""

    shrink: int
    left: int
    top: int
    columns: int
    rows: int
    x: float
    y: float
    width: float
    height: float
    flip: bool


class Rows(NamedTuple):
    """A batch in memory."""

    images: np.ndarray  # uint8 [B, H, W, 3]: S x S, or for the device as many as the largest crop needs
    boxes: np.ndarray  # float32 [B, BOX]: how they become S x S
    labels: np.ndarray  # int32 [B, K]
    positions: np.ndarray  # int64 [B]: of their rows among all
    status: np.ndarray  # uint8 [B], train/data/image_index.py


@njit(inline="always")
def shrink_to_fill(width: int, height: int, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which the decoder may shrink a crop that has to fill `size` pixels."""
    factor = 1
    while factor < 8 and min(width, height) >= 2 * factor * size:
        factor *= 2
    return factor


@njit(inline="always")
def shrunk(side: int, factor: int) -> int:
    """Pixels of a side that the decoder shrinks."""
    return (side + factor - 1) // factor


@njit
def window_of(width: int, height: int, crops: Crops, epoch: int, index: int) -> Window:
    """The pixels needed of an image of width x height, for its sample's row `index` in `epoch`.

    The filter of a random crop sees the crop alone, as after PIL's `crop`. That of a centre crop also sees its
    surroundings, as in PIL's `resize` of the whole image, which the decoder shrinks to no less than 2 S.
    """
    flip, reach = False, 0.0
    if crops.centre:
        w = h = min(width, height)
        left, top = (width - w) / 2, (height - h) / 2
        shrink = shrink_to_fill(w, h, 2 * crops.size)
        reach = _REACH * max(1.0, w / shrink / crops.size)
    else:
        left, top, w, h = random_crop(width, height, crops.scale, crops.ratio, crops.seed, epoch, index)
        shrink = shrink_to_fill(w, h, crops.size)
        flip = crops.flip and flipped(crops.seed, epoch, index)
    x, y, crop_width, crop_height = left / shrink, top / shrink, w / shrink, h / shrink
    first_column, first_row = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
    columns = min(shrunk(width, shrink), math.ceil(x + crop_width + reach)) - first_column
    rows = min(shrunk(height, shrink), math.ceil(y + crop_height + reach)) - first_row
    return Window(
        shrink, first_column, first_row, columns, rows, x - first_column, y - first_row, crop_width, crop_height, flip
    )


@njit(inline="always")
def fits_canvas(window: Window, crops: Crops) -> bool:
    """Whether the window's pixels go to the device as they are."""
    return crops.device and max(window.columns, window.rows) <= _LARGEST_CANVAS * crops.size


@njit(inline="always")
def decompress(address: int, size: int, columns: int, rows: int, handle: int, pixels: np.ndarray, pitch: int) -> bool:
    """Decode a JPEG, shrunk to columns x rows pixels, into `pixels` uint8, rows `pitch` bytes apart; False: damaged."""
    target = np.uint64(pixels.ctypes.data)
    failed = tj_decompress(handle, np.uint64(address), np.uint64(size), target, columns, pitch, rows, RGB, 0)
    # The decoder also returns -1 for warnings, e.g. superfluous bytes after a marker; the image is decoded then.
    return failed == 0 or tj_error(handle) != _FATAL


@njit
def decode_row(
    address: int,
    size: int,
    width: int,
    height: int,
    window: Window,
    crops: Crops,
    handle: int,
    scratch: np.ndarray,
    image: np.ndarray,
    box: np.ndarray,
) -> int:
    """Decode one JPEG of `size` bytes at `address`, of width x height pixels.

    `window` was made with `crops`; `handle` is TurboJPEG's, of this thread; `scratch` uint8 is aligned to 4 bytes. It
    writes `image` uint8 [H, W, 3], and `box` float32 [BOX], how its pixels become S x S. Returns DONE, DAMAGED if the
    JPEG does not decode, or the bytes of scratch that are needed.
    """
    side, shrink = crops.size, window.shrink
    pixel_width, pixel_height = shrunk(width, shrink), shrunk(height, shrink)
    on_canvas = fits_canvas(window, crops)
    if on_canvas and pixel_height <= image.shape[0] and pixel_width <= image.shape[1]:
        if not decompress(address, size, pixel_width, pixel_height, handle, image.reshape(-1), 3 * image.shape[1]):
            return DAMAGED
        box[0], box[1], box[2], box[3] = window.left + window.x, window.top + window.y, window.width, window.height
        box[4], box[5], box[6], box[7], box[8] = window.left, window.top, window.columns, window.rows, window.flip
        return DONE
    pitch = 3 * pixel_width
    at_work = aligned(pixel_height * pitch + margin_bytes(pitch, window.height, side))
    needed = at_work + work_bytes(window.rows, window.columns, window.width, window.height, side)
    if needed > scratch.shape[0]:
        return needed
    if not decompress(address, size, pixel_width, pixel_height, handle, scratch, pitch):
        return DAMAGED
    source = scratch[window.top * pitch + 3 * window.left :]
    target, target_pitch = image.reshape(-1), 3 * image.shape[1]
    if on_canvas:
        for row in range(window.rows):
            copy_bytes(address_of(target) + row * target_pitch, address_of(source) + row * pitch, 3 * window.columns)
        box[0], box[1], box[2], box[3] = window.x, window.y, window.width, window.height
        box[4], box[5], box[6], box[7], box[8] = 0.0, 0.0, window.columns, window.rows, window.flip
    else:
        x, y, w, h = window.x, window.y, window.width, window.height
        rows, columns, work = window.rows, window.columns, scratch[at_work:]
        resize_crop(source, pitch, rows, columns, x, y, w, h, window.flip, side, target, target_pitch, work)
        box[:], box[2:4], box[6:8] = 0.0, side, side  # S x S pixels that are final already
    return DONE


@njit(nogil=True, cache=True)
def canvas_shape(
    tables: Tables, samples: np.ndarray, epochs: np.ndarray, limit: int, crops: Crops, scratch: np.ndarray
) -> tuple[int, int]:
    """Rows and columns in pixels of the smallest canvas for all images of a batch, from the tables alone."""
    rows = columns = crops.size
    for row in range(len(samples)):
        span = find_sample(tables, samples[row], limit, scratch)
        if span.status == OK:
            window = window_of(span.width, span.height, crops, epochs[row], span.row)
            if fits_canvas(window, crops):
                rows, columns = max(rows, window.rows), max(columns, window.columns)
    return -(-rows // _CANVAS_STEP) * _CANVAS_STEP, -(-columns // _CANVAS_STEP) * _CANVAS_STEP


@njit
def _exclude(image: np.ndarray, box: np.ndarray, labels: np.ndarray) -> None:
    """Make a sample grey and unlabelled, so that it is not in the loss."""
    image.reshape(-1)[:] = _GREY
    labels[:] = -1
    box[:] = 0.0
    box[2] = box[6] = image.shape[1]
    box[3] = box[7] = image.shape[0]


@njit(nogil=True, cache=True)
def load_rows(
    tables: Tables,
    samples: np.ndarray,
    epochs: np.ndarray,
    begin: int,
    end: int,
    crops: Crops,
    vocabulary: int,
    handle: int,
    scratch: np.ndarray,
    rows: Rows,
) -> int:
    """Fill rows [begin, end) of a batch with `samples` of `epochs`, int64 [B].

    Label ids of `vocabulary` or more are errors; `handle` is TurboJPEG's, of this thread; `scratch` uint8, of at least
    TABLE_BYTES, takes a sample's bytes and then its pixels. Returns 0, or the bytes of scratch that the row at which it
    stopped needs; that row and later ones are not filled.
    """
    images, boxes, labels, status = rows.images, rows.boxes, rows.labels, rows.status
    limit = labels.shape[1]
    for row in range(begin, end):
        span = find_sample(tables, samples[row], limit, scratch)
        rows.positions[row], status[row] = span.row, span.status
        if span.status == OK:
            labels_at = TABLE_BYTES + span.bytes
            pixels_at = aligned(labels_at + 4 * limit)
            if pixels_at >= scratch.shape[0]:
                return 2 * pixels_at
            if not read_sample(span, limit, scratch):
                status[row] = BAD_READ
            else:
                width, height = span.width, span.height
                window = window_of(width, height, crops, epochs[row], span.row)
                jpeg, pixels = scratch[TABLE_BYTES:].ctypes.data, scratch[pixels_at:]
                needed = decode_row(
                    jpeg, span.bytes, width, height, window, crops, handle, pixels, images[row], boxes[row]
                )
                if needed > 0:
                    return pixels_at + needed
                if needed == DAMAGED:
                    status[row] = BAD_JPEG
                elif not copy_labels(scratch, labels_at, vocabulary, labels[row]):
                    status[row] = BAD_LABEL
        if status[row] != OK and status[row] != BAD_LABEL:
            _exclude(images[row], boxes[row], labels[row])
    return 0
