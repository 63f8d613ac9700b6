"""The images of a table's label rows: a binary column of a Parquet file, or the files that a CSV's column of paths names.

Parquet: image, jpg, jpeg, png, webp or img, as bytes or as Hugging Face's struct {bytes, path}; else the only binary column.
CSV: path, filepath, image or file; a path is relative to the table's own folder, or a URL.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from fsspec.core import url_to_fs

from labels.errors import UserError
from preprocess.inputs.tables import identified, identity_columns
from preprocess.readers.base import Fault
from preprocess.readers.shards import Shard
from preprocess.readers.table import Table, TableDamaged, open_table

_BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
_PATH_COLUMNS = ("path", "filepath", "image", "file")
_NO_IMAGES = frozenset({"key", "uid", "url", "caption", "text", "txt", "title", "status"})
# Few: a row may hold an image of many megabytes.
_ROWS_AT_ONCE = 32


def has_images(shard: Shard) -> bool:
    """Whether a table has a column of images; True where it cannot be read, which is told when its captions are."""
    try:
        return _image_column(open_table(shard)) is not None
    except TableDamaged:
        return True


def table_images(shard: Shard, keys: Sequence[str]) -> Iterator[tuple[int, bytes | Fault]]:
    """For every label row in order: its number, and its image file's bytes or why there is none.

    Args:
        shard: a table that `has_images`.
        keys: of the label rows, in the table's order; a key that comes twice in a row is a sample that is repeated.

    Raises:
        UserError: the table no longer holds one of the keys.
    """
    row = 0
    try:
        for key, value in _images(open_table(shard)):
            if row == len(keys):
                return
            if key != keys[row]:
                continue
            image = _read(shard, key, value)
            while row < len(keys) and keys[row] == key:
                yield row, image
                row += 1
    except TableDamaged as error:
        for later in range(row, len(keys)):
            yield later, Fault(keys[later], error.fault.reason, error.fault.detail)
        return
    if row < len(keys):
        raise UserError(
            f"{shard.path} no longer holds the sample {keys[row]!r} that its label file has",
            mend="the table changed during the build: run the same command again",
        )


def _image_column(table: Table) -> str | None:
    schema, names = table.schema, table.schema.names
    if table.shard.kind == "csv":
        return next((name for name in _PATH_COLUMNS if name in names), None)
    binary = [name for name in names if names.count(name) == 1 and _holds_bytes(schema.field(name).type)]
    named = [name for name in _BYTES_COLUMNS if name in binary]
    others = [name for name in binary if name not in _NO_IMAGES]
    return named[0] if named else others[0] if len(others) == 1 else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _images(table: Table) -> Iterator[tuple[str, bytes | str | None]]:
    """Key, and bytes or path, of every sample."""
    column = _image_column(table)
    assert column is not None
    identity = identity_columns(table.schema.names)
    for first, batch in table.batches([*identity, column], _ROWS_AT_ONCE):
        keys, batch = identified(batch, first, table.shard.path)
        for key, value in zip(keys.to_pylist(), batch.column(column), strict=True):
            yield key, _content(value.as_py(), table.shard.kind)


def _content(value: bytes | dict[str, bytes | str | None] | None, kind: str) -> bytes | str | None:
    """The image's bytes, or its path."""
    if isinstance(value, dict):
        return value["bytes"] if value["bytes"] is not None else value.get("path")
    return value.decode("utf8", "surrogateescape") if kind == "csv" and value is not None else value


def _read(shard: Shard, key: str, value: bytes | str | None) -> bytes | Fault:
    if isinstance(value, bytes):
        return value
    if not value:
        return Fault(key, "no image", "the cell is empty")
    place = _place(shard, value)
    try:
        filesystem, path = url_to_fs(place)
        return filesystem.cat_file(path)
    except ImportError as error:
        raise UserError(f"{place} cannot be opened: {error}", mend="install the package that it names") from None
    except Exception as error:  # what a server's client raises is its own affair
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Fault(key, "no image", f"{_printable(value)}: {told}")


def _place(shard: Shard, path: str) -> str:
    """Where an image lies that a table names."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{shard.path.rpartition('/')[0]}/{path}"


def _printable(text: str) -> str:
    return text.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")
