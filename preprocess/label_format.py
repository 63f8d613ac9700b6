"""What a label file says of itself in Parquet's own structures: a header before each page, and the footer.

Names and numbers are those of parquet-format's parquet.thrift.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from labels import __version__
from labels.schema import LABELS
from preprocess.thrift import Value, binary, boolean, i32, i64, many, struct, text

MAGIC = b"PAR1"
_FORMAT_VERSION = 2
_DATA_PAGE_V2 = 3
_INT32, _BYTE_ARRAY = 1, 6
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2
_UTF8, _LIST = 0, 3  # of ConvertedType
_STRING_TYPE, _LIST_TYPE = 1, 3  # of LogicalType
_PLAIN, _RLE, _DELTA_BINARY_PACKED, _DELTA_LENGTH_BYTE_ARRAY = 0, 3, 5, 6
_UNCOMPRESSED, _ZSTD = 0, 6


@dataclass(frozen=True)
class Column:
    """A column of leaf values. `path`: names from the root; `kind`, `encoding` and `codec` by parquet.thrift's numbers."""

    path: tuple[str, ...]
    kind: int
    encoding: int
    codec: int


# Measured on web captions: packed ids are too dense to compress further; dictionaries and statistics do not pay; byte-stream split would be
# smaller, but DuckDB shells before 2.0 cannot read it.
COLUMNS = (
    *(Column((name,), _BYTE_ARRAY, _DELTA_LENGTH_BYTE_ARRAY, _ZSTD) for name in ("key", "uid")),
    *(Column((name,), _INT32, _PLAIN, _ZSTD) for name in ("width", "height")),
    *(Column((name, "list", "element"), _INT32, _DELTA_BINARY_PACKED, _UNCOMPRESSED) for name in ("token_ids", "label_ids")),
)
"""In the order of LABELS."""


@dataclass(frozen=True)
class Page:
    """All values of a column of a row group, encoded.

    Attributes:
        entries: values, with nulls and empty lists.
        nulls: how many of them are null or empty lists.
        levels: repetition levels (the first `repetition_bytes`), then definition levels; never compressed.
        values: as they lie in the file.
        raw_bytes: of the values before they were compressed.
    """

    entries: int
    nulls: int
    levels: bytes | memoryview
    repetition_bytes: int
    values: memoryview
    raw_bytes: int


def page_header(column: Column, page: Page, rows: int) -> bytes:
    """PageHeader of a data page of version 2, whose levels stand before its values."""
    levels = len(page.levels)
    data = {
        1: i32(page.entries),
        2: i32(page.nulls),
        3: i32(rows),
        4: i32(column.encoding),
        5: i32(levels - page.repetition_bytes),
        6: i32(page.repetition_bytes),
        7: boolean(column.codec != _UNCOMPRESSED),
    }
    sizes = {2: i32(levels + page.raw_bytes), 3: i32(levels + len(page.values))}
    return struct({1: i32(_DATA_PAGE_V2), **sizes, 8: struct(data)})[1]


def column_chunk(column: Column, page: Page, header_bytes: int, place: int) -> tuple[Value, int, int]:
    """ColumnChunk of the page whose header is at `place`; its bytes before and after compression."""
    around = header_bytes + len(page.levels)
    raw, size = around + page.raw_bytes, around + len(page.values)
    metadata = {
        1: i32(column.kind),
        2: many([i32(column.encoding), i32(_RLE)]),
        3: many(map(text, column.path)),
        4: i32(column.codec),
        5: i64(page.entries),
        6: i64(raw),
        7: i64(size),
        9: i64(place),
    }
    return struct({2: i64(0), 3: struct(metadata)}), raw, size


def row_group(rows: int, place: int, chunks: Sequence[tuple[Value, int, int]]) -> Value:
    """RowGroup of a chunk for every column, the first at `place`."""
    raw, size = sum(raw for _, raw, _ in chunks), sum(size for _, _, size in chunks)
    return struct({1: many(chunk for chunk, _, _ in chunks), 2: i64(raw), 3: i64(rows), 5: i64(place), 6: i64(size)})


def footer(rows: int, groups: Sequence[Value]) -> bytes:
    """FileMetaData, its length and the end of the file. pyarrow reads the schema LABELS from it, also what Parquet has no words for."""
    arrow = {**(LABELS.metadata or {}), b"ARROW:schema": base64.b64encode(LABELS.serialize())}
    pairs = [struct({1: binary(name), 2: binary(value)}) for name, value in arrow.items()]
    made_by = text(f"superclass-lean version {__version__}")
    fields = {1: i32(_FORMAT_VERSION), 2: many(_schema()), 3: i64(rows), 4: many(groups), 5: many(pairs), 6: made_by}
    data = struct(fields)[1]
    return data + len(data).to_bytes(4, "little") + MAGIC


def _schema() -> list[Value]:
    """SchemaElements, depth first."""
    elements = [struct({4: text("schema"), 5: i32(len(LABELS))})]
    for field, column in zip(LABELS, COLUMNS, strict=True):
        repetition = i32(_OPTIONAL if field.nullable else _REQUIRED)
        if len(column.path) == 3:
            as_list = {6: i32(_LIST), 10: struct({_LIST_TYPE: struct({})})}
            elements.append(struct({3: repetition, 4: text(field.name), 5: i32(1), **as_list}))
            elements.append(struct({3: i32(_REPEATED), 4: text(column.path[1]), 5: i32(1)}))
            elements.append(struct({1: i32(column.kind), 3: i32(_REQUIRED), 4: text(column.path[2])}))
        elif column.kind == _BYTE_ARRAY:
            string = {6: i32(_UTF8), 10: struct({_STRING_TYPE: struct({})})}
            elements.append(struct({1: i32(column.kind), 3: repetition, 4: text(field.name), **string}))
        else:
            elements.append(struct({1: i32(column.kind), 3: repetition, 4: text(field.name)}))
    return elements
