"""One shard of captions to one label file: the unit of work of the first pass.

    shard -> batches of captions -> ids -> labels/<shard>.parquet, counts/<shard>.parquet -> done/labels/<shard>.json
               rejected samples: key, reason and detail -------------------------------------^

An image fault does not remove a label row: rows depend on captions alone, so that labels can be rebuilt with another
tokenizer for the same rows. A sample with a bad image keeps its row, and is in no beton.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from labels.manifest import LABELS
from labels.settings import Labels
from labels.storage import Layout, atomic_write, sha256_file
from labels.subset import count_in, open_subset, parse_uids
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.counts import ShardCounts
from preprocess.readers import read_rows
from preprocess.readers.base import Choice, Fault, RowBatch
from preprocess.readers.columns import offsets_and_bytes
from preprocess.readers.shards import Shard
from preprocess.stage import LabelMarker, Stage, write_marker

# Measured on web captions (docs/experiments.md): the fastest that is no larger. Packed differences of ids are too dense
# to compress; dictionaries and statistics take time and save nothing. All of it is read by DuckDB 1.1 and Spark's fast
# reader.
_KEYS, _SIZES = ("key", "uid"), ("width", "height")
_IDS = ("token_ids.list.element", "label_ids.list.element")
_PARQUET: dict[str, Any] = {
    "compression": dict.fromkeys((*_KEYS, *_SIZES), "zstd") | dict.fromkeys(_IDS, "none"),
    "column_encoding": dict.fromkeys(_KEYS, "DELTA_LENGTH_BYTE_ARRAY") | dict.fromkeys(_IDS, "DELTA_BINARY_PACKED"),
    "use_dictionary": False,
    "write_statistics": False,
}
"""Of pyarrow's ParquetWriter, for label files."""


@dataclass(frozen=True)
class LabelTask:
    """Everything a worker needs. `options`: fingerprint of what decides the rows, written into the marker."""

    shard: Shard
    out: Path
    settings: Labels
    captions: tuple[Choice, ...]
    subset: bool
    options: str
    file_count: int = 1

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def shards(self) -> tuple[str, ...]:
        return (self.shard.name,)

    def is_done(self, marker: LabelMarker, sizes: Mapping[str, int]) -> bool:
        file = f"{self.shard.name}.parquet"
        same = (marker.options, marker.source) == (self.options, self.shard.source)
        return same and f"labels/{file}" in sizes and sizes.get(f"counts/{file}") == marker.count_bytes


def label_stage(layout: Layout) -> Stage[LabelTask, LabelMarker]:
    """The first stage of a build: a label file for each shard."""
    return Stage("labels", label_shard, LabelMarker, layout.markers / "labels", [layout.labels, layout.counts])


def label_shard(task: LabelTask) -> LabelMarker:
    """Write one label file, its counts and its marker; return the marker."""
    layout = Layout(task.out)
    marker_path = layout.label_marker(task.shard.name)
    marker_path.unlink(missing_ok=True)  # an older marker must not vouch for the new files
    tokenizer = make_tokenizer(task.settings)
    subset = open_subset(layout.subset) if task.subset else None
    faults: list[Fault] = []
    outside = 0

    def batches() -> Iterator[pa.Table]:
        nonlocal outside
        for batch in read_rows(task.shard, task.captions):
            faults.extend(batch.faults)
            if subset is not None:
                batch, skipped = select_rows(batch, subset)
                outside += skipped
            ids = tokenizer.encode_rows(batch.table["caption"], task.settings.context)
            yield label_table(batch.table, *ids)

    written = write_labels(layout, task.shard.name, batches())
    marker = LabelMarker(
        options=task.options,
        source=task.shard.source,
        shard=task.shard.name,
        **written,
        outside_subset=outside,
        reasons=dict(sorted(Counter(fault.reason for fault in faults).items())),
    )
    write_marker(marker_path, marker, [[fault.key, fault.reason, fault.detail] for fault in faults])
    return marker


def select_rows(batch: RowBatch, subset: np.ndarray) -> tuple[RowBatch, int]:
    """The rows of a batch whose uid is in `subset`, sorted UIDS [U], as often as it is there; and the number skipped.

    A row without a uid is in no subset. Faults are kept: their uids are not known.
    """
    uids, rows = parse_uids(batch.table["uid"].combine_chunks())  # type: ignore[arg-type]
    counts = count_in(uids, subset)
    table = batch.table.take(pa.array(np.repeat(rows, counts)))
    return RowBatch(table, batch.faults), len(batch.table) - int(np.count_nonzero(counts))


def label_table(
    rows: pa.Table, ids: np.ndarray, offsets: np.ndarray, label_ids: np.ndarray, label_offsets: np.ndarray
) -> pa.Table:
    """N rows of schema LABELS; only the offsets are copied.

    `rows`: key, uid, width, height; `ids`: int32 [T], `offsets`: int64 [N + 1] from 0 to T; `label_ids`, ascending and
    distinct in each row, likewise.

    Raises:
        ValueError: ids and offsets do not fit each other or the rows.
    """
    columns = [rows[name].cast(LABELS.field(name).type) for name in (*_KEYS, *_SIZES)]
    for name, flat, ends in (("token_ids", ids, offsets), ("label_ids", label_ids, label_offsets)):
        fit = len(ends) == len(rows) + 1 and (ends[0], ends[-1]) == (0, len(flat)) and (ends[1:] >= ends[:-1]).all()
        if flat.dtype != np.int32 or not fit:
            raise ValueError(
                f"{name}: {len(flat)} ids of {flat.dtype} do not fit {len(ends)} offsets, {len(rows)} rows"
            )
        list_type = LABELS.field(name).type
        columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat), type=list_type))
    return pa.Table.from_arrays(columns, schema=LABELS)


def write_labels(layout: Layout, shard: str, batches: Iterable[pa.Table]) -> dict[str, Any]:
    """Write labels/<shard>.parquet, a row group for each batch, and counts/<shard>.parquet; return their fields of
    LabelMarker.

    `keys_sha256` covers the keys in row order, each followed by a line feed: where it is equal, the rows are the same.

    Raises:
        ValueError: a key is null, or a batch has another schema than LABELS.
    """
    rows = tokens = unlabelled = 0
    keys, counts = hashlib.sha256(), ShardCounts()
    with atomic_write(layout.label_file(shard)) as partial:
        with pq.ParquetWriter(partial, LABELS, **_PARQUET) as writer:
            for batch in batches:
                if not len(batch):
                    continue
                writer.write_table(batch)
                # Joined in Arrow: a Python string for every key would cost more than its labels.
                for lines in pc.binary_join_element_wise(batch["key"], "", "\n").chunks:
                    offsets, text = offsets_and_bytes(lines)
                    keys.update(text[offsets[0] : offsets[-1]].data)
                counts.add(pc.list_flatten(batch["label_ids"]).to_numpy())
                rows += len(batch)
                tokens += pc.sum(pc.list_value_length(batch["token_ids"])).as_py()
                unlabelled += pc.sum(pc.equal(pc.list_value_length(batch["label_ids"]), 0)).as_py()
        sha256 = sha256_file(partial)
        count_bytes = counts.write(layout.count_file(shard))
    return {
        "rows": rows,
        "tokens": tokens,
        "unlabelled": unlabelled,
        "sha256": sha256,
        "count_bytes": count_bytes,
        "keys_sha256": keys.hexdigest(),
    }
