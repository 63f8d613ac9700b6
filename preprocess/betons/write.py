"""One group of shards to its betons, or to its files of places: the unit of work of the second pass.

shards + labels/<shard>.parquet -> places of all images (a spool holds the converted ones) -> beton/<nnnnn>.beton ...
                                                            --no-images: places/<nnnnn>.npy ...
    left out: reason and detail ------------------------------------> done/beton/<nnnnn>.json, named after the first
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from labels.layout import Layout
from labels.manifest import BetonPart
from labels.places import PLACE
from labels.settings import Build
from labels.sparse import pad_rows
from labels.storage import is_remote, local_copy, whole_file
from preprocess.beton_writer import Samples, write_beton
from preprocess.betons.plan import Group, Member, image_folder, row_order
from preprocess.readers.base import Fault
from preprocess.readers.caption_key import Choice
from preprocess.readers.images import find_pictures
from preprocess.readers.scratch import Spool
from preprocess.settle import settle
from preprocess.stage import GroupMarker, Stage, write_marker


@dataclass(frozen=True)
class GroupTask:
    """`options`: fingerprint of what decides the betons' bytes beside the label files'; `copy`: False writes places (`--no-images`)."""

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
        return layout.beton_marker(self.group.first) if self.copy else layout.place_marker(self.group.first)

    def file(self, number: int) -> Path:
        """The beton or image index file of this number."""
        layout = Layout(self.out)
        return layout.beton_file(number) if self.copy else layout.place_file(number)

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
    """R rows of a group. `member`: int64 [R], position of the row's shard in the group; `labels`: int32 [R, K] (K = 0 for places);
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
        scratch = layout.betons if task.copy else layout.places
        scratch.mkdir(parents=True, exist_ok=True)
    files = []
    with ExitStack() as held:
        spool = held.enter_context(Spool(scratch)) if task.copy else None
        rows = _collect(task, spool, scratch)
        for number, order in enumerate(row_order(group, task.settings), start=group.first):
            kept = order[rows.good[order]]
            with whole_file(task.file(number)) as partial:
                size, digest = _write_copies(partial, rows, kept) if task.copy else _write_places(partial, group, rows, kept)
            shards = [group.members[member].part.name for member in np.unique(rows.member[order])]
            rejected = _reasons(rows.faults[row][1] for row in order[~rows.good[order]].tolist())
            files.append(BetonPart(number=number, shards=shards, samples=len(kept), bytes=size, sha256=digest, quarantined=rejected))
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
        size = found.places[:, 1] - found.places[:, 0]
        own_file = np.where(found.spooled, len(task.group.members), at)
        columns.append(
            (
                np.full(len(keys), at),
                own_file,
                found.good,
                found.places[:, 0],
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
    """Keys of a shard's rows, and their padded label rows int32 [rows, K]; for places, which hold none, K is 0."""
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


def _write_places(path: Path, group: Group, rows: _Rows, kept: np.ndarray) -> tuple[int, str]:
    places = np.zeros(len(kept), PLACE)
    places["shard"] = np.array([member.number for member in group.members])[rows.member[kept]]
    for name in ("bytes", "offset", "index", "width", "height"):
        places[name] = getattr(rows, name)[kept]
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, places, version=(1, 0))
    path.write_bytes(buffer.getbuffer())
    return buffer.getbuffer().nbytes, hashlib.sha256(buffer.getbuffer()).hexdigest()


def _reasons(faults: Iterable[Fault]) -> dict[str, int]:
    return dict(sorted(Counter(fault.reason for fault in faults).items()))
