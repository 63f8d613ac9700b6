"""Label rows as a Parquet file, batch by batch: Arrow rows and flat ids in, labels/<shard>.parquet out."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from labels.schema import LABELS
from preprocess.hashed_file import HashedFile

# Measured on web captions: two thirds of the time of everything under zstd, and hardly larger. Packed ids are too dense to compress
# further; dictionaries and statistics do not pay; byte-stream split would be smaller, but DuckDB shells before 2.0 cannot read it.
_PACKED = ("token_ids.list.element", "label_ids.list.element")
_FORM: dict[str, Any] = {
    "compression": {**dict.fromkeys(LABELS.names[:4], "zstd"), **dict.fromkeys(_PACKED, "none")},
    "column_encoding": {**dict.fromkeys(_PACKED, "DELTA_BINARY_PACKED"), **dict.fromkeys(("key", "uid"), "DELTA_LENGTH_BYTE_ARRAY")},
    "use_dictionary": False,
    "write_statistics": False,
}


class LabelFile:
    """Writes one label file; `rows`, `tokens`, `keys_sha256` and `sha256` tell afterwards what is in it.

    `keys_sha256` covers the keys in row order, each followed by a line feed: two builds with the same one have the same rows.
    """

    def __init__(self, path: Path) -> None:
        self.rows = self.tokens = 0
        self._keys = hashlib.sha256()
        self._file = HashedFile(path)
        self._writer = pq.ParquetWriter(self._file, LABELS, **_FORM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._writer.close()
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
            ids: int32 [T]; offsets: int64 [N + 1].
            label_ids: int32 [T'], a row's ascending and distinct; label_offsets: int64 [N + 1].
        """
        if not len(rows):
            return
        columns = [rows[name].cast(LABELS.field(name).type) for name in LABELS.names[:4]]
        columns += [list_array(ids, offsets), list_array(label_ids, label_offsets)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=LABELS))
        # Joined in Arrow: a Python string for every key would cost more than its labels.
        for chunk in pc.binary_join_element_wise(columns[0], "", "\n").chunks:
            first, last = chunk.offset, chunk.offset + len(chunk)
            offsets32 = np.frombuffer(chunk.buffers()[1], np.int32)
            self._keys.update(memoryview(chunk.buffers()[2])[offsets32[first] : offsets32[last]])
        self.rows += len(rows)
        self.tokens += len(ids)


def list_array(ids: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """int32 [T] and int64 [N + 1] as N lists."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()), type=LABELS.field("label_ids").type)
