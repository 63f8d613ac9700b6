"""One batch, compiled: find the sample, read it, decode the part of its image that is needed, copy the labels.

B batch, S image side, K label limit. No Python runs per sample; the JPEG decoder's return code is checked for each.
"""

from typing import NamedTuple

import numpy as np

from labels.native import njit
from train.data.image_index import BAD_JPEG, BAD_LABEL, BAD_READ, OK, TABLE_BYTES, Tables, copy_labels, find, read_sample
from train.data.resize import aligned
from train.pixels import DAMAGED, Crops, decode_row, fits_canvas, window_of

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
def canvas_shape(tables: Tables, samples: np.ndarray, epochs: np.ndarray, limit: int, crops: Crops, scratch: np.ndarray) -> tuple[int, int]:
    """Rows and columns in pixels of the smallest canvas for all images of a batch, in steps of 16 (few sizes: memory is used again)."""
    rows = columns = crops.size
    for row in range(len(samples)):
        place = find(tables, samples[row], limit, scratch)
        if place.status == OK:
            window = window_of(place.width, place.height, crops, epochs[row], place.row)
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
    images, boxes, labels, status = rows.images, rows.boxes, rows.labels, rows.status
    limit = labels.shape[1]
    for row in range(begin, end):
        place = find(tables, samples[row], limit, scratch)
        rows.positions[row], status[row] = place.row, place.status
        if place.status == OK:
            labels_at = TABLE_BYTES + place.bytes
            pixels_at = aligned(labels_at + 4 * limit)
            if pixels_at >= scratch.shape[0]:
                return 2 * pixels_at
            if not read_sample(place, limit, scratch):
                status[row] = BAD_READ
            else:
                window = window_of(place.width, place.height, crops, epochs[row], place.row)
                needed = decode_row(
                    scratch[TABLE_BYTES:].ctypes.data, place.bytes, place.width, place.height, window, crops, handle,
                    scratch[pixels_at:], images[row], boxes[row],
                )  # fmt: skip
                if needed > 0:
                    return pixels_at + needed
                if needed == DAMAGED:
                    status[row] = BAD_JPEG
                elif not copy_labels(scratch, labels_at, vocabulary, labels[row]):
                    status[row] = BAD_LABEL
        if status[row] != OK and status[row] != BAD_LABEL:
            _leave_out(images[row], boxes[row], labels[row])
    return 0
