"""A sample is a span of a file, compiled: find it, and read its image bytes and its label row.

    sample number -> file of samples (beton, or image index into tars) -> its table row -> file, offset, bytes, width, height, index, labels

Everything is read by position (pread), nothing is mapped: a file that is cut or gone while training is a status, not a
    signal that ends
the process. M files of samples, P shards, K label limit.
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

OK, BAD_TABLE, BAD_JPEG, BAD_LABEL, BAD_INDEX, BAD_READ = range(6)
"""What became of a sample: fine; its table entry is wrong; its JPEG does not decode; a label is none of the head's; its
index is no row of its shard; the file could not be read at that span."""
NO_FILE = -1
TABLE_BYTES = 128
"""The head of scratch memory, where table rows are read to; the sample's own bytes come behind it."""

_META_BYTES, _SPAN_BYTES = METADATA.itemsize, IMAGE_SPAN.itemsize
_LABELS_AT, _INDEX_AT = METADATA.fields["labels_ptr"][1], METADATA.fields["index"][1]  # type: ignore[index]
_P_BYTES, _P_OFFSET, _P_INDEX = (IMAGE_SPAN.fields[name][1] for name in ("bytes", "offset", "index"))  # type: ignore[index]
_P_WIDTH, _P_HEIGHT = (IMAGE_SPAN.fields[name][1] for name in ("width", "height"))  # type: ignore[index]
_TRIES = 3

# ssize_t pread(int file, void* to, size_t bytes, off_t at)
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))

_ADVISES = sys.platform == "linux"
if _ADVISES:
    # int posix_fadvise(int file, off_t at, off_t bytes, int advice)
    _fadvise = types.ExternalFunction("posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32))
_WILL_NEED = 3  # POSIX_FADV_WILLNEED
_ADVICE_BYTES = 1 << 17  # the kernel cuts longer requests short
_GAP_BYTES = 1 << 16  # what lies between two samples is read with them up to this length


class Tables(NamedTuple):
    """Where everything lies. One entry a file of samples [M]:

    - `first_samples` int64 [M + 1]: number of its first sample among all. - `files` int64: descriptor, NO_FILE while it
    is not on this machine; `bytes` int64: its length. - `tables`, `allocations` int64: offsets of the metadata array
    and of a beton's allocation table; 0 for an image index file. - `first_rows` int64: position of its OUT's first row
    among the rows of all OUTs. - `shards` int64 [M, 2]: the shards of its OUT, [begin, end) below; none where betons
    hold the labels.

    One entry a shard [P]:

    - `first_indices`, `row_counts` int64: which positions its rows have in its OUT.
    - `row_files` int64, `rows_at` int64: descriptor of its label array, and the offset of the first row in it.
    - `tars` int64, `tar_bytes` int64: descriptor and length of its tar; NO_FILE where betons hold the images.
    """

    first_samples: np.ndarray
    files: np.ndarray
    bytes: np.ndarray
    tables: np.ndarray
    allocations: np.ndarray
    first_rows: np.ndarray
    shards: np.ndarray
    first_indices: np.ndarray
    row_counts: np.ndarray
    row_files: np.ndarray
    rows_at: np.ndarray
    tars: np.ndarray
    tar_bytes: np.ndarray


class SampleSpan(NamedTuple):
    """Where one sample lies: file descriptors, offsets and lengths in bytes; `row`: position of its row among those of
    all OUTs.
    """

    status: int
    file: int
    offset: int
    bytes: int
    width: int
    height: int
    row: int
    label_file: int
    label_offset: int


@njit(inline="always")
def number_at(data: np.ndarray, at: int, size: int):  # noqa: ANN201  (int64 in compiled code, which Python has no name for)
    """A little-endian unsigned integer of `size` bytes at any alignment."""
    value = np.int64(0)
    for byte in range(size):
        value |= np.int64(data[at + byte]) << (8 * byte)
    return value


@njit
def read_at(file: int, at: int, size: int, target: np.ndarray, target_at: int) -> bool:
    """Read `size` bytes at offset `at` of a file into `target`; False where the file does not give them."""
    done, tries = 0, 0
    while done < size:
        found = _pread(file, np.uint64(target.ctypes.data + target_at + done), np.uint64(size - done), at + done)
        if found == 0:
            return False
        tries += found < 0  # a signal may interrupt it
        if tries == _TRIES:
            return False
        done += max(found, 0)
    return True


@njit
def find(tables: Tables, sample: int, limit: int, scratch: np.ndarray) -> SampleSpan:
    """Where sample number `sample` lies.

    Args:
        tables: of a BetonSet.
        sample: its number.
        limit: K.
        scratch: uint8, at least TABLE_BYTES; its head is overwritten.

    Returns:
        its span, with a status other than OK where the tables cannot be read or tell of nothing that there is.
    """
    number = np.searchsorted(tables.first_samples, sample, side="right") - 1
    local, table, length = sample - tables.first_samples[number], tables.files[number], tables.bytes[number]
    file = table
    labels_at = np.int64(0)
    if tables.allocations[number] > 0:
        if not read_at(table, tables.tables[number] + local * _META_BYTES, _META_BYTES, scratch, 0):
            return SampleSpan(BAD_READ, table, 0, 0, 0, 0, 0, 0, 0)
        width, height, offset = number_at(scratch, 1, 2), number_at(scratch, 3, 2), number_at(scratch, 5, 8)
        labels_at, index = number_at(scratch, _LABELS_AT, 8), number_at(scratch, _INDEX_AT, 8)
        # The label row lies right behind the image, so that its pointer tells the length too: one read, not another of
        # the table behind.
        size, length = labels_at - offset, tables.allocations[number]
        # Other labels of the same rows have a limit of their own and lie in other files.
        agree = labels_at <= length - (4 * limit if tables.shards[number, 0] == tables.shards[number, 1] else 0)
    else:
        if not read_at(table, tables.tables[number] + local * _SPAN_BYTES, _SPAN_BYTES, scratch, 0):
            return SampleSpan(BAD_READ, table, 0, 0, 0, 0, 0, 0, 0)
        width, height, offset = (
            number_at(scratch, _P_WIDTH, 2),
            number_at(scratch, _P_HEIGHT, 2),
            number_at(scratch, _P_OFFSET, 8),
        )
        index, size = number_at(scratch, _P_INDEX, 8), number_at(scratch, _P_BYTES, 4)
        shard = tables.shards[number, 0] + number_at(scratch, 0, 4)
        agree = shard < tables.shards[number, 1] and tables.tars[shard] != NO_FILE
        if agree:
            file, length = tables.tars[shard], tables.tar_bytes[shard]
    row = tables.first_rows[number] + index
    if not agree or offset <= 0 or size <= 0 or offset > length - size or width == 0 or height == 0:
        return SampleSpan(BAD_TABLE, file, offset, size, width, height, row, 0, 0)
    begin, end = tables.shards[number, 0], tables.shards[number, 1]
    if begin == end:  # the label row lies in the beton
        return SampleSpan(OK, file, offset, size, width, height, row, file, labels_at)
    part = begin + max(np.searchsorted(tables.first_indices[begin:end], index, side="right") - 1, 0)
    position = index - tables.first_indices[part]
    status = OK if 0 <= position < tables.row_counts[part] and tables.row_files[part] != NO_FILE else BAD_INDEX
    return SampleSpan(
        status,
        file,
        offset,
        size,
        width,
        height,
        row,
        tables.row_files[part],
        tables.rows_at[part] + position * 4 * limit,
    )


@njit
def read_sample(span: SampleSpan, limit: int, scratch: np.ndarray) -> bool:
    """Read a span's image bytes to `scratch[TABLE_BYTES:]`, its label row right behind them; False where a file does
    not give them.

    Args:
        span: with status OK.
        limit: K.
        scratch: uint8, at least TABLE_BYTES + span.bytes + 4 K.
    """
    size = span.bytes
    if span.label_file == span.file and span.label_offset == span.offset + size:
        return read_at(span.file, span.offset, size + 4 * limit, scratch, TABLE_BYTES)
    return read_at(span.file, span.offset, size, scratch, TABLE_BYTES) and read_at(
        span.label_file, span.label_offset, 4 * limit, scratch, TABLE_BYTES + size
    )


@njit
def copy_labels(scratch: np.ndarray, at: int, vocabulary: int, labels: np.ndarray) -> bool:
    """Copy the label row at `scratch[at:]` to `labels`, int32 [K]; False where one of them is none of the head's."""
    good = True
    for column in range(len(labels)):
        label = np.int32(number_at(scratch, at + 4 * column, 4))
        labels[column] = label
        good &= -1 <= label < vocabulary
    return good


@njit
def _will_need(file: int, begin: int, end: int) -> None:
    """Ask the system to read bytes [begin, end) of a file behind our back."""
    if _ADVISES:
        for at in range(begin, end, _ADVICE_BYTES):
            _fadvise(file, at, min(_ADVICE_BYTES, end - at), _WILL_NEED)


@njit(nogil=True, cache=True)
def advise(tables: Tables, samples: np.ndarray, limit: int, scratch: np.ndarray) -> None:
    """Have the bytes of samples read ahead, neighbours in one go; a sample that cannot be found is told when its turn
    comes.

    Args:
        tables: of a BetonSet.
        samples: int64 [N].
        limit: K.
        scratch: uint8 [TABLE_BYTES].
    """
    file, begin, end = NO_FILE, np.int64(0), np.int64(0)
    for sample in samples:
        span = find(tables, sample, limit, scratch)
        if span.status != OK:
            continue
        if span.file != file or not begin <= span.offset <= end + _GAP_BYTES:
            _will_need(file, begin, end)
            file, begin, end = span.file, span.offset, span.offset
        end = max(end, span.offset + span.bytes + 4 * limit)
    _will_need(file, begin, end)
