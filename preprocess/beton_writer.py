"""Writes one .beton file (layout: labels/beton.py) front to back: hashed while it is written, each byte copied once.

Samples lie in mapped files (tars, a spool); compiled code copies a page of them at a time into a buffer, a second thread hashes it while
this one writes it (preprocess/betons/direct_io.py: past the page cache).
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numba import types  # pyright: ignore[reportPrivateImportUsage]  (numba documents it there)

from labels import beton
from labels.native import njit
from preprocess.betons.direct_io import DirectFile, aligned_buffer

_LARGEST_PAGE = 1 << 26
_WASTE = 1 / 32

# void* memcpy(void* to, const void* from, size_t bytes): copied as slices, bytes go through numba's loop for arrays of any kind
_copy_bytes = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


@dataclass(frozen=True)
class Samples:
    """N samples in order.

    `files`: what the images lie in, uint8 each; `file`, `offset`, `bytes`: int64 [N], where; `width`, `height`: pixels [N], at most
    65,535; `index`: int64 [N], positions of the rows; `labels`: int32 [N, K], padded.
    """

    files: Sequence[np.ndarray]
    file: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    index: np.ndarray
    labels: np.ndarray


def write_beton(path: Path, samples: Samples) -> tuple[int, str]:
    """Write the file anew.

    Returns:
        Its length in bytes and its SHA-256.

    Raises:
        ValueError: a sample does not fit the largest page.
    """
    count, limit = samples.labels.shape
    sizes = samples.bytes + 4 * limit
    page_bytes, starts = choose_page(sizes)
    head, tail = _head_and_tail(samples, page_bytes, starts)
    label_bytes = np.ascontiguousarray(samples.labels, "<i4").view(np.uint8).reshape(count, 4 * limit)
    with DirectFile(path) as file, _Writer(file) as writer:
        writer.put(head)
        last_page = int(starts[-1]) // page_bytes if count else -1
        bounds = np.searchsorted(starts, np.arange(int(starts[0]) // page_bytes if count else 0, last_page + 2) * page_bytes)
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            page = int(starts[first]) // page_bytes
            used = int(starts[end - 1] + sizes[end - 1]) - page * page_bytes
            buffer = writer.buffer(page_bytes)
            rows = slice(first, end)
            targets = starts[rows] - page * page_bytes
            for number, data in enumerate(samples.files):
                _copy(data, number, samples.file[rows], samples.offset[rows], samples.bytes[rows], targets, buffer)
            _copy_labels(label_bytes[rows], targets + samples.bytes[rows], buffer)
            length = used if page == last_page else page_bytes  # nothing has to follow the last sample but the table
            buffer[used:length] = 0
            writer.put(buffer[:length])
        writer.put(tail)
    return writer.bytes, writer.digest.hexdigest()


def choose_page(sizes: np.ndarray) -> tuple[int, np.ndarray]:
    """Page size in bytes for samples of `sizes` bytes, int64 [N], and where each begins in the file, int64 [N].

    The smallest page whose unused ends take less than a 32nd of the file; of those up to 64 MiB the best, if none is that good. A
    sample never crosses the border of two pages: stock FFCV reads it from one.

    Raises:
        ValueError: a sample is larger than any page.
    """
    largest, total = int(sizes.max(initial=0)), int(sizes.sum())
    page_bytes = beton.page_bytes_for(largest)
    if page_bytes > beton.MAX_PAGE_BYTES:
        raise ValueError(f"a sample of {largest} bytes does not fit a page of {beton.MAX_PAGE_BYTES}")
    best: tuple[int, int, np.ndarray] | None = None
    while best is None or page_bytes <= _LARGEST_PAGE:
        first = beton.first_page_offset(len(sizes), page_bytes)
        starts = _starts(sizes, first, page_bytes)
        end = int(starts[-1] + sizes[-1]) if len(sizes) else first
        if best is None or end < best[0]:
            best = end, page_bytes, starts
        if end - first - total <= _WASTE * total:
            break
        page_bytes *= 2
    return best[1], best[2]


def _head_and_tail(samples: Samples, page_bytes: int, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All bytes before the first page, and the allocation table behind the last sample."""
    count, limit = samples.labels.shape
    first = beton.first_page_offset(count, page_bytes)
    header = np.zeros(1, beton.HEADER)
    table_at = int(starts[-1] + samples.bytes[-1] + 4 * limit) if count else first
    header[0] = (beton.VERSION, len(beton.FIELD_NAMES), page_bytes, count, table_at)
    metadata = np.zeros(count, beton.METADATA)
    image = metadata["image"]
    image["mode"], image["width"], image["height"], image["data_ptr"] = beton.JPG_MODE, samples.width, samples.height, starts
    metadata["labels_ptr"], metadata["index"] = starts + samples.bytes, samples.index
    head = aligned_buffer(first)
    at = 0
    for part in (header, beton.field_descriptors(limit), metadata):
        head[at : at + part.nbytes] = np.frombuffer(part.tobytes(), np.uint8)
        at += part.nbytes
    table = np.zeros((count, 2), beton.ALLOCATION)
    table["sample_id"] = np.arange(count)[:, None]
    table["ptr"][:, 0], table["size"][:, 0] = starts, samples.bytes
    table["ptr"][:, 1], table["size"][:, 1] = starts + samples.bytes, 4 * limit
    return head, np.frombuffer(table.tobytes(), np.uint8)


class _Writer:
    """A file with its SHA-256 and its length. Hashing runs beside writing; two buffers take turns."""

    def __init__(self, file: DirectFile) -> None:
        self._file = file
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: list[Future[None] | None] = [None, None]
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.digest, self.bytes = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hasher.shutdown()

    def buffer(self, size: int) -> np.ndarray:
        """uint8 [size] to be filled and given to the next `put`."""
        self._hashing.reverse()
        self._buffers.reverse()
        if hashing := self._hashing[0]:
            hashing.result()
        if len(self._buffers[0]) != size:
            self._buffers[0] = aligned_buffer(size)
        return self._buffers[0]

    def put(self, block: np.ndarray) -> None:
        """Append uint8 [n]; it may not be changed before the next but one `buffer`."""
        self._hashing[0] = self._hasher.submit(self.digest.update, block.data)
        self._file.write(block)
        self.bytes += len(block)


@njit(nogil=True, cache=True)
def _starts(sizes: np.ndarray, first: int, page_bytes: int) -> np.ndarray:
    """Where samples of `sizes` bytes, int64 [N], begin, from byte `first` on, a page border: int64 [N]."""
    starts = np.empty(len(sizes), np.int64)
    at = first
    for row in range(len(sizes)):
        left = -at % page_bytes
        if left < sizes[row]:
            at += left
        starts[row] = at
        at += sizes[row]
    return starts


@njit(nogil=True, cache=True)
def _copy(
    data: np.ndarray, number: int, file: np.ndarray, offset: np.ndarray, size: np.ndarray, target: np.ndarray, buffer: np.ndarray
) -> None:
    """Those samples whose file is `number`, from `data` into `buffer`."""
    begin, to = np.int64(data.ctypes.data), np.int64(buffer.ctypes.data)  # signed: an unsigned and a signed integer would add up as floats
    for row in range(len(file)):
        if file[row] == number:
            assert 0 <= offset[row] <= len(data) - size[row]
            assert 0 <= target[row] <= len(buffer) - size[row]
            _copy_bytes(to + target[row], begin + offset[row], size[row])


@njit(nogil=True, cache=True)
def _copy_labels(labels: np.ndarray, target: np.ndarray, buffer: np.ndarray) -> None:
    for row in range(len(labels)):
        buffer[target[row] : target[row] + labels.shape[1]] = labels[row]
