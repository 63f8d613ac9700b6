"""Label rows as a Parquet file, batch by batch: Arrow rows and flat ids in, labels/<shard>.parquet out.

    a batch -> a row group: for each column one page (label_pages.py) behind its header; at the end the footer (label_format.py)

pyarrow's own writer takes longer over these columns than tokenizing does: a level and a number at a time (docs/experiments.md).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.schema import LABELS
from preprocess.hashed_file import HashedFile
from preprocess.inputs.columns import offsets_and_bytes
from preprocess.label_format import COLUMNS, MAGIC, Page, column_chunk, footer, page_header, row_group
from preprocess.label_pages import put_lists, put_numbers, room_for
from preprocess.thrift import Value, varint

_MOST_IDS = 1 << 24
"""Ids of one column of a row group, unless it is of one row."""


class LabelFile:
    """Writes one label file; `rows`, `tokens`, `keys_sha256` and `sha256` tell afterwards what is in it.

    `keys_sha256` covers the keys in row order, each followed by a line feed: two builds with the same one have the same rows.
    """

    def __init__(self, path: Path) -> None:
        self.rows = self.tokens = 0
        self._keys = hashlib.sha256()
        self._groups: list[Value] = []
        self._zstd = pa.Codec("zstd")
        self._room = np.empty(0, np.uint8)
        self._file = HashedFile(path)
        self._file.write(MAGIC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.write(footer(self.rows, self._groups))
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of the file, once it is closed."""
        return self._file.sha256

    @property
    def keys_sha256(self) -> str:
        return self._keys.hexdigest()

    def write(self, rows: pa.Table, ids: np.ndarray, offsets: np.ndarray, label_ids: np.ndarray, label_offsets: np.ndarray) -> None:
        """Append N rows.

        Args:
            rows: columns key, uid, width, height.
            ids: int32 [T]; offsets: int64 [N + 1], from 0 to T.
            label_ids: int32 [T'], a row's ascending and distinct; label_offsets: int64 [N + 1], from 0 to T'.

        Raises:
            ValueError: a key is null, or ids and offsets are not as told here.
        """
        if rows["key"].null_count:
            raise ValueError(f"{rows['key'].null_count} of {len(rows)} keys are null")
        ids, label_ids = _checked(ids, offsets, len(rows)), _checked(label_ids, label_offsets, len(rows))
        if len(rows) > 1 and max(len(ids), len(label_ids)) > _MOST_IDS:
            half = len(rows) // 2
            for part in (slice(0, half), slice(half, len(rows))):
                lists = _part(ids, offsets, part), _part(label_ids, label_offsets, part)
                self.write(rows.slice(part.start, part.stop - part.start), *lists[0], *lists[1])
        elif len(rows):
            columns = [_one_array(rows[name].cast(LABELS.field(name).type)) for name in LABELS.names[:4]]
            self._write_group(columns, (ids, offsets), (label_ids, label_offsets))
            self._hash_keys(columns[0])
            self.rows += len(rows)
            self.tokens += len(ids)

    def _hash_keys(self, keys: pa.StringArray) -> None:
        # Joined in Arrow: a Python string for every key would cost more than its labels.
        offsets, text = offsets_and_bytes(pc.binary_join_element_wise(keys, "", "\n"))
        self._keys.update(text[offsets[0] : offsets[-1]].data)

    def _write_group(self, scalars: list[pa.Array], *lists: tuple[np.ndarray, np.ndarray]) -> None:
        begin, rows, chunks = self._file.size, len(scalars[0]), []
        # One after another: a page may lie in the room that the next one is made in.
        for column, page in zip(COLUMNS, self._pages(scalars, lists), strict=True):
            place, header = self._file.size, page_header(column, page, rows)
            for part in (header, page.levels, page.values):
                self._file.write(part)
            chunks.append(column_chunk(column, page, len(header), place))
        self._groups.append(row_group(rows, begin, chunks))

    def _pages(self, scalars: list[pa.Array], lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Page]:
        key, uid, *sizes = scalars
        keys = self._strings(key)
        yield keys
        # The rows of a table with uids alone have them as keys too: compressed once.
        yield replace(keys, levels=_levels(uid)) if uid.equals(key) else self._strings(uid, _levels(uid))
        for column in sizes:
            values = column.drop_null()
            raw = values.to_numpy().view(np.uint8)
            yield Page(len(column), column.null_count, _levels(column), 0, self._compressed(raw), len(raw))
        for ids, offsets in lists:
            room = self._room_for(room_for(len(offsets) - 1, len(ids)))
            empty, repetition, levels, end = put_lists(ids, offsets, room)
            yield Page(len(ids) + empty, empty, room[:levels].data, repetition, room[levels:end].data, end - levels)

    def _strings(self, column: pa.StringArray, levels: bytes = b"") -> Page:
        """As DELTA_LENGTH_BYTE_ARRAY: all lengths, then all bytes."""
        offsets, text = offsets_and_bytes(column.drop_null())
        text = text[offsets[0] : offsets[-1]]
        room = self._room_for(room_for(0, len(offsets)) + len(text))
        end = put_numbers(np.diff(offsets), room)
        size = end + len(text)
        room[end:size] = text
        return Page(len(column), column.null_count, levels, 0, self._compressed(room[:size]), size)

    def _compressed(self, raw: np.ndarray) -> memoryview:
        compressed = self._zstd.compress(raw)
        return memoryview(compressed)[: compressed.size]  # pyarrow's view is as long as the room was

    def _room_for(self, size: int) -> np.ndarray:
        if len(self._room) < size:
            self._room = np.empty(size, np.uint8)
        return self._room


def _levels(column: pa.Array) -> bytes:
    """Definition levels of a column that may have nulls, which are 0: as a run of one level where that is all there is, else bit by bit."""
    if column.null_count in (0, len(column)):
        return varint(len(column) << 1) + bytes([column.null_count == 0])
    bits = np.packbits(column.is_valid().to_numpy(zero_copy_only=False), bitorder="little")
    return varint(len(bits) << 1 | 1) + bits.tobytes()


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _checked(ids: np.ndarray, offsets: np.ndarray, rows: int) -> np.ndarray:
    """The ids if they are int32, and the offsets those of so many rows. Never to be written to: one type, so kernels are compiled once."""
    fit = len(offsets) == rows + 1 and (offsets[0], offsets[-1]) == (0, len(ids)) and (offsets[1:] >= offsets[:-1]).all()
    if ids.dtype != np.int32 or not fit:
        raise ValueError(f"{len(ids)} ids of {ids.dtype} and {len(offsets)} offsets from {offsets[:1]} to {offsets[-1:]} for {rows} rows")
    ids = np.ascontiguousarray(ids).view()
    ids.flags.writeable = False
    return ids


def _part(ids: np.ndarray, offsets: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Of lists, those of some rows."""
    kept = offsets[rows.start : rows.stop + 1]
    return ids[kept[0] : kept[-1]], kept - kept[0]
