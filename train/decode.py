"""One batch, compiled: find the sample, decode its JPEG as small as the crop allows, crop, resize, copy the labels.

S image side, B batch, K label limit. No Python runs per sample; the JPEG decoder's return code is checked for each.
"""

from typing import NamedTuple

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]  (numba documents it there)
from numba.core import cgutils
from numba.extending import intrinsic

from labels.beton import ALLOCATION, METADATA, METADATA_OFFSET
from train.betons import Tables
from train.crops import flipped, random_crop
from train.jpeg import RGB, tj_decompress, tj_error
from train.resample import resize_crop

OK, BAD_TABLE, BAD_JPEG, BAD_LABEL, BAD_INDEX = 0, 1, 2, 3, 4
_GREY = 128
_META_BYTES, _ALLOC_BYTES = METADATA.itemsize, ALLOCATION.itemsize
_LABELS_AT, _INDEX_AT = METADATA.fields["labels_ptr"][1], METADATA.fields["index"][1]  # type: ignore[index]
_FATAL = 1


@intrinsic
def _pointer(typing_context, address):  # noqa: ANN202  (numba's own signature)
    """An address as a pointer to bytes."""
    signature = types.CPointer(types.uint8)(types.uint64)

    def generate(context, builder, sig, arguments):  # noqa: ANN202
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return signature, generate


@njit(inline="always")
def _number(data: np.ndarray, at: int, size: int):  # noqa: ANN202  (int64 in compiled code, which Python has no name for)
    """A little-endian unsigned integer of `size` bytes at any alignment."""
    value = np.int64(0)
    for byte in range(size):
        value |= np.int64(data[at + byte]) << (8 * byte)
    return value


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
    """A batch in memory: images uint8 [B, S, S, 3], labels int32 [B, K], indices int64 [B], status uint8 [B]."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
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
        scratch: uint8, any length; pixels are decoded into it.
        rows: written.

    Returns:
        0, or the bytes of scratch that the row at which it stopped needs; that row and later ones are not filled.
    """
    images, labels, indices, status = rows.images, rows.labels, rows.indices, rows.status
    size, limit = images.shape[1], labels.shape[1]
    row_bytes = 4 * limit
    for row in range(begin, end):
        sample = samples[row]
        number = np.searchsorted(tables.first_samples, sample, side="right") - 1
        local, file_bytes = sample - tables.first_samples[number], tables.bytes[number]
        data = carray(_pointer(tables.addresses[number]), (file_bytes,))  # pyright: ignore[reportCallIssue]  (an intrinsic)
        meta = METADATA_OFFSET + local * _META_BYTES
        width, height, image_at = _number(data, meta + 1, 2), _number(data, meta + 3, 2), _number(data, meta + 5, 8)
        labels_at, index = _number(data, meta + _LABELS_AT, 8), _number(data, meta + _INDEX_AT, 8)
        entry = tables.allocations[number] + 2 * local * _ALLOC_BYTES
        jpeg_bytes = _number(data, entry + 16, 8)
        images[row] = _GREY
        labels[row] = -1
        indices[row] = index
        if (
            _number(data, entry + 8, 8) != image_at
            or image_at <= 0
            or jpeg_bytes <= 0
            or image_at > file_bytes - jpeg_bytes
            or width == 0
            or height == 0
        ):
            status[row] = BAD_TABLE
            continue
        # The label row lies in the beton, or in the array that another OUT has for the row's shard.
        label_data = data
        if len(tables.row_addresses) == 0:
            if not 0 < labels_at <= file_bytes - row_bytes:
                status[row] = BAD_TABLE
                continue
        else:
            part = max(np.searchsorted(tables.first_indices, index, side="right") - 1, 0)
            position, count = index - tables.first_indices[part], tables.row_counts[part]
            if not 0 <= position < count:
                status[row] = BAD_INDEX
                continue
            label_data = carray(_pointer(tables.row_addresses[part]), (count * row_bytes,))  # pyright: ignore[reportCallIssue]
            labels_at = position * row_bytes
        left, top, w, h = random_crop(width, height, crops.scale, crops.ratio, crops.seed, epochs[row], index)
        shrink = _shrink(w, h, size)
        pixel_width, pixel_height = (width + shrink - 1) // shrink, (height + shrink - 1) // shrink
        needed = pixel_width * pixel_height * 3
        if needed > scratch.shape[0]:
            return needed
        failed = tj_decompress(
            handle,
            tables.addresses[number] + np.uint64(image_at),
            np.uint64(jpeg_bytes),
            np.uint64(scratch.ctypes.data),
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
        pixels = scratch[:needed].reshape(pixel_height, pixel_width * 3)
        mirror = crops.flip and flipped(crops.seed, epochs[row], index)
        resize_crop(pixels, left / shrink, top / shrink, w / shrink, h / shrink, mirror, images[row])
        status[row] = OK
        for column in range(limit):
            label = np.int32(_number(label_data, labels_at + 4 * column, 4))
            labels[row, column] = label
            if label >= vocabulary or label < -1:
                status[row] = BAD_LABEL
    return 0
