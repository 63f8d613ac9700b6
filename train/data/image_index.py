"""Find and read one sample, compiled: sample number -> span of a file -> image bytes and label row.

    sample number -> beton, or image index into tars -> its table row: file, offset, bytes, width, height, row
                  -> read_sample: image bytes and label row in scratch memory -> copy_labels: int32 [K]

Everything is read by position (pread), nothing is mapped: a file that is cut or gone becomes a status, not a signal
that ends the process. M sample files, P shards, K label limit.
"""

# Compiled code: what numpy calls scalars are integers there.
# pyright: reportArgumentType=false, reportReturnType=false
import sys
from typing import NamedTuple

import numpy as np
from numba import types  # pyright: ignore[reportPrivateImportUsage]  (numba documents it there)

from labels.beton import METADATA
from labels.manifest import IMAGE_SPAN
from labels.native import njit

# The status of a sample: read; its table entry is wrong; its JPEG does not decode; a label is outside the head; its
# index is no row of its shard; the file could not be read there.
OK, BAD_TABLE, BAD_JPEG, BAD_LABEL, BAD_INDEX, BAD_READ = range(6)
NO_FILE = -1
TABLE_BYTES = 128  # the head of scratch memory, for table rows; the sample's own bytes follow

_META_ROW_BYTES, _SPAN_ROW_BYTES = METADATA.itemsize, IMAGE_SPAN.itemsize
_LABELS_AT, _INDEX_AT = METADATA.fields["labels_ptr"][1], METADATA.fields["index"][1]  # type: ignore[index]
_SPAN_BYTES, _SPAN_OFFSET, _SPAN_INDEX = (IMAGE_SPAN.fields[name][1] for name in ("bytes", "offset", "index"))  # type: ignore[index]
_SPAN_WIDTH, _SPAN_HEIGHT = (IMAGE_SPAN.fields[name][1] for name in ("width", "height"))  # type: ignore[index]
_TRIES = 3

# ssize_t pread(int file, void* to, size_t bytes, off_t offset)
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))

_ADVISES = sys.platform == "linux"
if _ADVISES:
    # int posix_fadvise(int file, off_t offset, off_t bytes, int advice)
    _fadvise = types.ExternalFunction("posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32))
_WILL_NEED = 3  # POSIX_FADV_WILLNEED
_ADVICE_BYTES = 1 << 17  # the kernel cuts longer requests short
_GAP_BYTES = 1 << 16  # up to this length a gap between two samples is read with them


class Tables(NamedTuple):
    """The files and offsets of a BetonSet, int64. First one entry a sample file [M], then one entry a shard [P]."""

    first_samples: np.ndarray  # [M + 1]: number of its first sample among all
    files: np.ndarray  # descriptor; NO_FILE while a remote beton is not on this machine
    bytes: np.ndarray  # its length
    tables: np.ndarray  # offset of the metadata array or of the image index's rows
    allocations: np.ndarray  # offset of the beton's allocation table; 0 for an image index
    first_rows: np.ndarray  # position of its dataset's first row among the rows of all datasets
    shards: np.ndarray  # [M, 2]: the shards of its dataset, [begin, end) below; none where betons hold the labels
    first_indices: np.ndarray  # position of its first row in its dataset
    row_counts: np.ndarray
    row_files: np.ndarray  # descriptor of its label array
    rows_at: np.ndarray  # offset of the first row in it
    tars: np.ndarray  # descriptor of its tar; NO_FILE where betons hold the images
    tar_bytes: np.ndarray


class SampleSpan(NamedTuple):
    """Image and label row of one sample: descriptors, offsets and lengths in bytes."""

    status: int
    file: int
    offset: int
    bytes: int
    width: int  # pixels
    height: int
    row: int  # position among the rows of all datasets
    label_file: int
    label_offset: int


@njit(inline="always")
def number_at(data: np.ndarray, offset: int, size: int):  # noqa: ANN201  (int64 in compiled code, which Python has no name for)
    """A little-endian unsigned integer of `size` bytes at any alignment."""
    value = np.int64(0)
    for byte in range(size):
        value |= np.int64(data[offset + byte]) << (8 * byte)
    return value


@njit
def read_at(file: int, offset: int, size: int, target: np.ndarray, target_at: int) -> bool:
    """Read `size` bytes at `offset` of a file to `target[target_at:]`; False where the file does not have them."""
    done, tries = 0, 0
    while done < size:
        count = _pread(file, np.uint64(target.ctypes.data + target_at + done), np.uint64(size - done), offset + done)
        if count == 0:
            return False
        tries += count < 0  # a signal may interrupt it
        if tries == _TRIES:
            return False
        done += max(count, 0)
    return True


@njit
def find_sample(tables: Tables, sample: int, limit: int, scratch: np.ndarray) -> SampleSpan:
    """The span of a sample, with a status other than OK where its table row cannot be read or points nowhere.

    `limit` is K; the first TABLE_BYTES of `scratch`, uint8, are overwritten.
    """
    number = np.searchsorted(tables.first_samples, sample, side="right") - 1
    local, table, length = sample - tables.first_samples[number], tables.files[number], tables.bytes[number]
    file = table
    labels_at = np.int64(0)
    if tables.allocations[number] > 0:
        if not read_at(table, tables.tables[number] + local * _META_ROW_BYTES, _META_ROW_BYTES, scratch, 0):
            return SampleSpan(BAD_READ, table, 0, 0, 0, 0, 0, 0, 0)
        width, height, offset = number_at(scratch, 1, 2), number_at(scratch, 3, 2), number_at(scratch, 5, 8)
        labels_at, index = number_at(scratch, _LABELS_AT, 8), number_at(scratch, _INDEX_AT, 8)
        # The label row follows its image directly, so its pointer gives the length too: one table read instead of two,
        # 1.6 -> 1.0 us per sample.
        size, length = labels_at - offset, tables.allocations[number]
        # Label arrays have a limit of their own, which says nothing of this beton.
        agree = labels_at <= length - (4 * limit if tables.shards[number, 0] == tables.shards[number, 1] else 0)
    else:
        if not read_at(table, tables.tables[number] + local * _SPAN_ROW_BYTES, _SPAN_ROW_BYTES, scratch, 0):
            return SampleSpan(BAD_READ, table, 0, 0, 0, 0, 0, 0, 0)
        width, height = number_at(scratch, _SPAN_WIDTH, 2), number_at(scratch, _SPAN_HEIGHT, 2)
        offset = number_at(scratch, _SPAN_OFFSET, 8)
        index, size = number_at(scratch, _SPAN_INDEX, 8), number_at(scratch, _SPAN_BYTES, 4)
        shard = tables.shards[number, 0] + number_at(scratch, 0, 4)
        agree = shard < tables.shards[number, 1] and tables.tars[shard] != NO_FILE
        if agree:
            file, length = tables.tars[shard], tables.tar_bytes[shard]
    row = tables.first_rows[number] + index
    if not agree or offset <= 0 or size <= 0 or offset > length - size or width == 0 or height == 0:
        return SampleSpan(BAD_TABLE, file, offset, size, width, height, row, 0, 0)
    begin, end = tables.shards[number, 0], tables.shards[number, 1]
    if begin == end:  # the label row is in the beton
        return SampleSpan(OK, file, offset, size, width, height, row, file, labels_at)
    part = begin + max(np.searchsorted(tables.first_indices[begin:end], index, side="right") - 1, 0)
    position = index - tables.first_indices[part]
    status = OK if 0 <= position < tables.row_counts[part] and tables.row_files[part] != NO_FILE else BAD_INDEX
    label_file, label_offset = tables.row_files[part], tables.rows_at[part] + position * 4 * limit
    return SampleSpan(status, file, offset, size, width, height, row, label_file, label_offset)


@njit
def read_sample(span: SampleSpan, limit: int, scratch: np.ndarray) -> bool:
    """Read image bytes to `scratch[TABLE_BYTES:]` and the label row behind them; False where a file does not have them.

    `span` has status OK; `scratch` uint8 has at least TABLE_BYTES + span.bytes + 4 K bytes.
    """
    size, label_bytes = span.bytes, 4 * limit
    if span.label_file == span.file and span.label_offset == span.offset + size:
        return read_at(span.file, span.offset, size + label_bytes, scratch, TABLE_BYTES)
    labels_at = TABLE_BYTES + size
    image_read = read_at(span.file, span.offset, size, scratch, TABLE_BYTES)
    return image_read and read_at(span.label_file, span.label_offset, label_bytes, scratch, labels_at)


@njit
def copy_labels(scratch: np.ndarray, labels_at: int, vocabulary: int, labels: np.ndarray) -> bool:
    """Copy the label row at `scratch[labels_at:]` to `labels`, int32 [K]; False where a label is outside the head."""
    good = True
    for column in range(len(labels)):
        label = np.int32(number_at(scratch, labels_at + 4 * column, 4))
        labels[column] = label
        good &= -1 <= label < vocabulary
    return good


@njit
def _will_need(file: int, begin: int, end: int) -> None:
    """Ask the system to read bytes [begin, end) of a file in the background."""
    if _ADVISES:
        for offset in range(begin, end, _ADVICE_BYTES):
            _fadvise(file, offset, min(_ADVICE_BYTES, end - offset), _WILL_NEED)


@njit(nogil=True, cache=True)
def advise(tables: Tables, samples: np.ndarray, limit: int, scratch: np.ndarray) -> None:
    """Have the system read samples ahead, int64 [N], neighbours together; one with a wrong table row is skipped."""
    file, begin, end = NO_FILE, np.int64(0), np.int64(0)
    for sample in samples:
        span = find_sample(tables, sample, limit, scratch)
        if span.status != OK:
            continue
        if span.file != file or not begin <= span.offset <= end + _GAP_BYTES:
            _will_need(file, begin, end)
            file, begin, end = span.file, span.offset, span.offset
        end = max(end, span.offset + span.bytes + 4 * limit)
    _will_need(file, begin, end)
