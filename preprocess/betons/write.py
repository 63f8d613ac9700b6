"""One group of shards to its betons, or to its image index files: `write_group`, the unit of work of the second pass.

    shards + labels/<shard>.parquet -> find_images -> resolve_images (a scratch file holds the converted ones) -> _Rows
        -> beton/<nnnnn>.beton ...  --no-images: places/<nnnnn>.npy ...
        rejected: reason and detail -> done/beton/<nnnnn>.json, named after the first beton

A beton (layout: labels/beton.py) is written front to back, once. All sizes are known before the first byte, so the
metadata comes first. Compiled code copies each JPEG once, from the tar's page cache into a page buffer; a second thread
computes the SHA-256 while this one writes. R rows of a group or shard, N samples of a beton, K labels.
"""

import errno
import fcntl
import hashlib
import io
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import types  # pyright: ignore[reportPrivateImportUsage]  (numba documents it there)

from labels import beton
from labels.arrays import pad_rows
from labels.manifest import IMAGE_SPAN, BetonPart
from labels.native import njit
from labels.settings import Build
from labels.storage import Layout, atomic_write, is_remote, local_copy
from preprocess.betons.images import MAX_BYTES, BadImage, DecodeCheck, check_in_place, prepare, scan_jpegs
from preprocess.betons.plan import Group, Member, image_folder, row_order
from preprocess.readers.base import Choice, Fault, ScratchFile
from preprocess.readers.images import ShardImages, find_images
from preprocess.stage import GroupMarker, Stage, write_marker

_LARGEST_PAGE = 1 << 26
_WASTE = 1 / 32
_ALIGNED = 4096  # bytes that address, position and length must be multiples of: the largest block of usual disks
_DIRECT = getattr(os, "O_DIRECT", 0)  # no such flag on macOS

# void* memcpy(void* to, const void* from, size_t bytes): a copy of slices would go through numba's loop for any arrays
_copy_bytes = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


# -- the group


@dataclass(frozen=True)
class GroupTask:
    """Everything a worker needs."""

    group: Group
    label_limit: int
    captions: tuple[Choice, ...]
    out: Path
    settings: Build
    options: str  # fingerprint of what decides the betons' bytes, apart from the label files
    copy: bool  # False writes image index files (`--no-images`)

    @property
    def name(self) -> str:
        return f"{self.group.first:05d}"

    @property
    def shards(self) -> list[str]:
        return [member.part.name for member in self.group.members]

    @property
    def file_count(self) -> int:
        return self.group.files

    @property
    def marker(self) -> Path:
        layout = Layout(self.out)
        return layout.beton_marker(self.group.first) if self.copy else layout.image_index_marker(self.group.first)

    def file(self, number: int) -> Path:
        """The beton or image index file of this number."""
        layout = Layout(self.out)
        return layout.beton_file(number) if self.copy else layout.image_index_file(number)

    def is_done(self, marker: GroupMarker, sizes: Mapping[str, int]) -> bool:
        wanted = {"options": self.options, **self.group.wanted}
        if any(getattr(marker, key) != value for key, value in wanted.items()):
            return False
        paths = [(self.file(file.number), file.bytes) for file in marker.files]
        return all(sizes.get(f"{path.parent.name}/{path.name}") == size for path, size in paths)


def group_stage(layout: Layout, *, copy: bool) -> Stage[GroupTask, GroupMarker]:
    """The last stage of a build: the betons of each group, or without `copy` its image index files."""
    folder = image_folder(layout, copy=copy)
    return Stage("betons" if copy else "image index", write_group, GroupMarker, folder.markers, [folder.files])


@dataclass(frozen=True)
class _Rows:
    """R rows of a group; the arrays have a value for each row, as in Samples."""

    files: list[np.ndarray]
    member: np.ndarray  # int64 [R], position of the row's shard in the group
    file: np.ndarray
    good: np.ndarray  # bool [R], has an image
    damaged: np.ndarray  # bool [R], its image has damaged metadata
    offset: np.ndarray
    bytes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    index: np.ndarray
    labels: np.ndarray  # int32 [R, K]; K = 0 for image index files
    faults: dict[int, tuple[str, Fault]]  # row -> shard, and why it has no image


def write_group(task: GroupTask) -> GroupMarker:
    """Write the group's files and its marker; return the marker."""
    layout, group = Layout(task.out), task.group
    task.marker.unlink(missing_ok=True)  # an older marker must not vouch for the new files
    scratch = None
    if not is_remote(task.out):
        scratch = layout.betons if task.copy else layout.image_index
        scratch.mkdir(parents=True, exist_ok=True)
    files = []
    with ExitStack() as stack:
        converted = stack.enter_context(ScratchFile(scratch)) if task.copy else None
        rows = _collect(task, converted, scratch)
        for number, order in enumerate(row_order(group, task.settings), start=group.first):
            kept, rejected = order[rows.good[order]], order[~rows.good[order]]
            with atomic_write(task.file(number)) as partial:
                write = _write_beton if task.copy else _write_image_index
                size, digest = write(partial, group, rows, kept)
            part = BetonPart(
                number=number,
                shards=[group.members[member].part.name for member in np.unique(rows.member[order])],
                samples=len(kept),
                bytes=size,
                sha256=digest,
                quarantined=_reasons(rows.faults[row][1] for row in rejected.tolist()),
            )
            files.append(part)
    reasons = _reasons(fault for _, fault in rows.faults.values())
    damaged = int(np.count_nonzero(rows.damaged & rows.good))
    marker = GroupMarker(
        options=task.options, **group.wanted, files=files, reasons=reasons, damaged_metadata=damaged or None
    )
    faults = [[shard, fault.key, fault.reason, fault.detail] for _, (shard, fault) in sorted(rows.faults.items())]
    write_marker(task.marker, marker, faults)
    return marker


def _collect(task: GroupTask, converted: ScratchFile | None, scratch: Path | None) -> _Rows:
    """All rows of the group, in the shards' order."""
    columns: list[tuple[np.ndarray, ...]] = []
    files: list[np.ndarray] = []
    faults: dict[int, tuple[str, Fault]] = {}
    first, members = 0, task.group.members
    for number, member in enumerate(members):
        keys, labels = _labels(task, member)
        images = find_images(member.shard, keys, task.captions, scratch)
        resolved = resolve_images(images, keys, task.settings, converted)
        files.append(images.data)
        faults |= {first + row: (member.part.name, fault) for row, fault in resolved.faults.items()}
        file = np.where(resolved.converted, len(members), number)
        begin, size = resolved.spans[:, 0], resolved.spans[:, 1] - resolved.spans[:, 0]
        index = np.arange(len(keys)) + member.part.first_index
        position, pixels = np.full(len(keys), number), (resolved.width, resolved.height)
        columns.append((position, file, resolved.good, resolved.damaged, begin, size, *pixels, index, labels))
        first += len(keys)
    if converted is not None:
        files.append(converted.view())
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    return _Rows(files, *joined, faults=faults)


def _labels(task: GroupTask, member: Member) -> tuple[Any, np.ndarray]:
    """Keys of a shard's rows, and their padded label rows int32 [R, K]; an image index has none: K is 0."""
    names = ["key", "label_ids"] if task.copy else ["key"]
    with local_copy(Layout(task.out).label_file(member.part.name)) as path:
        table = pq.read_table(path, columns=names).combine_chunks()
    keys = table["key"].chunk(0)
    if not task.copy:
        return keys, np.empty((len(keys), 0), np.int32)
    lists = table["label_ids"].chunk(0)
    return keys, pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), task.label_limit)


def _write_beton(path: Path, _: Group, rows: _Rows, kept: np.ndarray) -> tuple[int, str]:
    parts = (rows.file, rows.offset, rows.bytes, rows.width, rows.height, rows.index, rows.labels)
    return write_beton(path, Samples(rows.files, *(part[kept] for part in parts)))


def _write_image_index(path: Path, group: Group, rows: _Rows, kept: np.ndarray) -> tuple[int, str]:
    spans = np.zeros(len(kept), IMAGE_SPAN)
    spans["shard"] = np.array([member.number for member in group.members])[rows.member[kept]]
    for name in ("bytes", "offset", "index", "width", "height"):
        spans[name] = getattr(rows, name)[kept]
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, spans, version=(1, 0))
    content = buffer.getvalue()
    path.write_bytes(content)
    return len(content), hashlib.sha256(content).hexdigest()


def _reasons(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(sorted(Counter(fault.reason for fault in faults).items()))


# -- rows of one shard to images


@dataclass(frozen=True)
class ResolvedImages:
    """The images of R rows as they go into a beton."""

    good: np.ndarray  # bool [R], has an image
    converted: np.ndarray  # bool [R], is in the scratch file and not in the shard's own file
    spans: np.ndarray  # int64 [R, 2], begin and end there
    width: np.ndarray  # int64 [R], pixels
    height: np.ndarray
    damaged: np.ndarray  # bool [R], its metadata are damaged
    faults: dict[int, Fault]  # row -> why it has none


def resolve_images(
    images: ShardImages, keys: pa.StringArray, settings: Build, scratch: ScratchFile | None
) -> ResolvedImages:
    """Check every image of a shard, and convert those that a beton does not take as they are.

    `keys`: of the R rows. `scratch` gets the converted images; None (`--no-images`) converts nothing: an image that is
    no plain JPEG is a fault.
    """
    data, spans = images.data, images.spans.copy()
    scan = scan_jpegs(data, spans, settings)
    good, faults = scan.plain.copy(), dict(images.faults)
    converted, damaged = np.zeros((2, len(spans)), np.bool_)
    width, height, resolve = scan.width, scan.height, check_in_place if scratch is None else prepare
    for row in np.flatnonzero(~good & (spans[:, 0] >= 0)).tolist():
        begin, end = spans[row].tolist()
        try:
            if end - begin > MAX_BYTES:
                raise BadImage("image file too large", f"{end - begin} bytes; allowed: {MAX_BYTES}")
            image = data[begin:end].tobytes()
            jpeg, width[row], height[row], damaged[row] = resolve(image, settings)
            if scratch is not None and jpeg is not image:
                spans[row], converted[row] = scratch.append(jpeg), True
            good[row] = True
        except BadImage as error:
            faults[row] = Fault(keys[row].as_py(), error.reason, str(error))
    if settings.decode_check == "full":
        check, address = DecodeCheck(), data.ctypes.data
        for row in np.flatnonzero(good & ~converted).tolist():
            begin, end = spans[row].tolist()
            if warning := check.fault(address + begin, end - begin, int(width[row]), int(height[row])):
                faults[row], good[row] = Fault(keys[row].as_py(), "image cut or damaged", warning), False
    return ResolvedImages(good, converted, spans, width, height, damaged, faults)


# -- the file


@dataclass(frozen=True)
class Samples:
    """N samples in order."""

    files: Sequence[np.ndarray]  # mapped files that hold the images, uint8 each
    file: np.ndarray  # int64 [N], number of the image's file
    offset: np.ndarray  # int64 [N], bytes
    bytes: np.ndarray  # int64 [N]
    width: np.ndarray  # [N], pixels, at most 65,535
    height: np.ndarray
    index: np.ndarray  # int64 [N], positions of the rows
    labels: np.ndarray  # int32 [N, K], padded


def write_beton(path: Path, samples: Samples) -> tuple[int, str]:
    """Write the file from scratch; return its length in bytes and its SHA-256."""
    count, limit = samples.labels.shape
    sizes = samples.bytes + 4 * limit
    page_bytes, starts = choose_page(sizes)
    head, tail = _head_and_tail(samples, page_bytes, starts)
    label_bytes = np.ascontiguousarray(samples.labels, "<i4").view(np.uint8).reshape(count, 4 * limit)
    with DirectFile(path) as file, _Writer(file) as writer:
        writer.put(head)
        first_page, last_page = (int(starts[row]) // page_bytes for row in (0, -1)) if count else (0, -1)
        bounds = np.searchsorted(starts, np.arange(first_page, last_page + 2) * page_bytes)
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

    The smallest page whose unused ends take less than a 32nd of the file; if there is none, the best page up to 64 MiB
    (FFCV: four times the largest image). A sample never crosses a page border: stock FFCV reads it from one
    page. ValueError: a sample is larger than any page.
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
    image["mode"], image["data_ptr"] = beton.JPG_MODE, starts
    image["width"], image["height"] = samples.width, samples.height
    metadata["labels_ptr"], metadata["index"] = starts + samples.bytes, samples.index
    content = b"".join(part.tobytes() for part in (header, beton.field_descriptors(limit), metadata))
    head = aligned_buffer(first)
    head[: len(content)] = np.frombuffer(content, np.uint8)
    table = np.zeros((count, 2), beton.ALLOCATION)
    table["sample_id"] = np.arange(count)[:, None]
    table["ptr"][:, 0], table["size"][:, 0] = starts, samples.bytes
    table["ptr"][:, 1], table["size"][:, 1] = starts + samples.bytes, 4 * limit
    return head, np.frombuffer(table.tobytes(), np.uint8)


class _Writer:
    """A file with its SHA-256 and its length. A second thread computes the hash; two buffers take turns."""

    def __init__(self, file: "DirectFile") -> None:
        self._file = file
        self._hasher = ThreadPoolExecutor(1)
        self._hashing: list[Future[None] | None] = [None, None]
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.digest, self.bytes = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
    position = first
    for row in range(len(sizes)):
        left = -position % page_bytes
        if left < sizes[row]:
            position += left
        starts[row] = position
        position += sizes[row]
    return starts


@njit(nogil=True, cache=True)
def _copy(
    data: np.ndarray,
    number: int,
    file: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    target: np.ndarray,
    page: np.ndarray,
) -> None:
    """Those samples whose file is `number`, from `data` into `page`."""
    # Signed: an unsigned and a signed integer would add up as floats.
    begin, to = np.int64(data.ctypes.data), np.int64(page.ctypes.data)
    for row in range(len(file)):
        if file[row] == number:
            assert 0 <= offset[row] <= len(data) - size[row]
            assert 0 <= target[row] <= len(page) - size[row]
            _copy_bytes(to + target[row], begin + offset[row], size[row])


@njit(nogil=True, cache=True)
def _copy_labels(labels: np.ndarray, target: np.ndarray, buffer: np.ndarray) -> None:
    for row in range(len(labels)):
        buffer[target[row] : target[row] + labels.shape[1]] = labels[row]


def aligned_buffer(size: int) -> np.ndarray:
    """Zeros, uint8 [size], that begin where a memory page does."""
    return np.frombuffer(mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8, size)


class DirectFile:
    """A new file that is written front to back past the page cache (O_DIRECT), where its file system can.

    Through the cache a page costs its allocation and a second copy, most of the CPU time, and evicts the tars that are
    still to be read. Blocks that are not aligned, in practice the end, go through the cache.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = _DIRECT != 0
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o666), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, block: np.ndarray) -> None:
        """Append uint8 [n], all of it; it may not change meanwhile."""
        if block.ctypes.data % _ALIGNED or len(block) % _ALIGNED:
            self._through_cache()
        rest = block.data
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._through_cache()

    def _through_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)
            self._direct = False
