"""The metadata of a pool (uid and scores, .parquet): which files they are, and the uids that an SQL condition keeps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from labels.errors import UserError

_ROWS_AT_ONCE = 1 << 17
_FOLDER = "metadata"
_SUFFIX = ".parquet"
_OUT_OF_MEMORY = "Out of Memory Error"

Files = list[tuple[AbstractFileSystem, str]]
"""Filesystem, and the path or URL that DuckDB opens."""


def parquet_files(place: str, option: str, allowed: str) -> Files:
    """The .parquet files of a folder (also deeper), a glob or a file; local or URL.

    Raises:
        UserError: there is none; `option` and `allowed` are for its text.
    """
    try:
        filesystem, path = url_to_fs(place)
        found = _below(filesystem, path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{option}: {place} cannot be opened: {error}", allowed=allowed) from None
    if not found:
        raise UserError(f"{option}: {place} does not exist or holds no {_SUFFIX}", allowed=allowed)
    return found


def metadata_files(metadata: str | None, sources: Sequence[str], condition: str, allowed: str) -> Files:
    """Where the condition is asked: build.metadata, else `metadata/` in or beside the folders of `sources`.

    Raises:
        UserError: there are no such files.
    """
    if metadata is not None:
        return parquet_files(metadata, "build.metadata", f"a folder, glob or file of {_SUFFIX} with a column uid")
    files: Files = []
    for source in sources:
        filesystem, path = url_to_fs(source)
        folder = path.rstrip("/") if filesystem.isdir(path) else path[: _first_pattern(path)].rpartition("/")[0]
        for parent in (folder, folder.rpartition("/")[0]):
            if found := _below(filesystem, f"{parent}/{_FOLDER}"):
                files += [file for file in found if file not in files]
                break
    if not files:
        raise UserError(
            f"--subset {condition!r} is an SQL condition, and there are no {_FOLDER}/*{_SUFFIX} in or beside {', '.join(sources)}",
            allowed=allowed,
            mend="give --metadata FOLDER, or --set build.metadata=FOLDER; a file has to end in .npy or .parquet",
        )
    return files


@contextmanager
def open_metadata(files: Files, memory: str, spill: Path) -> Iterator[duckdb.DuckDBPyRelation]:
    """The files as one table of DuckDB, on a connection that reaches nothing else.

    Raises:
        UserError: they are no Parquet files of the same columns, or have no `uid`.
    """
    names = [name for _, name in files]
    if odd := next((name for name in names if set("*?[") & set(name)), None):
        raise UserError(f"the path {odd} holds one of * ? [, which DuckDB takes for a pattern", mend="give the folder a name without it")
    config = {"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": False, "python_enable_replacements": False}
    with duckdb.connect(config=config) as con:
        remote = {type(filesystem): filesystem for filesystem, name in files if "://" in name}
        for filesystem in remote.values():
            con.register_filesystem(filesystem)
        try:
            if not remote:
                con.execute(f"SET allowed_paths = [{', '.join(map(_quoted, names))}]")
                con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
            table = con.read_parquet(names)  # type: ignore[arg-type]  # a list is allowed
        except duckdb.Error as error:
            _raise_memory_fault(error)
            raise UserError(f"{names[0]} (of {len(names)} files) cannot be read as Parquet: {_line(error)}") from None
        if "uid" not in table.columns:
            raise UserError(f"{names[0]} has no column uid", allowed=f"its columns are {', '.join(table.columns)}")
        yield table


def uids_where(table: duckdb.DuckDBPyRelation, condition: str | None, allowed: str) -> Iterator[pa.StringArray]:
    """The column `uid` of the rows that meet the condition, in batches, in no order; None: of all rows.

    Raises:
        UserError: `condition` is not one expression that is true or false, or DuckDB refuses it.
    """
    try:
        if condition is not None:
            expression = duckdb.SQLExpression(condition)
            kinds = [str(kind) for kind in table.select(expression).types]
            if kinds != ["BOOLEAN"]:
                raise UserError(f"--subset {condition!r} gives {', '.join(kinds)}, not true or false", allowed=allowed)
            table = table.filter(expression)
        reader = table.select("uid").to_arrow_reader(_ROWS_AT_ONCE)
    except duckdb.Error as error:
        _raise_memory_fault(error)
        columns = ", ".join(table.columns)
        raise UserError(
            f"--subset {condition!r} is not one SQL condition on the metadata: {_line(error)}", allowed=f"{allowed}; columns: {columns}"
        ) from None
    return _strings(reader)


def _strings(reader: pa.RecordBatchReader) -> Iterator[pa.StringArray]:
    try:
        for batch in reader:
            yield batch.column(0).cast(pa.string())
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        _raise_memory_fault(error)
        raise UserError(f"the metadata cannot be read: {_line(error)}", mend="download the file anew that it names") from None


def _below(filesystem: AbstractFileSystem, path: str) -> Files:
    if filesystem.isdir(path):
        found = filesystem.find(path)
    elif filesystem.exists(path):
        found = [path]
    else:
        found = filesystem.glob(path) if _first_pattern(path) < len(path) else []
    local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
    names = sorted(str(name) for name in found if str(name).endswith(_SUFFIX))
    return [(filesystem, name if local else filesystem.unstrip_protocol(name)) for name in names]


def _first_pattern(path: str) -> int:
    """Where a glob's first special character stands; the length of a path without any."""
    return min((path.index(character) for character in "*?[" if character in path), default=len(path))


@contextmanager
def enough_memory(memory: str) -> Iterator[None]:
    """Turn DuckDB's complaint of too little memory into a UserError; by way of Arrow it comes as an OSError."""
    try:
        yield
    except (duckdb.Error, OSError, pa.ArrowException) as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        told = f"build.duckdb_memory = {memory} is too little for the subset: {_line(error)}"
        raise UserError(told, mend="raise it, e.g. to 1GiB") from None


def _raise_memory_fault(error: Exception) -> None:
    if _OUT_OF_MEMORY in str(error):
        raise error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
