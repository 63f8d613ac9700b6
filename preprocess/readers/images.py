"""The image files of a shard's label rows: `find_images` -> ShardImages, spans of one mapped file.

    local tar   -> spans of the tar itself
    remote tar  -> spans of a copy of it in a scratch file
    table       -> its images, one after another in a scratch file: `table_images`, from
                   Parquet: image, jpg, jpeg, png, webp or img, as bytes or as Hugging Face's struct {bytes, path}; else
                            the only binary column
                   CSV:     path, filepath, image or file; a path is relative to the table's own folder, or a URL

Header scan, plan and writer see only spans. R label rows, S samples of a tar, W wanted suffixes.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.listing import open_name
from labels.storage import UserError, is_url, printable
from labels.tars import TAR_REASONS
from preprocess.readers import read_rows, reads_side
from preprocess.readers.base import IMAGE_SUFFIXES, Choice, Fault, ScratchFile, map_file
from preprocess.readers.shards import Shard
from preprocess.readers.table import Table, TableDamaged, identified, identity_columns, open_table
from preprocess.readers.tar import Sample, walk, wanted_suffixes
from preprocess.readers.tar_index import gather_strings, index_data

_BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
_PATH_COLUMNS = ("path", "filepath", "image", "file")
_NO_IMAGES = frozenset({"key", "uid", "url", "caption", "text", "txt", "title", "status"})
_ALLOWED_BYTES = "one column of bytes, or one that is called `image` or `jpg`"
_ROWS_AT_ONCE = 32  # few: a row may hold an image of many megabytes


@dataclass(frozen=True)
class ShardImages:
    """The images of R rows."""

    data: np.ndarray  # uint8 [bytes], mapped
    spans: np.ndarray  # int64 [R, 2], begin and end of each row's image file in `data`; begin -1: none
    faults: dict[int, Fault]  # row -> why there is none


def is_local_tar(shard: Shard) -> bool:
    """Whether a shard's images can be read in place."""
    return shard.kind == "tar" and not is_url(shard.path)


def find_images(shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], scratch: Path | None) -> ShardImages:
    """The images of a shard's label rows.

    Args:
        keys: of the R label rows, in order; a repeated key is a repeated sample.
        choices: where the captions of those rows came from.
        scratch: a local folder for what is not in a local tar; None takes the system's.
    """
    if shard.kind != "tar":
        return _of_table(shard, keys, scratch)
    with shard.open() as file:
        if is_local_tar(shard):
            return _of_tar(shard, file, map_file(Path(shard.path)), keys, choices)
        with ScratchFile(scratch) as copy:
            copy.copy(file)
            return _of_tar(shard, copy.file, copy.view(), keys, choices)


def _of_tar(
    shard: Shard, file: BinaryIO, data: np.ndarray, keys: pa.StringArray, choices: tuple[Choice, ...]
) -> ShardImages:
    wanted = wanted_suffixes(choices)
    index = index_data(data, wanted) if len(data) == shard.bytes else None
    samples, members, lost = (index.keys, index.spans, {}) if index else _walked(file, len(data), wanted)
    images = members[:, [wanted.index(suffix) for suffix in IMAGE_SUFFIXES]]  # [S, suffixes, 2]
    first = (images[:, :, 0] >= 0).argmax(axis=1)
    sample_spans = images[np.arange(len(images)), first]
    numbers = pc.fill_null(pc.index_in(keys, value_set=samples), -1).to_numpy()
    spans = np.full((len(keys), 2), -1, np.int64)
    spans[numbers >= 0] = sample_spans[numbers[numbers >= 0]]
    missing = spans[:, 0] < 0
    if not reads_side(shard, choices):
        if missing.any():
            raise _changed(shard, keys[int(missing.argmax())].as_py())
        return ShardImages(data, spans, {})
    texts = np.where(missing[:, None], -1, members[numbers, wanted.index("txt")]) if len(members) else spans
    differs = ~_same_captions(shard, keys, choices, gather_strings(data, texts))
    different = Fault("", "caption differs", "the tar's txt is not the side Parquet's caption")
    absent = lost.get("", Fault("", "not in the tar", "the side Parquet has it"))
    faults: dict[int, Fault] = {}
    for row in np.flatnonzero(missing | differs).tolist():
        key = keys[row].as_py()
        faults[row] = replace(different if differs[row] else lost.get(key, absent), key=key)
    spans[differs] = -1
    return ShardImages(data, spans, faults)


def _changed(shard: Shard, key: str) -> UserError:
    problem = f"{shard.path} no longer holds the sample {key!r} that its label file has"
    kind = "tar" if shard.kind == "tar" else "table"
    return UserError(problem, fix=f"the {kind} changed during the build: run the same command again")


def _same_captions(
    shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], texts: pa.LargeBinaryArray
) -> np.ndarray:
    """bool [R]: whether a row's txt, where it has one, is the caption that the side Parquet had for its key."""
    batches = [batch.table.select(["key", "caption"]) for batch in read_rows(shard, choices)]
    table = pa.concat_tables(batches).combine_chunks()
    numbers = pc.index_in(keys, value_set=table["key"])
    captions = table["caption"].take(numbers).combine_chunks().cast(pa.large_binary())
    return pc.fill_null(pc.equal(captions, texts), True).to_numpy(zero_copy_only=False)


def _walked(file: BinaryIO, size: int, wanted: tuple[str, ...]) -> tuple[pa.StringArray, np.ndarray, dict[str, Fault]]:
    """Of a tar that only `walk` can read: keys [S], spans int64 [S, W, 2] of wanted members, and faults by key: "" is
    what ended the tar early.
    """
    keys: list[str] = []
    spans, faults = [], {}
    for sample in walk(file, size):
        if isinstance(sample, Sample):
            keys.append(sample.key)
            spans.append([sample.members.get(suffix, (-1, -1)) for suffix in wanted])
        else:
            faults["" if sample.reason in TAR_REASONS else sample.key] = sample
    return pa.array(keys, pa.string()), np.array(spans, np.int64).reshape(len(keys), len(wanted), 2), faults


# -- images of tables


def without_images(shard: Shard) -> UserError | None:
    """Why the images of a table cannot be found; None if it has a column of them, or cannot be read: reading its
    captions reports the fault.
    """
    try:
        table = open_table(shard)
    except TableDamaged:
        return None
    if _image_column(table) is not None:
        return None
    binary = _bytes_columns(table)
    texts = (pa.string(), pa.large_string())
    paths = [field.name for field in table.schema if field.name in _PATH_COLUMNS and field.type in texts]
    columns, path_names = ", ".join(map(repr, table.schema.names)), " or ".join(f"`{name}`" for name in _PATH_COLUMNS)
    alone = "or add --no-beton to make labels and IDF alone"
    if shard.kind == "csv":
        problem = f"no column of image paths, of: {columns}"
        allowed = f"a header line in which {path_names} names the column of paths; separators: comma, tab or semicolon"
        fix = "rename the column of paths"
    elif len(binary) > 1:
        problem = f"several columns of bytes, {', '.join(map(repr, binary))}, none of them named as images"
        allowed, fix = _ALLOWED_BYTES, "rename the column of images to `image`"
    elif paths:
        problem = f"paths in the column {paths[0]!r}, which are read from CSV and TSV alone"
        allowed = f"{_ALLOWED_BYTES}; or a CSV or TSV with paths"
        plain = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
        csv = str(PurePosixPath(shard.path).with_suffix(".csv"))
        convert = f"c.write_csv(q.read_table({shard.path!r}, columns={plain}), {csv!r})"
        fix = f"write it as CSV: python3 -c {shlex.quote(f'import pyarrow.csv as c, pyarrow.parquet as q; {convert}')}"
    else:
        problem, allowed, fix = f"no column of bytes, of: {columns}", _ALLOWED_BYTES, "add the images as such a column"
    return UserError(f"{shard.path} has captions, but {problem}", allowed=allowed, fix=f"{fix}; {alone}")


def _of_table(shard: Shard, keys: pa.StringArray, folder: Path | None) -> ShardImages:
    spans = np.full((len(keys), 2), -1, np.int64)
    faults: dict[int, Fault] = {}
    with ScratchFile(folder) as scratch:
        for row, image in table_images(shard, keys.to_pylist()):
            if isinstance(image, Fault):
                faults[row] = image
            else:
                spans[row] = scratch.append(image)
        return ShardImages(scratch.view(), spans, faults)


def table_images(shard: Shard, keys: Sequence[str]) -> Iterator[tuple[int, bytes | Fault]]:
    """For every label row in order: its number, and its image file's bytes or why there is none.

    `shard` is a table with images; `keys`, of the label rows, are in the table's order, and a key that comes twice in
    succession is a sample that is repeated.
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
        raise _changed(shard, keys[row])


def _image_column(table: Table) -> str | None:
    if table.shard.kind == "csv":
        return next((name for name in _PATH_COLUMNS if name in table.schema.names), None)
    binary = _bytes_columns(table)
    named = [name for name in _BYTES_COLUMNS if name in binary]
    return named[0] if named else binary[0] if len(binary) == 1 else None


def _bytes_columns(table: Table) -> list[str]:
    """The columns of a Parquet that may hold images."""
    schema, names = table.schema, table.schema.names
    once = [name for name in names if names.count(name) == 1 and name not in _NO_IMAGES]
    return [name for name in once if _holds_bytes(schema.field(name).type)]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _holds_bytes(kind.field(field).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _images(table: Table) -> Iterator[tuple[str, bytes | str | None]]:
    """Key, and bytes or path, of every sample."""
    column = _image_column(table)
    assert column is not None
    identity, statuses = identity_columns(table.schema.names), dict[str, str]()
    for first, batch in table.batches([*identity, column], _ROWS_AT_ONCE):
        keys, batch = identified(batch, first, table.shard.path, statuses)
        for key, cell in zip(keys.to_pylist(), batch.column(column), strict=True):
            value = cell.as_py()
            if isinstance(value, dict):
                value = value["bytes"] if value["bytes"] is not None else value.get("path")
            elif table.shard.kind == "csv" and value is not None:
                value = value.decode("utf8", "surrogateescape")
            yield key, value


def _read(shard: Shard, key: str, value: bytes | str | None) -> bytes | Fault:
    """The image file that a cell holds or names."""
    if isinstance(value, bytes):
        return value
    if not value:
        return Fault(key, "no image", "the cell is empty")
    try:
        if "://" in value:
            filesystem, path = open_name(value)
        else:
            filesystem, table = open_name(shard.path)
            path = value if value.startswith("/") else f"{table.rpartition('/')[0]}/{value}"
        return filesystem.cat_file(path)
    except Exception as error:  # a server's client may raise anything
        if isinstance(error, UserError) and error.fix:  # a package is missing
            raise
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Fault(key, "no image", printable(f"{value}: {detail}"))
