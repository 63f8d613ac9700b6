"""One group of shards to its betons, or to its files of spans: the unit of work of the second pass.

shards + labels/<shard>.parquet -> spans of all images (a spool holds the converted ones) -> beton/<nnnnn>.beton ...
                                                            --no-images: spans/<nnnnn>.npy ...
    left out: reason and detail ------------------------------------> done/beton/<nnnnn>.json, named after the first
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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
from preprocess.betons.direct_io import DirectFile, aligned_buffer
from preprocess.betons.images import MAX_BYTES, BadImage, DecodeCheck, lying, prepare, scan_jpegs
from preprocess.betons.plan import Group, Member, image_folder, row_order
from preprocess.readers.base import Fault
from preprocess.readers.caption_key import Choice
from preprocess.readers.images import Pictures, find_pictures
from preprocess.readers.scratch import Spool
from preprocess.stage import GroupMarker, Stage, write_marker

# ---- beton_writer: Writes one .beton file (layout: labels/beton.py) front to back: hashed while it is written, each
# byte copied once.
#
# Samples lie in mapped files (tars, a spool); compiled code copies a page of them at a time into a buffer, a second
# thread hashes it while this one writes it (preprocess/betons/direct_io.py: past the page cache).


_LARGEST_PAGE = 1 << 26
_WASTE = 1 / 32

# void* memcpy(void* to, const void* from, size_t bytes): copied as slices, bytes go through numba's loop for arrays of
# any kind
_copy_bytes = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


@dataclass(frozen=True)
class Samples:
    """N samples in order.

    `files`: what the images lie in, uint8 each; `file`, `offset`, `bytes`: int64 [N], where; `width`, `height`: pixels
        [N], at most
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
    """Write the file again.

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
        bounds = np.searchsorted(
            starts, np.arange(int(starts[0]) // page_bytes if count else 0, last_page + 2) * page_bytes
        )
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

    The smallest page whose unused ends take less than a 32nd of the file; of those up to 64 MiB the best, if none is
    that good. A sample never crosses the border of two pages: stock FFCV reads it from one.

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
    image["mode"], image["width"], image["height"], image["data_ptr"] = (
        beton.JPG_MODE,
        samples.width,
        samples.height,
        starts,
    )
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    data: np.ndarray,
    number: int,
    file: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    target: np.ndarray,
    buffer: np.ndarray,
) -> None:
    """Those samples whose file is `number`, from `data` into `buffer`."""
    begin, to = (
        np.int64(data.ctypes.data),
        np.int64(buffer.ctypes.data),
    )  # signed: an unsigned and a signed integer would add up as floats
    for row in range(len(file)):
        if file[row] == number:
            assert 0 <= offset[row] <= len(data) - size[row]
            assert 0 <= target[row] <= len(buffer) - size[row]
            _copy_bytes(to + target[row], begin + offset[row], size[row])


@njit(nogil=True, cache=True)
def _copy_labels(labels: np.ndarray, target: np.ndarray, buffer: np.ndarray) -> None:
    for row in range(len(labels)):
        buffer[target[row] : target[row] + labels.shape[1]] = labels[row]


# ---- settle: Rows of one shard to spans in mapped files: plain JPEGs where they lie, converted ones in the spool, or
# why a row has no image.


@dataclass(frozen=True)
class Settled:
    """Of R rows: `good` bool [R], has an image; `spooled` bool [R], in the spool and not in the shard's own file; `spans` int64 [R, 2],
    begin and end there; `width`, `height` int64 [R]; `faults`: row -> why it has none."""

    good: np.ndarray
    spooled: np.ndarray
    spans: np.ndarray
    width: np.ndarray
    height: np.ndarray
    faults: dict[int, Fault]


def settle(pictures: Pictures, keys: pa.StringArray, settings: Build, spool: Spool | None) -> Settled:
    """Look at every image of a shard, and convert those that a beton does not take as they are.

    Args:
        pictures: where the images of R rows lie.
        keys: of the rows.
        settings: what is taken, and how the rest is converted.
        spool: gets the converted images; None converts nothing: what is no plain JPEG is a fault (`--no-images`).
    """
    data, spans = pictures.data, pictures.spans.copy()
    scan = scan_jpegs(data, spans, settings)
    good, spooled, faults = scan.plain.copy(), np.zeros(len(spans), np.bool_), dict(pictures.faults)
    width, height = scan.width, scan.height
    for row in np.flatnonzero(~good & (spans[:, 0] >= 0)).tolist():
        begin, end = spans[row].tolist()
        try:
            if end - begin > MAX_BYTES:
                raise BadImage("image file too large", f"{end - begin} bytes; allowed: {MAX_BYTES}")
            image = data[begin:end].tobytes()
            if spool is None:
                width[row], height[row] = lying(image, settings)
            else:
                jpeg, width[row], height[row] = prepare(image, settings)
                if jpeg is not image:
                    spans[row], spooled[row] = spool.append(jpeg), True
            good[row] = True
        except BadImage as error:
            faults[row] = Fault(keys[row].as_py(), error.reason, str(error))
    if settings.decode_check == "full":
        check, address = DecodeCheck(), data.ctypes.data
        for row in np.flatnonzero(good & ~spooled).tolist():
            begin, end = spans[row].tolist()
            if told := check.fault(address + begin, end - begin, int(width[row]), int(height[row])):
                faults[row], good[row] = Fault(keys[row].as_py(), "image cut or damaged", told), False
    return Settled(good, spooled, spans, width, height, faults)


@dataclass(frozen=True)
class GroupTask:
    """`options`: fingerprint of what decides the betons' bytes beside the label files'; `copy`: False writes spans
    (`--no-images`).
    """

    group: Group
    label_limit: int
    captions: tuple[Choice, ...]
    out: Path
    settings: Build
    options: str
    copy: bool

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
    """R rows of a group. `member`: int64 [R], position of the row's shard in the group; `labels`: int32 [R, K] (K = 0 for spans);
    `faults`: row -> shard and why it has no image. The rest as in Samples."""

    files: list[np.ndarray]
    member: np.ndarray
    file: np.ndarray
    good: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    faults: dict[int, tuple[str, Fault]]


def write_group(task: GroupTask) -> GroupMarker:
    """Write the group's files and its marker; return the marker."""
    layout, group = Layout(task.out), task.group
    task.marker.unlink(missing_ok=True)  # an older marker must not vouch for the new files
    scratch = None
    if not is_remote(task.out):
        scratch = layout.betons if task.copy else layout.image_index
        scratch.mkdir(parents=True, exist_ok=True)
    files = []
    with ExitStack() as held:
        spool = held.enter_context(Spool(scratch)) if task.copy else None
        rows = _collect(task, spool, scratch)
        for number, order in enumerate(row_order(group, task.settings), start=group.first):
            kept = order[rows.good[order]]
            with atomic_write(task.file(number)) as partial:
                size, digest = (
                    _write_copies(partial, rows, kept) if task.copy else _write_image_index(partial, group, rows, kept)
                )
            shards = [group.members[member].part.name for member in np.unique(rows.member[order])]
            rejected = _reasons(rows.faults[row][1] for row in order[~rows.good[order]].tolist())
            files.append(
                BetonPart(
                    number=number, shards=shards, samples=len(kept), bytes=size, sha256=digest, quarantined=rejected
                )
            )
    reasons = _reasons(fault for _, fault in rows.faults.values())
    marker = GroupMarker(options=task.options, **group.wanted, files=files, reasons=reasons)
    faults = [[shard, fault.key, fault.reason, fault.detail] for _, (shard, fault) in sorted(rows.faults.items())]
    write_marker(task.marker, marker, faults)
    return marker


def _collect(task: GroupTask, spool: Spool | None, scratch: Path | None) -> _Rows:
    """All rows of the group, in the shards' order."""
    columns: list[tuple[np.ndarray, ...]] = []
    files: list[np.ndarray] = []
    faults: dict[int, tuple[str, Fault]] = {}
    first = 0
    for at, member in enumerate(task.group.members):
        keys, labels = _labels(task, member)
        pictures = find_pictures(member.shard, keys, task.captions, scratch)
        found = settle(pictures, keys, task.settings, spool)
        files.append(pictures.data)
        faults |= {first + row: (member.part.name, fault) for row, fault in found.faults.items()}
        index = np.arange(len(keys)) + member.part.first_index
        size = found.spans[:, 1] - found.spans[:, 0]
        own_file = np.where(found.spooled, len(task.group.members), at)
        columns.append(
            (
                np.full(len(keys), at),
                own_file,
                found.good,
                found.spans[:, 0],
                size,
                found.width,
                found.height,
                index,
                labels,
            )
        )
        first += len(keys)
    if spool is not None:
        files.append(spool.view())
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    return _Rows(files, *joined, faults=faults)


def _labels(task: GroupTask, member: Member) -> tuple[Any, np.ndarray]:
    """Keys of a shard's rows, and their padded label rows int32 [rows, K]; for spans, which hold none, K is 0."""
    names = ["key", "label_ids"] if task.copy else ["key"]
    with local_copy(Layout(task.out).label_file(member.part.name)) as path:
        table = pq.read_table(path, columns=names).combine_chunks()
    keys = table["key"].chunk(0)
    if not task.copy:
        return keys, np.empty((len(keys), 0), np.int32)
    lists = table["label_ids"].chunk(0)
    return keys, pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), task.label_limit)


def _write_copies(path: Path, rows: _Rows, kept: np.ndarray) -> tuple[int, str]:
    parts = (rows.file, rows.offset, rows.bytes, rows.width, rows.height, rows.index, rows.labels)
    return write_beton(path, Samples(rows.files, *(part[kept] for part in parts)))


def _write_image_index(path: Path, group: Group, rows: _Rows, kept: np.ndarray) -> tuple[int, str]:
    spans = np.zeros(len(kept), IMAGE_SPAN)
    spans["shard"] = np.array([member.number for member in group.members])[rows.member[kept]]
    for name in ("bytes", "offset", "index", "width", "height"):
        spans[name] = getattr(rows, name)[kept]
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, spans, version=(1, 0))
    path.write_bytes(buffer.getbuffer())
    return buffer.getbuffer().nbytes, hashlib.sha256(buffer.getbuffer()).hexdigest()


def _reasons(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(sorted(Counter(fault.reason for fault in faults).items()))
