"""Which samples a subset names: a file of uids or one SQL condition, read in the same way by both stages.

    .npy of DataComp     -> `map_uids`: checked and mapped -> `in_parts`
    .parquet with `uid`  -> DuckDB -> `parse_uids`: 32 hex digits are two u8
    SQL condition        -> `where`: one expression that is true or false, on a table of DuckDB
    -> `sort_uids`, which spills what does not fit -> `count_in`: how often each sample's uid is in the array

`build-labels --subset` writes the sorted uids once, by `resolve_subset`, to subset.npy, which every worker maps. A
repeated uid repeats its sample; a sample without a uid is in no subset of uids. duckdb and fsspec are imported where
they are used: a training node without a subset needs neither. Shapes: N uids of a batch, U of the array.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from labels.listing import PATTERN, expand_names, full_name, list_files, open_name
from labels.storage import UserError, atomic_write, is_remote, is_url, library_path, local_copy, sha256_file, user_path

if TYPE_CHECKING:
    import duckdb
    from fsspec import AbstractFileSystem

UIDS = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""DataComp's: the first and the last 16 hex digits."""
ALLOWED = (
    "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition,"
    " e.g. 'clip_l14_similarity_score > 0.3'"
)

ROWS_AT_ONCE = 1 << 17
_OPTION = "--subset"
_FOLDER, _SUFFIX = "metadata", ".parquet"
_FINGERPRINT_DIGITS = 16
_PARTS = pa.schema([("f0", pa.uint64()), ("f1", pa.uint64())])
_OUT_OF_MEMORY = "Out of Memory Error"
_DIGITS = 32
_NO_DIGIT = 255
_HEX = np.full(256, _NO_DIGIT, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def resolve_subset(
    text: str, metadata: str | None, sources: Sequence[str], target: Path, memory: str, spill: Path
) -> str:
    """Write the uids that `text` names to `target`, sorted, as .npy of dtype UIDS; return a fingerprint, 16 hex digits.

    `text`: .npy or .parquet (path or URL), or an SQL condition on the metadata; `metadata`: folder, glob or file of its
    .parquet, None: `metadata/` in or next to the folders of `sources`; `memory`: DuckDB's limit, e.g. `1GiB`; `spill`:
    a folder for what does not fit.
    """
    with (
        _enough_memory(memory),
        _uids(text, metadata, sources, memory, spill) as (uids, in_order),
        atomic_write(target) as partial,
    ):
        if not _write(partial, uids if in_order else sort_uids(uids, memory, spill)):
            raise UserError(f"the subset {text!r} selects no sample", fix="name another subset, or none")
        return sha256_file(partial)[:_FINGERPRINT_DIGITS]


def open_subset(path: Path) -> np.ndarray:
    """What `resolve_subset` wrote, UIDS [U], mapped read-only; a remote file is read into memory."""
    return np.load(io.BytesIO(path.read_bytes())) if is_remote(path) else np.load(path, mmap_mode="r")


@contextmanager
def _uids(
    text: str, metadata: str | None, sources: Sequence[str], memory: str, spill: Path
) -> Iterator[tuple[Iterator[np.ndarray], bool]]:
    """UIDS in batches, and whether they are sorted already."""
    import duckdb

    if text.endswith(".npy"):
        with map_uids(text, _OPTION) as array:
            yield in_parts(array), is_sorted(array)
        return
    is_file = text.endswith(_SUFFIX)
    files = _parquet_files(text, _OPTION, ALLOWED) if is_file else _metadata_files(metadata, sources, text)
    with _open_metadata(files, memory, spill) as table:
        chosen = table if is_file else where(table, text, _OPTION)
        try:
            reader = chosen.select("uid").to_arrow_reader(ROWS_AT_ONCE)
        except duckdb.Error as error:
            raise_if_out_of_memory(error)
            raise UserError(f"{_OPTION} {text!r} cannot be used: {one_line(error)}", allowed=ALLOWED) from None
        yield _read_uids(reader, text), False


def _read_uids(reader: pa.RecordBatchReader, text: str) -> Iterator[np.ndarray]:
    import duckdb

    try:
        for batch in reader:
            strings = batch.column(0).cast(pa.string())
            uids, rows = parse_uids(strings)
            if len(rows) < len(strings):
                wrong = strings[int(np.setdiff1d(np.arange(len(strings)), rows)[0])].as_py()
                allowed = "uids of 32 hex digits, as DataComp's"
                raise UserError(f"the subset {text!r} gives the uid {wrong!r}", allowed=allowed)
            yield uids
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise_if_out_of_memory(error)
        fix = "download again the file that it names"
        raise UserError(f"the metadata cannot be read: {one_line(error)}", fix=fix) from None


def _write(path: Path, parts: Iterator[np.ndarray]) -> int:
    """Write an .npy whose length is known at the end only; return the length."""

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


def _parquet_files(source: str, option: str, allowed: str) -> list[tuple[AbstractFileSystem, str]]:
    """The .parquet files of a folder (also deeper), a glob or a file, local or URL: filesystem and path for DuckDB."""
    files = [file for name in expand_names(source) for file in _below(name, *open_name(name))]
    if not files:
        raise UserError(f"{option}: {source} does not exist or holds no {_SUFFIX}", allowed=allowed)
    return files


def _metadata_files(
    metadata: str | None, sources: Sequence[str], condition: str
) -> list[tuple[AbstractFileSystem, str]]:
    """What the condition is evaluated on: build.metadata, else `metadata/` in or next to the folders of `sources`."""
    if metadata is not None:
        return _parquet_files(metadata, "build.metadata", f"a folder, glob or file of {_SUFFIX} with a column uid")
    files: list[tuple[AbstractFileSystem, str]] = []
    for name in (name for source in sources for name in expand_names(source)):
        filesystem, path = open_name(name)
        folder = path.rstrip("/") if filesystem.isdir(path) else PATTERN.split(path)[0].rpartition("/")[0]
        for parent in (folder, folder.rpartition("/")[0]):
            if in_folder := _below(name, filesystem, f"{parent}/{_FOLDER}"):
                files += [file for file in in_folder if file not in files]
                break
    if not files:
        missing = f"there are no {_FOLDER}/*{_SUFFIX} in or next to {', '.join(sources)}"
        raise UserError(
            f"--subset {condition!r} is an SQL condition, and {missing}",
            allowed=ALLOWED,
            fix="--set build.metadata=FOLDER (in training train.data.metadata); a file has to end in .npy or .parquet",
        )
    return files


def _below(name: str, filesystem: AbstractFileSystem, path: str) -> list[tuple[AbstractFileSystem, str]]:
    listed = list_files(filesystem, path)
    paths = [path for path in listed.files if path.endswith(_SUFFIX)] if listed else []
    return [(filesystem, full_name(name, filesystem, path)) for path in paths]


@contextmanager
def _open_metadata(
    files: list[tuple[AbstractFileSystem, str]], memory: str, spill: Path
) -> Iterator[duckdb.DuckDBPyRelation]:
    """The files as one table with a column uid, on a connection that reaches nothing else."""
    import duckdb

    names = [name if is_url(name) else str(library_path(Path(name))) for _, name in files]
    if odd := next((name for name in names if is_url(name) and PATTERN.search(name)), None):
        problem = f"the path {odd} holds one of * ? [, which DuckDB takes for a pattern"
        raise UserError(problem, fix="give the folder a name without it")
    config: dict[str, Any] = {"memory_limit": memory, "temp_directory": str(spill)}
    config |= {"preserve_insertion_order": False, "python_enable_replacements": False}
    with duckdb.connect(config=config) as con:
        remote = {type(filesystem): filesystem for filesystem, name in files if is_url(name)}
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
            problem = f"{names[0]} (of {len(names)} files) cannot be read as Parquet: {one_line(error)}"
            raise UserError(problem, allowed="Parquet files with a column uid") from None
        if "uid" not in table.columns:
            raise UserError(f"{names[0]} has no column uid", allowed=f"its columns are {', '.join(table.columns)}")
        yield table


@contextmanager
def _enough_memory(memory: str) -> Iterator[None]:
    """Turn DuckDB's out-of-memory error, which through Arrow is an OSError, into a UserError."""
    import duckdb

    try:
        yield
    except (duckdb.Error, OSError, pa.ArrowException) as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        problem = f"build.duckdb_memory = {memory} is too little for the subset: {one_line(error)}"
        raise UserError(problem, fix="raise it, e.g. to 1GiB") from None


@contextmanager
def map_uids(text: str, option: str) -> Iterator[np.ndarray]:
    """An .npy of uids (path or URL), mapped: a structured array [U] of two u8. `option` is for the message."""
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_copy(user_path(text)))
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError(f"it holds {type(array).__name__}")
            kinds = [array.dtype[name].str[1:] for name in array.dtype.names or ()]
            if kinds != ["u8", "u8"] or array.ndim != 1:
                raise ValueError(f"it holds {array.dtype}")
        except FileNotFoundError:
            raise UserError(f"{option}: {text} does not exist", allowed=ALLOWED) from None
        except (OSError, ValueError, EOFError, ImportError) as error:
            raise UserError(f"{option}: {text} is no .npy of uids: {error}", allowed=ALLOWED) from None
        yield array


def in_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array of `map_uids` as UIDS, a bounded number at once."""
    for start in range(0, len(array), ROWS_AT_ONCE):
        yield np.asarray(array[start : start + ROWS_AT_ONCE]).astype(UIDS)


def is_sorted(array: np.ndarray) -> bool:
    """Whether the array of `map_uids` is ascending."""
    for start in range(0, len(array), ROWS_AT_ONCE):  # each part with the first uid of the next one
        part = np.asarray(array[start : start + ROWS_AT_ONCE + 1]).astype(UIDS)
        high, low = part["f0"], part["f1"]
        if not ((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))).all():
            return False
    return True


def sort_uids(uids: Iterator[np.ndarray], memory: str, spill: Path) -> Iterator[np.ndarray]:
    """The same UIDS in ascending order, in batches, by DuckDB, which spills to `spill` what exceeds `memory`."""
    import duckdb

    failed: list[Exception] = []

    def parts() -> Iterator[pa.RecordBatch]:
        try:
            for part in uids:
                yield pa.record_batch([part["f0"].copy(), part["f1"].copy()], schema=_PARTS)
        except Exception as error:  # to be raised below: DuckDB would make another error of it
            failed.append(error)

    with duckdb.connect(config={"memory_limit": memory, "temp_directory": str(spill)}) as con:
        ordered = con.from_arrow(pa.RecordBatchReader.from_batches(_PARTS, parts())).order("f0, f1")
        for batch in ordered.to_arrow_reader(ROWS_AT_ONCE):
            if failed:
                break
            part = np.empty(len(batch), UIDS)
            part["f0"], part["f1"] = batch.column(0).to_numpy(), batch.column(1).to_numpy()
            yield part
    if failed:
        raise failed[0]


def where(
    table: duckdb.DuckDBPyRelation, condition: str, option: str, allowed: str = ALLOWED
) -> duckdb.DuckDBPyRelation:
    """The rows of a table that meet one SQL condition: one expression that is true or false."""
    import duckdb

    refused = f"{option} {condition!r} cannot be used"
    try:
        expression = duckdb.SQLExpression(condition)
        kinds = [str(kind) for kind in table.select(expression).types]
        if kinds != ["BOOLEAN"]:
            raise UserError(f"{refused}: it gives {', '.join(kinds)}, not true or false", allowed=allowed)
        return table.filter(expression)
    except duckdb.Error as error:
        raise_if_out_of_memory(error)
        problem = f"{refused}: it is not one SQL condition: {one_line(error)}"
        raise UserError(problem, allowed=f"{allowed}; columns: {', '.join(table.columns)}") from None


def parse_uids(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """UIDS [N] of the strings that are 32 hex digits, and their rows, int64 [N]; nulls and others are skipped."""
    _, offset_bytes, data = strings.buffers()
    if not len(strings):
        return np.empty(0, UIDS), np.empty(0, np.int64)
    offsets = np.frombuffer(offset_bytes, np.int32, len(strings) + 1, strings.offset * 4)
    text = np.frombuffer(data or b"", np.uint8)
    long_enough = np.diff(offsets) == _DIGITS
    if strings.null_count:
        long_enough &= strings.is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(long_enough)
    if len(rows) == len(strings):  # the usual case: no gather
        digits = _HEX[text[offsets[0] : offsets[-1]].reshape(-1, _DIGITS)]
    else:
        digits = _HEX[text[offsets[rows][:, None] + np.arange(_DIGITS)]]
    good = (digits != _NO_DIGIT).all(axis=1)
    if not good.all():
        digits, rows = digits[good], rows[good]
    values = (digits[:, 0::2] << 4 | digits[:, 1::2]).view(">u8").astype("<u8")
    return values.view(UIDS).reshape(-1), rows


def count_in(uids: np.ndarray, array: np.ndarray) -> np.ndarray:
    """How often each of UIDS [N] is in the sorted UIDS [U]: int64 [N]; reads only the pages that it needs."""
    high, low = array["f0"], array["f1"]
    order = np.argsort(uids["f0"])  # neighbours share pages of a file that is larger than memory
    wanted = uids[order]
    begin = np.searchsorted(high, wanted["f0"], "left")
    end = np.searchsorted(high, wanted["f0"], "right")
    counts = np.empty(len(uids), np.int64)
    after = _bound(low, begin, end, wanted["f1"], np.less_equal)
    counts[order] = after - _bound(low, begin, end, wanted["f1"], np.less)
    return counts


def _bound(values: np.ndarray, begin: np.ndarray, end: np.ndarray, wanted: np.ndarray, before: np.ufunc) -> np.ndarray:
    """For each i the first position in begin[i]:end[i] of sorted `values` that is not `before` wanted[i]; bisection."""
    begin, end = begin.copy(), end.copy()
    while (open_rows := np.flatnonzero(begin < end)).size:
        middle = (begin[open_rows] + end[open_rows]) // 2
        left = before(values[middle], wanted[open_rows])
        begin[open_rows[left]] = middle[left] + 1
        end[open_rows[~left]] = middle[~left]
    return begin


def quoted(text: str | Path) -> str:
    """Text or a path as an SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise `error` again if it is DuckDB's out-of-memory error, which through Arrow is an OSError."""
    if _OUT_OF_MEMORY in str(error):
        raise error
