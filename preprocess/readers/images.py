"""Where the image files of a shard's label rows lie, whatever the shard is: spans in one mapped file.

local tar -> its own spans | remote tar -> a copy of it | table -> a file of its images, one after another
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.core import url_to_fs

from labels.storage import UserError
from preprocess.readers.base import IMAGE_SUFFIXES, Fault
from preprocess.readers.caption_key import Choice
from preprocess.readers.rows import read_rows, reads_side
from preprocess.readers.scratch import Spool, map_path
from preprocess.readers.shards import Shard
from preprocess.readers.table import Table, TableDamaged, identified, identity_columns, open_table
from preprocess.readers.tar import REPEATED, Sample, walk, wanted_suffixes
from preprocess.readers.tar_index import gather_strings, index_data

# ---- tableimages: The images of a table's label rows: a binary column of a Parquet file, or the files that a CSV's
# column of paths names.
#
# Parquet: image, jpg, jpeg, png, webp or img, as bytes or as Hugging Face's struct {bytes, path}; else the only binary
# column. CSV: path, filepath, image or file; a path is relative to the table's own folder, or a URL.


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
            fix="the table changed during the build: run the same command again",
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
    location = _location(shard, value)
    try:
        filesystem, path = url_to_fs(location)
        return filesystem.cat_file(path)
    except ImportError as error:
        raise UserError(f"{location} cannot be opened: {error}", fix="install the package that it names") from None
    except Exception as error:  # what a server's client raises is its own affair
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Fault(key, "no image", f"{_printable(value)}: {told}")


def _location(shard: Shard, path: str) -> str:
    """Where an image lies that a table names."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{shard.path.rpartition('/')[0]}/{path}"


def _printable(text: str) -> str:
    return text.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")


# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)


@dataclass(frozen=True)
class Pictures:
    """The images of R rows.

    `data`: uint8 [bytes], mapped; `spans`: int64 [R, 2], begin and end of each row's image file in it, begin -1 where
        there is none;
    `faults`: why there is none, by row.
    """

    data: np.ndarray
    spans: np.ndarray
    faults: dict[int, Fault]


def is_local_tar(shard: Shard) -> bool:
    """Whether a shard's images can be read where they lie."""
    return shard.kind == "tar" and "://" not in shard.path


def find_pictures(shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], scratch: Path | None) -> Pictures:
    """The images of a shard's label rows.

    Args:
        shard: the shard.
        keys: of the R label rows, in order; a repeated key is a repeated sample.
        choices: where the captions of those rows came from.
        scratch: a local folder for what is not in a local tar; None takes the system's.

    Raises:
        UserError: the shard no longer holds one of the rows, or cannot be read.
    """
    if shard.kind != "tar":
        return _of_table(shard, keys, scratch)
    with shard.open() as file:
        if is_local_tar(shard):
            return _of_tar(shard, file, map_path(Path(shard.path)), keys, choices)
        with Spool(scratch) as spool:
            spool.copy(file)
            return _of_tar(shard, spool.file, spool.view(), keys, choices)


def _of_table(shard: Shard, keys: pa.StringArray, scratch: Path | None) -> Pictures:
    spans = np.full((len(keys), 2), -1, np.int64)
    faults: dict[int, Fault] = {}
    with Spool(scratch) as spool:
        for row, image in table_images(shard, keys.to_pylist()):
            if isinstance(image, Fault):
                faults[row] = image
            else:
                spans[row] = spool.append(image)
        return Pictures(spool.view(), spans, faults)


def _of_tar(
    shard: Shard, file: BinaryIO, data: np.ndarray, keys: pa.StringArray, choices: tuple[Choice, ...]
) -> Pictures:
    wanted = wanted_suffixes(choices)
    index = index_data(data, wanted) if len(data) == shard.bytes else None
    samples, members, cut = (index.keys, index.spans, None) if index else _walked(file, len(data), wanted)
    images = members[:, [wanted.index(suffix) for suffix in IMAGE_SUFFIXES]]
    first = (images[:, :, 0] >= 0).argmax(axis=1)
    spans = images[np.arange(len(images)), first]
    numbers = pc.fill_null(pc.index_in(keys, value_set=samples), -1).to_numpy()
    of_rows = (
        np.where(numbers[:, None] >= 0, spans[numbers], -1) if len(spans) else np.full((len(keys), 2), -1, np.int64)
    )
    missing = of_rows[:, 0] < 0
    if not reads_side(shard, choices):
        if missing.any():
            raise UserError(
                f"{shard.path} no longer holds the sample {keys[int(missing.argmax())].as_py()!r} that its label file has",
                fix="the tar changed during the build: run the same command again",
            )
        return Pictures(data, of_rows, {})
    texts = np.where(missing[:, None], -1, members[numbers, wanted.index("txt")]) if len(members) else of_rows
    differs = ~_same_captions(shard, keys, choices, gather_strings(data, texts))
    told = (
        (missing, *((cut.reason, cut.detail) if cut else ("not in the tar", "the side Parquet has it"))),
        (differs, "caption differs", "the tar's txt is not the side Parquet's caption"),
    )
    faults = {
        int(row): Fault(keys[int(row)].as_py(), *words) for which, *words in told for row in np.flatnonzero(which)
    }
    of_rows[differs] = -1
    return Pictures(data, of_rows, faults)


def _same_captions(
    shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], texts: pa.LargeBinaryArray
) -> np.ndarray:
    """bool [R]: whether a row's txt, where it has one, is the caption that the side Parquet had for its key."""
    batches = [batch.table.select(["key", "caption"]) for batch in read_rows(shard, choices)]
    table = pa.concat_tables(batches).combine_chunks()
    numbers = pc.index_in(keys, value_set=table["key"])
    captions = table["caption"].take(numbers).combine_chunks().cast(pa.large_binary())
    return pc.fill_null(pc.equal(captions, texts), True).to_numpy(zero_copy_only=False)


def _walked(file: BinaryIO, size: int, wanted: tuple[str, ...]) -> tuple[pa.StringArray, np.ndarray, Fault | None]:
    """Of a tar that only `walk` can read: keys of its S samples, spans int64 [S, W, 2] of the wanted members, and what
    ended it early.
    """
    keys: list[str] = []
    spans, cut = [], None
    for sample in walk(file, size):
        if isinstance(sample, Sample):
            keys.append(sample.key)
            found = [sample.members.get(suffix) for suffix in wanted]
            spans.append(
                [
                    (-1, -1) if member is None else (member.offset_data, member.offset_data + member.size)
                    for member in found
                ]
            )
        elif sample.reason != REPEATED:
            cut = sample
    return pa.array(keys, pa.string()), np.array(spans, np.int64).reshape(len(keys), len(wanted), 2), cut
