"""`--subset` in stage 1: which samples to label, as one sorted array of uids that every worker maps.

    .npy of DataComp | .parquet with `uid` | SQL condition on metadata/*.parquet   (labels/subset.py reads all three)
    -> `resolve_subset`: sorted -> subset.npy -> `select`: the rows of a batch that are in it

A uid that is there twice repeats its sample. The metadata of a pool are .parquet files with a uid and scores.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from labels.storage import UserError, atomic_write, is_remote, sha256_file
from labels.subset import (
    ALLOWED,
    OUT_OF_MEMORY,
    ROWS_AT_ONCE,
    UIDS,
    count_in,
    in_parts,
    is_sorted,
    map_uids,
    one_line,
    parse_uids,
    quoted,
    raise_if_out_of_memory,
    sort_uids,
    where,
)
from preprocess.readers.base import RowBatch

_FINGERPRINT_DIGITS = 16
_OPTION = "--subset"
_FOLDER = "metadata"
_SUFFIX = ".parquet"

Files = list[tuple[AbstractFileSystem, str]]
"""Filesystem, and the path or URL that DuckDB opens."""


def resolve_subset(
    text: str, metadata: str | None, sources: Sequence[str], target: Path, memory: str, spill: Path
) -> str:
    """Write the uids that `text` names to `target`, sorted, as .npy of dtype UIDS, in one step and in bounded memory.

    Args:
        text: .npy or .parquet (path or URL), or an SQL condition on the metadata.
        metadata: folder, glob or file of the metadata's .parquet; None: `metadata/` in or next to the folders of
            `sources`.
        sources: what is being labelled.
        target: the file to write; a UPath may be remote.
        memory: DuckDB's limit, e.g. `1GiB`.
        spill: a folder for what does not fit.

    Returns:
        A fingerprint of the array: 16 hex digits, equal for equal sets of uids.

    Raises:
        UserError: `text` is none of the three, cannot be read, holds something else than uids, or selects nothing.
    """
    with (
        enough_memory(memory),
        _uids(text, metadata, sources, memory, spill) as (uids, in_order),
        atomic_write(target) as partial,
    ):
        count = _write(partial, uids if in_order else sort_uids(uids, memory, spill))
        if not count:
            raise UserError(f"the subset {text!r} selects no sample", fix="name another subset, or leave it out")
        return sha256_file(partial)[:_FINGERPRINT_DIGITS]


def open_subset(path: Path) -> np.ndarray:
    """What `resolve_subset` wrote, UIDS [U], mapped read-only; a remote file is read into memory."""
    return (
        np.load(io.BytesIO(path.read_bytes())) if is_remote(path) else np.load(path, mmap_mode="r", allow_pickle=False)
    )


def select(batch: RowBatch, subset: np.ndarray) -> tuple[RowBatch, int]:
    """The rows of a batch whose uid is in the subset, as often as it is there; and how many rows are skipped.

    A row without a uid is in no subset. Faults stay: which samples they are of is not known.
    """
    uids, rows = parse_uids(batch.table["uid"].combine_chunks())  # type: ignore[arg-type]
    counts = count_in(uids, subset)
    table = batch.table.take(pa.array(np.repeat(rows, counts)))
    return RowBatch(table, batch.faults), len(batch.table) - int(np.count_nonzero(counts))


@contextmanager
def _uids(
    text: str, metadata: str | None, sources: Sequence[str], memory: str, spill: Path
) -> Iterator[tuple[Iterator[np.ndarray], bool]]:
    """UIDS in batches, and whether they are sorted already."""
    if text.endswith(".npy"):
        with map_uids(text, _OPTION) as array:
            yield in_parts(array), is_sorted(array)
        return
    is_file = text.endswith(_SUFFIX)
    files = parquet_files(text, _OPTION, ALLOWED) if is_file else metadata_files(metadata, sources, text)
    with open_metadata(files, memory, spill) as table:
        chosen = table if is_file else where(table, text, _OPTION)
        try:
            reader = chosen.select("uid").to_arrow_reader(ROWS_AT_ONCE)
        except duckdb.Error as error:
            raise_if_out_of_memory(error)
            raise UserError(f"{_OPTION} {text!r} cannot be used: {one_line(error)}", allowed=ALLOWED) from None
        yield (_parsed(part, text) for part in _strings(reader)), False


def _parsed(strings: pa.StringArray, text: str) -> np.ndarray:
    uids, rows = parse_uids(strings)
    if len(rows) < len(strings):
        wrong = strings[int(np.setdiff1d(np.arange(len(strings)), rows)[0])].as_py()
        raise UserError(f"the subset {text!r} gives the uid {wrong!r}", allowed="uids of 32 hex digits, as DataComp's")
    return uids


def _write(path: Path, parts: Iterator[np.ndarray]) -> int:
    """Write an .npy whose length is known at the end only; the length."""

    def header(rows: int) -> None:
        np.lib.format.write_array_header_1_0(file, {"descr": UIDS.descr, "fortran_order": False, "shape": (rows,)})

    count = 0
    with open(path, "wb") as file:
        header(0)
        begin = file.tell()
        for part in parts:
            file.write(part.tobytes())
            count += len(part)
        file.seek(0)
        header(count)  # NumPy leaves room in it for a length that grows
        assert file.tell() == begin
    return count


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


def metadata_files(metadata: str | None, sources: Sequence[str], condition: str) -> Files:
    """Where the condition is asked: build.metadata, else `metadata/` in or next to the folders of `sources`.

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
            f"--subset {condition!r} is an SQL condition, and there are no {_FOLDER}/*{_SUFFIX} in or next to {', '.join(sources)}",
            allowed=ALLOWED,
            fix="give --metadata FOLDER, or --set build.metadata=FOLDER; a file has to end in .npy or .parquet",
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
        raise UserError(
            f"the path {odd} holds one of * ? [, which DuckDB takes for a pattern",
            fix="give the folder a name without it",
        )
    config = {
        "memory_limit": memory,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
        "python_enable_replacements": False,
    }
    with duckdb.connect(config=config) as con:
        remote = {type(filesystem): filesystem for filesystem, name in files if "://" in name}
        for filesystem in remote.values():
            con.register_filesystem(filesystem)
        try:
            if not remote:
                con.execute(f"SET allowed_paths = [{', '.join(map(quoted, names))}]")
                con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
            table = con.read_parquet(names)  # type: ignore[arg-type]  # a list is allowed
        except duckdb.Error as error:
            raise_if_out_of_memory(error)
            raise UserError(
                f"{names[0]} (of {len(names)} files) cannot be read as Parquet: {one_line(error)}"
            ) from None
        if "uid" not in table.columns:
            raise UserError(f"{names[0]} has no column uid", allowed=f"its columns are {', '.join(table.columns)}")
        yield table


def _strings(reader: pa.RecordBatchReader) -> Iterator[pa.StringArray]:
    try:
        for batch in reader:
            yield batch.column(0).cast(pa.string())
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise_if_out_of_memory(error)
        raise UserError(
            f"the metadata cannot be read: {one_line(error)}", fix="download again the file that it names"
        ) from None


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
        if OUT_OF_MEMORY not in str(error):
            raise
        problem = f"build.duckdb_memory = {memory} is too little for the subset: {one_line(error)}"
        raise UserError(problem, fix="raise it, e.g. to 1GiB") from None
