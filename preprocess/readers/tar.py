"""A webdataset tar's captions as rows: `read_tar_rows` -> RowBatch.

    any tar             walk() -> Sample | Fault -> read_row() -> Row | Fault
    local, healthy tar  tar_index.py -> spans of all members -> _plain_rows(): rows as img2dataset writes them, at once
                                                             -> read_row(): the other samples

The rows are the same either way. `Sample.read` reads one member; `_plain_rows` takes the members of healthy tars in
bulk. `read_row` is the reference: it decides what a row is, and why a sample is rejected. A caption that is not UTF-8
becomes a Fault in `_caption` (tables: columns.row_captions), a json that is not UTF-8 one in `_metadata`.
The key is everything before the first dot of the basename; members without key or suffix belong to no sample. A sample
with a member that cannot be read in place (sparse, a symbolic link) is rejected: labels/tars.py lists them.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from labels.storage import is_url
from labels.tars import ADJACENT, AFTER_END, SORT_FIX, TAR_REASONS, TarFault, split_name, tar_members
from preprocess.betons.images import image_size
from preprocess.readers.base import (
    BATCH_ROWS,
    IMAGE_SUFFIXES,
    MAX_SIDE,
    ROWS,
    WHITE_SPACE,
    Choice,
    Fault,
    RowBatch,
    join_captions,
    narrow_choices,
)
from preprocess.readers.shards import Shard
from preprocess.readers.tar_index import TarIndex, gather_strings, index_tar

REPEATED, APART = "repeated key", "members not adjacent"
_HEAD_BYTES = 1 << 16  # of an image, for its size
_JSON_FIELDS = {"uid": pa.string(), "width": pa.int32(), "height": pa.int32()}


@dataclass(frozen=True)
class Sample:
    """The members of one key: lower-case suffix -> begin and end in the tar, in the tar's order."""

    key: str
    members: dict[str, tuple[int, int]]
    source: BinaryIO | np.ndarray  # the open tar, or uint8 [bytes of the tar]

    def read(self, suffix: str, limit: int | None = None) -> bytes | None:
        """The first `limit` bytes (None: all) of the member with this suffix; None if there is no such member."""
        if suffix not in self.members:
            return None
        begin, end = self.members[suffix]
        count = end - begin if limit is None else min(limit, end - begin)
        if isinstance(self.source, np.ndarray):
            return self.source[begin : begin + count].tobytes()
        self.source.seek(begin)
        return self.source.read(count)

    @property
    def image_suffix(self) -> str | None:
        """Suffix of the member that holds the image, if there is one."""
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


@dataclass(frozen=True)
class Row:
    """The columns of ROWS for one sample."""

    key: str
    uid: str | None
    width: int | None
    height: int | None
    caption: str


def read_tar_rows(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    """All rows of a tar in its order; of `choices`, items of tables are ignored."""
    choices = _of_tars(choices)
    index = local_index(shard, choices)
    if index is None:
        yield from _walked(shard, choices)
        return
    for start in range(0, len(index.keys), BATCH_ROWS):
        yield _indexed(index, choices, start, min(start + BATCH_ROWS, len(index.keys)))


def local_index(shard: Shard, choices: tuple[Choice, ...]) -> TarIndex | None:
    """The compiled index of a healthy local tar, else None."""
    return None if is_url(shard.path) else index_tar(Path(shard.path), shard.bytes, wanted_suffixes(choices))


def wanted_suffixes(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """The members that rows and images are made of: json first, then the images', then the captions'."""
    members = [item.name for choice in _of_tars(choices) for item in choice.items if item.kind == "member"]
    return tuple(dict.fromkeys(["json", *IMAGE_SUFFIXES, "txt", *members]))


def _of_tars(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    return narrow_choices(choices, lambda item: item.kind in ("member", "json"))


def _walked(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    """All faults come with the last batch: only then it is known which samples lack members that come later."""
    rows: list[Row] = []
    faults: list[Fault] = []
    with shard.open() as file:
        for sample in walk(file, shard.bytes):
            row = sample if isinstance(sample, Fault) else read_row(sample, choices)
            if isinstance(row, Fault):
                faults.append(row)
            else:
                rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield RowBatch(_table(rows), [])
                rows = []
    yield RowBatch(_table(rows), _one_of_each_sample(faults))


def _one_of_each_sample(faults: list[Fault]) -> list[Fault]:
    """Of a sample whose members are apart, that fault alone, and not what each part lacks."""
    apart = {fault.key: fault for fault in reversed(faults) if fault.reason == APART}
    kept: dict[int | str, Fault] = {}
    for number, fault in enumerate(faults):
        is_apart = fault.key in apart and fault.reason not in (REPEATED, *TAR_REASONS)
        kept[fault.key if is_apart else number] = apart[fault.key] if is_apart else fault
    return list(kept.values())


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(map(vars, rows)), schema=ROWS)


# -- a tar's samples, by its headers


def walk(file: BinaryIO, size: int) -> Iterator[Sample | Fault]:
    """All samples of a tar of `size` bytes in order, by walking its headers; a cut or damaged tar ends with a Fault.

    The first members of a key are its sample: later ones are a Fault, REPEATED or APART.
    """
    key = ""
    members: dict[str, tuple[int, int]] = {}
    problem: TarFault | None = None  # the first of these members
    seen: dict[str, tuple[str, ...]] = {}  # key -> suffixes

    def finished() -> Sample | Fault:
        earlier = seen.get(key)
        seen[key] = (*(earlier or ()), *members)
        if earlier is None:
            return Fault(key, problem.reason, str(problem)) if problem else Sample(key, members, file)
        if not members.keys().isdisjoint(earlier):
            return Fault(key, REPEATED, "the key occurred before in this tar")
        detail = f"{', '.join(members)} after other samples; allowed: {ADJACENT}; {SORT_FIX}"
        return Fault(key, APART, detail)

    try:
        for member in tar_members(file, size):
            next_key, suffix = split_name(member.name)
            if not next_key:
                continue
            if next_key != key or suffix in members:
                if key:
                    yield finished()
                key, members, problem = next_key, {}, None
            members[suffix] = member.begin, member.end
            problem = problem or member.problem
    except TarFault as fault:
        if fault.reason == AFTER_END and key:
            yield finished()
            key = ""
        # Elsewhere the current key may lack members: it is lost with the rest of the tar.
        yield Fault(key, fault.reason, str(fault))
        return
    if key:
        yield finished()


# -- one sample to one row


def read_row(sample: Sample, choices: tuple[Choice, ...]) -> Row | Fault:
    """What a label row needs of a sample, or why it is rejected."""
    if sample.image_suffix is None:
        return Fault(sample.key, "no image", f"members: {', '.join(sample.members) or 'none'}")
    metadata = _metadata(sample)
    if isinstance(metadata, Fault):
        return metadata
    caption = _caption(sample, metadata, choices)
    if isinstance(caption, Fault):
        return caption
    uid = metadata.get("uid")
    size = _size(metadata.get("width"), metadata.get("height")) or _header_size(sample, sample.image_suffix)
    return Row(sample.key, uid if isinstance(uid, str) else None, *(size or (None, None)), caption)


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
    return (width, height) if all(type(side) is int and 0 < side <= MAX_SIDE for side in (width, height)) else None


def _header_size(sample: Sample, suffix: str) -> tuple[int, int] | None:
    """Pixels by the image's header: its first bytes, or the whole file where the header reaches further."""
    head = sample.read(suffix, _HEAD_BYTES) or b""
    size = image_size(head)
    if size is None and len(head) == _HEAD_BYTES:
        size = image_size(sample.read(suffix) or b"")
    return _size(*size) if size else None


def _caption(sample: Sample, metadata: dict[str, Any], choices: tuple[Choice, ...]) -> str | Fault:
    """The text of the first choice that the sample has; a text that is not UTF-8 rejects the sample."""
    for choice in choices:
        texts: list[str | bytes] = []
        for item in choice.items:
            value: Any = sample.read(item.name) if item.kind == "member" else metadata.get(item.name)
            values = value if isinstance(value, list) else [value]
            texts += [text for text in values if isinstance(text, str | bytes)]
        if not texts:
            continue
        try:
            caption = join_captions([text.decode("utf8") if isinstance(text, bytes) else text for text in texts])
            size = len(caption.encode("utf8"))
        except UnicodeError as error:
            return Fault(sample.key, "caption is not UTF-8", str(error))
        return caption if caption.strip() else Fault(sample.key, "empty caption", f"{size} bytes of white space")
    return Fault(sample.key, "no caption", f"looked for: {', '.join(map(str, choices)) or 'nothing that a tar has'}")


# -- many samples to rows at once


def _indexed(index: TarIndex, choices: tuple[Choice, ...], start: int, end: int) -> RowBatch:
    """Rows start:end of an indexed tar."""
    plain = _plain_rows(index, choices, start, end)
    table, numbers = plain or (ROWS.empty_table(), np.empty(0, np.int64))
    rows, row_numbers, faults = [], [], []
    for number in np.setdiff1d(np.arange(start, end), numbers).tolist():
        row = read_row(Sample(index.keys[number].as_py(), index.sample_members(number), index.data), choices)
        if isinstance(row, Fault):
            faults.append(row)
        else:
            rows.append(row)
            row_numbers.append(number)
    if rows:
        order = np.argsort(np.concatenate([numbers, np.array(row_numbers, np.int64)]))
        table = pa.concat_tables([table, _table(rows)]).take(pa.array(order)).combine_chunks()
    return RowBatch(table, faults)


def _plain_rows(
    index: TarIndex, choices: tuple[Choice, ...], start: int, end: int
) -> tuple[pa.Table, np.ndarray] | None:
    """Those of the rows that are as img2dataset writes them, and their numbers int64; None if this is no such tar."""
    if not choices or len(choices[0].items) != 1:
        return None
    (first,) = choices[0].items
    wanted = wanted_suffixes(choices)
    spans = index.spans[start:end]
    json_spans = spans[:, wanted.index("json")]
    has_all = (json_spans[:, 0] >= 0) & (spans[:, 1 : 1 + len(IMAGE_SUFFIXES), 0] >= 0).any(axis=1)
    if first.kind == "member":
        has_all &= spans[:, wanted.index(first.name), 0] >= 0
    numbers = np.flatnonzero(has_all)
    field = first.name if first.kind == "json" else None
    metadata = _parse_together(gather_strings(index.data, json_spans[numbers]), field)
    if metadata is None:
        return None
    if field is not None:
        captions = metadata[field]
    else:
        captions = _utf8(gather_strings(index.data, spans[numbers, wanted.index(first.name)]))
        if captions is None:
            return None  # read_row finds the sample
    width, height = metadata["width"], metadata["height"]
    visible = pc.greater(pc.binary_length(pc.utf8_ltrim(captions, characters=WHITE_SPACE)), 0)
    good = pc.and_(pc.and_(pc.greater(width, 0), pc.greater(height, 0)), visible)
    good = pc.fill_null(good, False)
    keys = index.keys.slice(start, end - start).take(pa.array(numbers))
    table = pa.table([keys, metadata["uid"], width, height, captions], names=ROWS.names).filter(good).cast(ROWS)
    return table.combine_chunks(), start + numbers[good.to_numpy()]


def _utf8(raw: pa.LargeBinaryArray) -> pa.LargeStringArray | None:
    """The bytes as strings; None if any are not UTF-8."""
    try:
        return raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        return None


def _parse_together(raw: pa.LargeBinaryArray, caption_field: str | None) -> pa.Table | None:
    """uid, width, height (and a caption) of JSON objects; None if `json.loads` might read any of them differently."""
    texts = _utf8(raw)
    if texts is None or not len(texts) or caption_field in _JSON_FIELDS:
        return None
    buffer = raw.buffers()[2]
    text = buffer.to_pybytes() if buffer else b""
    objects = pc.match_like(pc.utf8_trim(texts, characters=" \t\r\n"), r"{%}")
    # NUL: json.loads would take the text for UTF-16.
    if b"\0" in text or not objects.to_numpy(zero_copy_only=False).all():
        return None
    schema = pa.schema(_JSON_FIELDS | ({caption_field: pa.string()} if caption_field else {}))
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1)
    parse = pyarrow.json.ParseOptions(schema, newlines_in_values=True, unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(io.BytesIO(text), read, parse).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return table if len(table) == len(texts) else None
