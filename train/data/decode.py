"""One batch, compiled: find the sample, read it, decode the part of its image that is needed, copy the labels.

B batch, S image side, K label limit. No Python runs per sample; the JPEG decoder's return code is checked for each.
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
    find,
    read_sample,
)
from train.data.order import flipped, random_crop
from train.data.resize import address_of, aligned, copy_bytes, margin_bytes, resize_crop, work_bytes

# ---- pixels: One image, compiled: which part of it is taken, and its pixels, decoded no further than that part needs.
#
#     host:    JPEG -> pixels of the decoder, shrunk by 1, 2, 4 or 8 -> train/data/resize.py -> S x S
#     device:  JPEG -> the same pixels, into the batch's canvas: the whole image where it fits, else cut to the crop's own;
#              train/data/inputs.py resamples them on the device
#
# S image side.


DONE, DAMAGED = 0, -1
BOX = 9
"""Numbers of a box: x, y, width, height of the crop in pixels of its canvas; left, top, columns and rows of what the
filter may see of it; 1 if mirrored."""
_LARGEST_CANVAS = (
    3  # times S: a longer side, which only huge or very narrow crops have, is resampled on the host after all
)
_REACH = 2.0  # of the cubic, in output pixels
_FATAL = 1


class Crops(NamedTuple):
    """What part of an image is taken, and who resamples it.

    Random crops take shares `scale` of the area with `ratio` of width to height and mirror half if `flip`, by `seed`,
    epoch and index. With `centre` the shorter side is resized to S and the middle taken. With `device` pixels are left
    as the decoder gives them.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    seed: int
    size: int
    centre: bool
    device: bool


class Window(NamedTuple):
    """The pixels of a shrunk image that are needed, [left, left + columns) and [top, top + rows), and the crop's box
    among them.
    """

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
    """What is needed of an image of width x height pixels, for its sample's `index` and `epoch`.

    The filter of a random crop sees the crop alone, as after PIL's `crop`; that of a centre crop sees what surrounds
    it, as PIL's `resize` of the whole image, shrunk by the decoder to no less than 2 S, does.
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
    """Decode a JPEG, shrunk to columns x rows pixels, into `pixels`, uint8, rows `pitch` bytes apart; False if it does
    not decode.
    """
    failed = tj_decompress(
        handle, np.uint64(address), np.uint64(size), np.uint64(pixels.ctypes.data), columns, pitch, rows, RGB, 0
    )
    # The decoder also returns -1 for warnings, e.g. bytes too many behind a marker; the picture is there then.
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
    """Decode one JPEG.

    Args:
        address, size: where its bytes lie in memory, and how many.
        width, height: the image, in pixels.
        window: what is needed of it.
        crops: as the window was made with.
        handle: TurboJPEG's, of this thread.
        scratch: uint8, aligned to 4 bytes.
        image: uint8 [H, W, 3], written: S x S pixels, or those of the canvas.
        box: float32 [BOX], written: how they become S x S.

    Returns:
        DONE, DAMAGED if the JPEG does not decode, or the bytes of scratch that are needed.
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
    source, target, target_pitch = (
        scratch[window.top * pitch + 3 * window.left :],
        image.reshape(-1),
        3 * image.shape[1],
    )
    if on_canvas:
        for row in range(window.rows):
            copy_bytes(address_of(target) + row * target_pitch, address_of(source) + row * pitch, 3 * window.columns)
        box[0], box[1], box[2], box[3] = window.x, window.y, window.width, window.height
        box[4], box[5], box[6], box[7], box[8] = 0.0, 0.0, window.columns, window.rows, window.flip
    else:
        resize_crop(
            source,
            pitch,
            window.rows,
            window.columns,
            window.x,
            window.y,
            window.width,
            window.height,
            window.flip,
            side,
            target,
            target_pitch,
            scratch[at_work:],
        )
        box[:], box[2:4], box[6:8] = 0.0, side, side  # S x S pixels that are final already
    return DONE


_GREY = 128
_CANVAS_STEP = 16


class Rows(NamedTuple):
    """A batch in memory.

    - `images` uint8 [B, H, W, 3]: S x S pixels, or in mode `device` as many as the largest crop of the batch needs.
    - `boxes` float32 [B, BOX]: how they become S x S.
    - `labels` int32 [B, K].
    - `positions` int64 [B]: of their rows among all.
    - `status` uint8 [B].
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    status: np.ndarray


@njit(nogil=True, cache=True)
def canvas_shape(
    tables: Tables, samples: np.ndarray, epochs: np.ndarray, limit: int, crops: Crops, scratch: np.ndarray
) -> tuple[int, int]:
    """Rows and columns in pixels of the smallest canvas for all images of a batch, in steps of 16 (few sizes: memory is
    used again).
    """
    rows = columns = crops.size
    for row in range(len(samples)):
        span = find(tables, samples[row], limit, scratch)
        if span.status == OK:
            window = window_of(span.width, span.height, crops, epochs[row], span.row)
            if fits_canvas(window, crops):
                rows, columns = max(rows, window.rows), max(columns, window.columns)
    return -(-rows // _CANVAS_STEP) * _CANVAS_STEP, -(-columns // _CANVAS_STEP) * _CANVAS_STEP


@njit
def _leave_out(image: np.ndarray, box: np.ndarray, labels: np.ndarray) -> None:
    """Grey, without labels: a sample that has no part in the loss."""
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
    """Fill rows [begin, end) of a batch.

    Args:
        tables: of a BetonSet.
        samples, epochs: int64 [B], what to load.
        begin, end: the rows that are this call's.
        crops: what part of each image is taken.
        vocabulary: V; a label id of V or more is an error.
        handle: TurboJPEG's, of this thread.
        scratch: uint8, any length from TABLE_BYTES; the sample's bytes are read into it, and its pixels decoded behind
            them.
        rows: written.

    Returns:
        0, or the bytes of scratch that the row at which it stopped needs; that row and later ones are not filled.
    """
    images, boxes, labels, status = rows.images, rows.boxes, rows.labels, rows.status
    limit = labels.shape[1]
    for row in range(begin, end):
        span = find(tables, samples[row], limit, scratch)
        rows.positions[row], status[row] = span.row, span.status
        if span.status == OK:
            labels_at = TABLE_BYTES + span.bytes
            pixels_at = aligned(labels_at + 4 * limit)
            if pixels_at >= scratch.shape[0]:
                return 2 * pixels_at
            if not read_sample(span, limit, scratch):
                status[row] = BAD_READ
            else:
                window = window_of(span.width, span.height, crops, epochs[row], span.row)
                needed = decode_row(
                    scratch[TABLE_BYTES:].ctypes.data,
                    span.bytes,
                    span.width,
                    span.height,
                    window,
                    crops,
                    handle,
                    scratch[pixels_at:],
                    images[row],
                    boxes[row],
                )
                if needed > 0:
                    return pixels_at + needed
                if needed == DAMAGED:
                    status[row] = BAD_JPEG
                elif not copy_labels(scratch, labels_at, vocabulary, labels[row]):
                    status[row] = BAD_LABEL
        if status[row] != OK and status[row] != BAD_LABEL:
            _leave_out(images[row], boxes[row], labels[row])
    return 0
