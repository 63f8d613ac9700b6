"""Parquet files of labelled images as Hugging Face's hub keeps them: found here, read later.

An image column, binary or struct<bytes: binary, ...>, and a class column, text or whole numbers, which the file's own
metadata `huggingface` may name.
"""

import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from labels.storage import UserError, library_path
from train.evals.data.images import Sample, is_class

_IMAGE_COLUMNS, _CLASS_COLUMNS = ("image", "img", "jpg"), ("label", "class", "fine_label")
_GROUPS_HELD = 4  # row groups of encoded images in memory: threads read neighbouring rows
_reading = threading.Lock()


class ParquetCell(NamedTuple):
    """Row `row` of a row group; `column` is the leaf that holds the bytes, e.g. `image.bytes`."""

    path: Path
    group: int
    row: int
    column: str

    @property
    def size_bytes(self) -> int:
        """Unknown before it is read."""
        return -1

    def read(self) -> bytes:
        """The encoded image."""
        with _reading:  # else all threads would read the same new group
            values = _read_group(self.path, self.path.stat().st_mtime_ns, self.group, self.column)
        return values[self.row].as_py() or b""


@lru_cache(_GROUPS_HELD)
def _read_group(path: Path, modified_ns: int, group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(library_path(path)) as file:
        values = file.read_row_group(group, columns=[column]).column(0)
    return pa.chunked_array([chunk.field("bytes") for chunk in values.chunks]) if "." in column else values


def list_parquet(files: list[Path]) -> tuple[list[Sample], tuple[str, ...] | None]:
    """Every labelled image of Parquet files of one schema, and the classes in order if the files name them.

    Only the class column is read.
    """
    samples: list[Sample] = []
    names: tuple[str, ...] | None = None
    for path in files:
        try:
            with pq.ParquetFile(library_path(path)) as file:
                schema = file.schema_arrow
                image, label = _columns(path, schema)
                if (listed := _class_names(schema, label)) != names and path != files[0]:
                    fix = "write all files of a part with one list of classes"
                    raise UserError(f"{path} names other classes than {files[0]}", fix=fix)
                names = listed
                for group in range(file.num_row_groups):
                    for row, value in enumerate(file.read_row_group(group, columns=[label]).column(0).to_pylist()):
                        name, cell = _class_name(path, row, value, names), ParquetCell(path, group, row, image)
                        samples.append(Sample(f"{path.name}/{len(samples)}", name, cell))
        except (pa.ArrowException, OSError) as error:
            fix = "fetch or write this file again"
            raise UserError(f"{path} is not readable as Parquet: {error}", fix=fix) from None
    return samples, names


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    """The leaf of the image bytes, and the class column."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _CLASS_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}",
            allowed=f"an image column ({', '.join(_IMAGE_COLUMNS)}) and a class column ({', '.join(_CLASS_COLUMNS)})",
            fix="rename the columns",
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes", label
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{path}: the column {image} is of type {kind}", allowed="binary, or a struct with `bytes`")
    return image, label


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's metadata gives to the numbers of a class column."""
    try:
        features: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (ValueError, LookupError, TypeError):
        return None


def _class_name(path: Path, row: int, value: Any, names: tuple[str, ...] | None) -> str:
    if isinstance(value, int) and names is not None:
        if 0 <= value < len(names):
            return names[value]
        allowed = f"0 to {len(names) - 1}, which the file names"
        raise UserError(f"{path} has the class {value} in row {row}", allowed=allowed)
    if not is_class(value):
        raise UserError(f"{path} has no class in row {row}: {value!r}", allowed="a name or a whole number")
    return str(value)
