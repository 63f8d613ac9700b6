"""A tar's captions as rows: compiled where the tar is local and healthy, sample by sample otherwise; the same rows
either way.

Rows that are anything but plain (no json, damaged json, a caption that is not UTF-8 ...) go through `read_row`, the
reference.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from preprocess.betons.images import image_size
from preprocess.readers.base import IMAGE_SUFFIXES, ROWS, Fault, RowBatch
from preprocess.readers.caption_key import Choice, join_captions
from preprocess.readers.shards import Shard
from preprocess.readers.tar_index import TarIndex, gather_strings, index_tar

# ---- tars: A webdataset tar as samples: everything before the first dot of the basename is the key, members of a key adjacent.
#
# shard.tar -> walk() -> Sample(key, members) ... | Fault(key, reason)
#
# As in webdataset, members without a key or without a suffix (README, ._x.jpg of another system) belong to no sample.


_MAX_HEADER_BYTES = 1 << 24
# Also what tarfile lets through from numbers and lengths that no writer writes.
_DAMAGED = (tarfile.TarError, EOFError, OSError, ValueError, ArithmeticError, LookupError, RecursionError, TypeError)

REPEATED = "repeated key"
"""The reason of a Fault that is one sample's; any other of `walk` ends the tar."""


@dataclass(frozen=True)
class Sample:
    """The members of one key; bytes are read on demand while the tar is open."""

    key: str
    members: dict[str, tarfile.TarInfo]
    file: BinaryIO

    def read(self, suffix: str, limit: int | None = None) -> bytes | None:
        """The first `limit` bytes (None: all) of the member with this suffix; None if there is no such member."""
        member = self.members.get(suffix)
        if member is None:
            return None
        self.file.seek(member.offset_data)
        return self.file.read(member.size if limit is None else min(limit, member.size))

    def size(self, suffix: str) -> int:
        """Bytes of the member with this suffix, 0 if there is none."""
        return self.members[suffix].size if suffix in self.members else 0

    @property
    def suffixes(self) -> list[str]:
        """All suffixes, in the tar's order."""
        return list(self.members)

    @property
    def image_suffix(self) -> str | None:
        """Suffix of the member that holds the image, if there is one."""
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


def walk(file: BinaryIO, size: int) -> Iterator[Sample | Fault]:
    """All samples of a tar in order, by walking its headers; a cut or damaged tar ends with a Fault.

    Args:
        file: the tar, binary and seekable.
        size: its length in bytes; a member that ends beyond it was cut off.
    """
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    seen: set[str] = set()

    def finished() -> Sample | Fault:
        return (
            Fault(key, REPEATED, "the key occurred before in this tar") if key in seen else Sample(key, members, file)
        )

    for member in _headers(file, size):
        if isinstance(member, Fault):
            # The key at hand may lack members: it is lost with the rest of the tar.
            yield replace(member, key=key)
            return
        next_key, suffix = _key_and_suffix(member)
        if not next_key:
            continue
        if next_key != key or suffix in members:
            if key:
                yield finished()
                seen.add(key)
            key, members = next_key, {}
        members[suffix] = member
    if key:
        yield finished()


class _Headers:
    """A tar's bytes as tarfile wants them, for headers alone: a damaged length makes no huge read, and so no huge
    buffer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, _MAX_HEADER_BYTES))


def _headers(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | Fault]:
    """Every member's header; at the first thing wrong a Fault without a key, and no more."""
    try:
        archive = tarfile.open(fileobj=_Headers(file), mode="r:", errors="surrogateescape")  # type: ignore[arg-type]  # noqa: SIM115  (the caller closes the file)
    except _DAMAGED as error:
        yield Fault("", "not a tar", str(error))
        return
    while True:
        try:
            member = archive.next()
        except _DAMAGED as error:
            yield Fault("", "tar cut or damaged", f"after byte {archive.offset}: {error}")
            return
        if member is None:
            # tarfile ends silently at a damaged header and where the end mark is missing.
            if not _is_end_mark(file, archive.offset):
                yield Fault("", "tar cut or damaged", f"neither a header nor the end mark at byte {archive.offset}")
            return
        yield member
        end = member.offset_data + member.size
        if not member.offset_data <= end <= size:
            yield Fault("", "tar cut or damaged", f"{_printable(member.name)} would end at byte {end} of {size}")
            return
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  (tarfile keeps every header it has seen)


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key (with the folder) and lower-case suffix; the key is empty where the member belongs to no sample."""
    folder, slash, base = _printable(member.name).rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem if member.isreg() and stem and suffix else "", suffix.lower())


def _printable(name: str) -> str:
    """A member name that can stand in a UTF-8 table: undecodable bytes become escapes."""
    return name.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")


def _is_end_mark(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)


_BATCH_ROWS = 32_768
_HEAD_BYTES = 1 << 16
_MAX_SIDE = (1 << 31) - 1
# What Python's str.strip removes.
_WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())


class SampleLike(Protocol):
    """A sample's members, read on demand."""

    @property
    def key(self) -> str: ...

    @property
    def image_suffix(self) -> str | None: ...

    @property
    def suffixes(self) -> list[str]: ...

    def read(self, suffix: str, limit: int | None = None) -> bytes | None:
        """The first `limit` bytes of the member with this suffix; None if there is none."""
        ...

    def size(self, suffix: str) -> int:
        """Bytes of the member with this suffix, 0 if there is none."""
        ...


@dataclass(frozen=True)
class Row:
    """A sample that is kept, before tokenizing; the columns of ROWS."""

    key: str
    uid: str | None
    width: int | None
    height: int | None
    caption: str


def read_tar_rows(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    """All rows of a tar in its order, in batches; `choices` say where a caption is looked for, those of tables aside."""
    choices = _of_tars(choices)
    index = local_index(shard, choices)
    if index is None:
        yield from _walked(shard, choices)
        return
    for start in range(0, len(index.keys), _BATCH_ROWS):
        yield _indexed(index, choices, start, min(start + _BATCH_ROWS, len(index.keys)))


def _of_tars(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    narrowed = (Choice(tuple(item for item in choice.items if item.kind in ("member", "json"))) for choice in choices)
    return tuple(choice for choice in narrowed if choice.items)


def wanted_suffixes(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """The members that rows and images are made of: json first, then the images', then the captions'."""
    members = [item.name for choice in _of_tars(choices) for item in choice.items if item.kind == "member"]
    return tuple(dict.fromkeys(["json", *IMAGE_SUFFIXES, "txt", *members]))


def local_index(shard: Shard, choices: tuple[Choice, ...]) -> TarIndex | None:
    """The compiled index of a healthy local tar, else None."""
    return None if "://" in shard.path else index_tar(Path(shard.path), shard.bytes, wanted_suffixes(choices))


def _walked(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    rows: list[Row] = []
    faults: list[Fault] = []
    with shard.open() as file:
        for sample in walk(file, shard.bytes):
            row = sample if isinstance(sample, Fault) else read_row(sample, choices)
            if isinstance(row, Fault):
                faults.append(row)
            else:
                rows.append(row)
            if len(rows) == _BATCH_ROWS:
                yield RowBatch(_table(rows), faults)
                rows, faults = [], []
    yield RowBatch(_table(rows), faults)


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_arrays(
        [pa.array([getattr(row, name) for row in rows], ROWS.field(name).type) for name in ROWS.names], schema=ROWS
    )


def read_row(sample: SampleLike, choices: tuple[Choice, ...]) -> Row | Fault:
    """What a label row needs of a sample, or why it has to be left out."""
    if sample.image_suffix is None:
        return Fault(sample.key, "no image", f"members: {', '.join(sample.suffixes) or 'none'}")
    metadata = _metadata(sample)
    if isinstance(metadata, Fault):
        return metadata
    caption = _caption(sample, metadata, choices)
    if isinstance(caption, Fault):
        return caption
    uid = metadata.get("uid")
    width, height = (
        _size(metadata.get("width"), metadata.get("height"))
        or _header_size(sample, sample.image_suffix)
        or (None, None)
    )
    return Row(sample.key, uid if isinstance(uid, str) else None, width, height, caption)


def _metadata(sample: SampleLike) -> dict[str, Any] | Fault:
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


def _header_size(sample: SampleLike, suffix: str) -> tuple[int, int] | None:
    """Pixels by the image's header: its first bytes, or the whole file where the header reaches further."""
    head = sample.read(suffix, _HEAD_BYTES) or b""
    size = image_size(head)
    if size is None and len(head) == _HEAD_BYTES:
        size = image_size(sample.read(suffix) or b"")
    return _size(*size) if size else None


def _caption(sample: SampleLike, metadata: dict[str, Any], choices: tuple[Choice, ...]) -> str | Fault:
    """The text of the first choice that the sample has."""
    for choice in choices:
        found = []
        for item in choice.items:
            value: Any = (
                sample.read(item.name)
                if item.kind == "member"
                else metadata.get(item.name)
                if item.kind == "json"
                else None
            )
            found += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str | bytes)]
        if not found:
            continue
        try:
            caption = join_captions([text.decode("utf8") if isinstance(text, bytes) else text for text in found])
            size = len(caption.encode("utf8"))
        except UnicodeError as error:
            return Fault(sample.key, "caption is not UTF-8", str(error))
        return caption if caption.strip() else Fault(sample.key, "empty caption", f"{size} bytes of white space")
    return Fault(sample.key, "no caption", f"looked for: {', '.join(map(str, choices)) or 'nothing that a tar has'}")


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a TarIndex, as `read_row` wants it."""

    index: TarIndex
    wanted: tuple[str, ...]
    number: int

    @property
    def key(self) -> str:
        return self.index.keys[self.number].as_py()

    @property
    def image_suffix(self) -> str | None:
        return next(
            (name for name in IMAGE_SUFFIXES if self.index.spans[self.number, self.wanted.index(name), 0] >= 0), None
        )

    @property
    def suffixes(self) -> list[str]:
        return self.index.suffixes(self.number)

    def read(self, suffix: str, limit: int | None = None) -> bytes | None:
        """The first `limit` bytes of the member with this suffix; None if there is none."""
        begin, end = self.index.spans[self.number, self.wanted.index(suffix)]
        return None if begin < 0 else bytes(self.index.data[begin : end if limit is None else min(end, begin + limit)])

    def size(self, suffix: str) -> int:
        """Bytes of the member with this suffix, 0 if there is none."""
        begin, end = self.index.spans[self.number, self.wanted.index(suffix)]
        return int(end - begin)


def _indexed(index: TarIndex, choices: tuple[Choice, ...], start: int, end: int) -> RowBatch:
    """Rows start:end of an indexed tar."""
    wanted = wanted_suffixes(choices)
    plain = _plain_rows(index, wanted, choices, start, end)
    odd = np.arange(start, end) if plain is None else np.setdiff1d(np.arange(start, end), plain[1])
    rows, faults, spans = [], [], []
    for number in odd:
        row = read_row(IndexedSample(index, wanted, int(number)), choices)
        if isinstance(row, Fault):
            faults.append(row)
        else:
            rows.append(row)
            spans.append(number)
    if plain is None:
        return RowBatch(_table(rows), faults)
    if not rows:
        return RowBatch(plain[0], faults)
    order = np.argsort(np.concatenate([plain[1], np.array(spans, np.int64)]))
    return RowBatch(pa.concat_tables([plain[0], _table(rows)]).take(pa.array(order)).combine_chunks(), faults)


def _plain_rows(
    index: TarIndex, wanted: tuple[str, ...], choices: tuple[Choice, ...], start: int, end: int
) -> tuple[pa.Table, np.ndarray] | None:
    """Those of the rows that are as img2dataset writes them, and their numbers int64; None if this is no such tar."""
    if not choices or len(choices[0].items) != 1:
        return None
    first = choices[0].items[0]
    spans = index.spans[start:end]
    json_spans = spans[:, wanted.index("json")]
    has_all = (json_spans[:, 0] >= 0) & (spans[:, 1 : 1 + len(IMAGE_SUFFIXES), 0] >= 0).any(axis=1)
    caption_spans = spans[:, wanted.index(first.name)] if first.kind == "member" else None
    if caption_spans is not None:
        has_all &= caption_spans[:, 0] >= 0
    numbers = np.flatnonzero(has_all)
    metadata = _parse_together(
        gather_strings(index.data, json_spans[numbers]), first.name if first.kind == "json" else None
    )
    if metadata is None:
        return None
    captions = (
        metadata["caption_field"]
        if caption_spans is None
        else _utf8(gather_strings(index.data, caption_spans[numbers]))
    )
    if captions is None:
        return None
    width, height = metadata["width"], metadata["height"]
    good = pc.and_(pc.greater(width, 0), pc.greater(height, 0))
    good = pc.and_(good, pc.greater(pc.binary_length(pc.utf8_ltrim(captions, characters=_WHITE_SPACE)), 0))
    good = pc.fill_null(good, False)
    keys = index.keys.slice(start, end - start).take(pa.array(numbers))
    table = pa.table([keys, metadata["uid"], width, height, captions], names=ROWS.names).filter(good).cast(ROWS)
    return table.combine_chunks(), start + numbers[good.to_numpy()]


def _utf8(raw: pa.LargeBinaryArray) -> pa.LargeStringArray | None:
    """The same as strings, None if any of it is not UTF-8."""
    try:
        return raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        return None


def _parse_together(raw: pa.LargeBinaryArray, caption_field: str | None) -> pa.Table | None:
    """uid, width, height (and a caption) of JSON objects, parsed in one go; None if `json.loads` might see any of them
    otherwise.
    """
    texts = _utf8(raw)
    if texts is None or not len(texts):
        return None
    text = bytes(np.frombuffer(raw.buffers()[2], np.uint8)) if raw.buffers()[2] else b""
    trimmed = pc.utf8_trim(texts, characters=" \t\r\n")
    objects = pc.match_like(trimmed, r"{%}")
    # NUL: json.loads would take the text for UTF-16.
    if b"\0" in text or not objects.to_numpy(zero_copy_only=False).all():
        return None
    fields = {"uid": pa.string(), "width": pa.int32(), "height": pa.int32()}
    columns = {**fields, **({caption_field: pa.string()} if caption_field and caption_field not in fields else {})}
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(text),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            pyarrow.json.ParseOptions(
                pa.schema(list(columns.items())), newlines_in_values=True, unexpected_field_behavior="ignore"
            ),
        ).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    if len(table) != len(texts):
        return None
    if caption_field is None:
        return table
    if caption_field in fields:
        return None
    return table.rename_columns(["caption_field" if name == caption_field else name for name in table.column_names])
