"""One shard of captions to one label file: the unit of work of the first pass.

shard.tar -> walk (headers; txt and json bytes) -> tokenize -> labels/<shard>.parquet -> done/labels/<shard>.json
                 left out: reason and detail -------------------------------------------^
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.files import sha256_file, write_json, write_whole
from labels.layout import Layout
from labels.schema import LABELS
from labels.settings import Labels
from labels.sparse import unique_sorted
from preprocess.images import image_size
from preprocess.shards import Shard
from preprocess.tars import Fault, Sample, walk
from preprocess.tokenizer import Tokenizer, make_tokenizer

_ROWS_AT_ONCE = 4096
_HEAD_BYTES = 1 << 16
_MAX_SIDE = (1 << 31) - 1


@dataclass(frozen=True)
class LabelTask:
    """Everything a worker needs. `options`: fingerprint of what decides the rows, written into the marker."""

    shard: Shard
    out: Path
    settings: Labels
    options: str


@dataclass(frozen=True)
class Row:
    """A sample that is kept, before tokenizing."""

    key: str
    uid: str | None
    width: int | None
    height: int | None
    caption: str


def label_shard(task: LabelTask) -> dict[str, Any]:
    """Write one label file and its marker; return the marker.

    The marker is the JSON that says: this file is whole, made from this tar with these options.
    """
    layout = Layout(task.out)
    path, marker_path = layout.label_file(task.shard.name), layout.label_marker(task.shard.name)
    marker_path.unlink(missing_ok=True)  # an older marker must not vouch for the new file
    tokenizer = make_tokenizer(task.settings.tokenizer)
    faults: list[Fault] = []
    rows: list[Row] = []
    with task.shard.open() as file:
        for sample in walk(file, task.shard.bytes):
            row = sample if isinstance(sample, Fault) else read_row(sample)
            if isinstance(row, Fault):
                faults.append(row)
            else:
                rows.append(row)
    write_whole(path, lambda partial: _write_rows(partial, rows, tokenizer, task.settings.context))
    marker = {
        "options": task.options,
        "source": task.shard.source,
        "shard": task.shard.name,
        "rows": len(rows),
        "sha256": sha256_file(path),
        "faults": [[fault.key, fault.reason, fault.detail] for fault in faults],
    }
    write_json(marker_path, marker)
    return marker


def read_row(sample: Sample) -> Row | Fault:
    """What a label row needs of a sample, or why it has to be left out."""
    if sample.image_suffix is None:
        return Fault(sample.key, "no image", f"members: {', '.join(sample.members) or 'none'}")
    metadata = _metadata(sample)
    if isinstance(metadata, Fault):
        return metadata
    caption = _caption(sample, metadata)
    if isinstance(caption, Fault):
        return caption
    uid = metadata.get("uid")
    width, height = _size(metadata.get("width"), metadata.get("height")) or _header_size(sample, sample.image_suffix) or (None, None)
    return Row(sample.key, uid if isinstance(uid, str) else None, width, height, caption)


def _metadata(sample: Sample) -> dict[str, Any] | Fault:
    """The sample's json, empty if it has none."""
    raw = sample.read("json")
    if raw is None:
        return {}
    try:
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
        str(value.get("uid", "")).encode("utf8")
    except (ValueError, RecursionError) as error:
        return Fault(sample.key, "json is damaged", str(error))
    return value


def _size(width: Any, height: Any) -> tuple[int, int] | None:
    """Both, if they are whole numbers that the table can hold."""
    return (width, height) if all(type(side) is int and 0 < side <= _MAX_SIDE for side in (width, height)) else None


def _header_size(sample: Sample, suffix: str) -> tuple[int, int] | None:
    """Pixels by the image's header: its first bytes, or the whole file where the header reaches further."""
    size = image_size(sample.read(suffix, _HEAD_BYTES) or b"")
    if size is None and sample.members[suffix].size > _HEAD_BYTES:
        size = image_size(sample.read(suffix) or b"")
    return _size(*size) if size else None


def _caption(sample: Sample, metadata: dict[str, Any]) -> str | Fault:
    """The txt member, else the json's `caption`."""
    raw = sample.read("txt")
    if raw is None:
        value = metadata.get("caption")
        if not isinstance(value, str):
            return Fault(sample.key, "no caption", "neither a .txt member nor a string `caption` in the json")
        try:
            raw = value.encode("utf8")
        except UnicodeEncodeError as error:
            return Fault(sample.key, "caption is not UTF-8", str(error))
    try:
        caption = raw.decode("utf8")
    except UnicodeDecodeError as error:
        return Fault(sample.key, "caption is not UTF-8", str(error))
    if not caption.strip():
        return Fault(sample.key, "empty caption", f"{len(raw)} bytes of white space")
    return caption


def _write_rows(path: Path, rows: list[Row], tokenizer: Tokenizer, context: int) -> None:
    with pq.ParquetWriter(path, LABELS, compression="zstd") as writer:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            ids, offsets = tokenizer.encode([row.caption for row in part], context)
            label_ids, label_offsets = unique_sorted(ids, offsets, tokenizer.excluded)
            columns = [pa.array([getattr(row, name) for row in part], LABELS.field(name).type) for name in LABELS.names[:4]]
            columns += [_list_array(offsets, ids), _list_array(label_offsets, label_ids)]
            writer.write_table(pa.Table.from_arrays(columns, schema=LABELS))


def _list_array(offsets: np.ndarray, ids: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()), type=LABELS.field("label_ids").type)
