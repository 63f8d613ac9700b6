"""`--subset`: which samples to label, as one sorted array of uids that every worker maps.

.npy of DataComp | .parquet with `uid` | SQL condition on metadata/*.parquet -> DuckDB sorts -> subset.npy -> select(batch)

A uid that is there twice repeats its sample.
"""

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs

from labels.errors import UserError
from labels.files import is_remote, sha256_file, whole_file
from preprocess.inputs.metadata import enough_memory, metadata_files, open_metadata, parquet_files, uids_where
from preprocess.inputs.rowbatch import RowBatch
from preprocess.inputs.uids import UIDS, count_in, parse_uids

_ROWS_AT_ONCE = 1 << 17
_FINGERPRINT_DIGITS = 16
_ALLOWED = (
    "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition on the metadata,"
    " e.g. 'clip_l14_similarity_score > 0.3'"
)
_PARTS = pa.schema([("f0", pa.uint64()), ("f1", pa.uint64())])


def resolve_subset(text: str, metadata: str | None, sources: Sequence[str], target: Path, memory: str, spill: Path) -> str:
    """Write the uids that `text` names to `target`, sorted, as .npy of dtype UIDS, in one step and in bounded memory.

    Args:
        text: .npy or .parquet (path or URL), or an SQL condition on the metadata.
        metadata: folder, glob or file of the metadata's .parquet; None: `metadata/` in or beside the folders of `sources`.
        sources: what is being labelled.
        target: the file to write; a UPath may be remote.
        memory: DuckDB's limit, e.g. `1GiB`.
        spill: a folder for what does not fit.

    Returns:
        A fingerprint of the array: 16 hex digits, equal for equal sets of uids.

    Raises:
        UserError: `text` is none of the three, cannot be read, holds something else than uids, or selects nothing.
    """
    with enough_memory(memory), _uids(text, metadata, sources, memory, spill) as (uids, is_sorted), whole_file(target) as partial:
        count = _write(partial, uids if is_sorted else _sorted(uids, memory, spill))
        if not count:
            raise UserError(f"the subset {text!r} selects no sample", mend="name another subset, or leave it out")
        return sha256_file(partial)[:_FINGERPRINT_DIGITS]


def open_subset(path: Path) -> np.ndarray:
    """What `resolve_subset` wrote, UIDS [U], mapped read-only; a remote file is read into memory."""
    return np.load(io.BytesIO(path.read_bytes())) if is_remote(path) else np.load(path, mmap_mode="r", allow_pickle=False)


def select(batch: RowBatch, subset: np.ndarray) -> tuple[RowBatch, int]:
    """The rows of a batch whose uid is in the subset, as often as it is there; and how many rows are left out.

    A row without a uid is in no subset. Faults stay: which samples they are of is not known.
    """
    uids, rows = parse_uids(batch.table["uid"].combine_chunks())  # type: ignore[arg-type]
    counts = count_in(uids, subset)
    table = batch.table.take(pa.array(np.repeat(rows, counts)))
    return RowBatch(table, batch.faults), len(batch.table) - int(np.count_nonzero(counts))


@contextmanager
def _uids(text: str, metadata: str | None, sources: Sequence[str], memory: str, spill: Path) -> Iterator[tuple[Iterator[np.ndarray], bool]]:
    """UIDS in batches, and whether they are sorted already."""
    if text.endswith(".npy"):
        with _mapped(text) as array:
            yield _parts(array), all(_ascending(part) for part in _parts(array, overlap=1))
        return
    is_file = text.endswith(".parquet")
    files = parquet_files(text, "--subset", _ALLOWED) if is_file else metadata_files(metadata, sources, text, _ALLOWED)
    with open_metadata(files, memory, spill) as table:
        strings = uids_where(table, None if is_file else text, _ALLOWED)
        yield (_parsed(part, text) for part in strings), False


@contextmanager
def _mapped(text: str) -> Iterator[np.ndarray]:
    """An .npy of uids, mapped; a remote one is downloaded first."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            filesystem, path = url_to_fs(text)
            if "://" in text:
                filesystem.get_file(path, f"{folder}/subset.npy")
                path = f"{folder}/subset.npy"
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            kinds = [array.dtype[name].str[1:] for name in array.dtype.names or ()] if isinstance(array, np.ndarray) else []
            if kinds != ["u8", "u8"] or array.ndim != 1:
                raise ValueError(f"it holds {getattr(array, 'dtype', type(array).__name__)}")
        except FileNotFoundError:
            raise UserError(f"the subset {text} does not exist", allowed=_ALLOWED) from None
        except (OSError, ValueError, EOFError, ImportError) as error:
            raise UserError(f"the subset {text} is no .npy of uids: {error}", allowed=_ALLOWED) from None
        yield array


def _parts(array: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _ROWS_AT_ONCE):
        yield np.asarray(array[start : start + _ROWS_AT_ONCE + overlap]).astype(UIDS)


def _ascending(uids: np.ndarray) -> bool:
    high, low = uids["f0"], uids["f1"]
    return bool(((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))).all())


def _parsed(strings: pa.StringArray, text: str) -> np.ndarray:
    uids, rows = parse_uids(strings)
    if len(rows) < len(strings):
        wrong = strings[int(np.setdiff1d(np.arange(len(strings)), rows)[0])].as_py()
        raise UserError(f"the subset {text!r} gives the uid {wrong!r}", allowed="uids of 32 hex digits, as DataComp's")
    return uids


def _sorted(uids: Iterator[np.ndarray], memory: str, spill: Path) -> Iterator[np.ndarray]:
    """The same uids in ascending order, by way of DuckDB, which spills what does not fit."""
    failed: list[Exception] = []

    def parts() -> Iterator[pa.RecordBatch]:
        try:
            for part in uids:
                yield pa.record_batch([part["f0"].copy(), part["f1"].copy()], schema=_PARTS)
        except Exception as error:  # to be raised below: DuckDB would make another error of it
            failed.append(error)

    with duckdb.connect(config={"memory_limit": memory, "temp_directory": str(spill)}) as con:
        ordered = con.from_arrow(pa.RecordBatchReader.from_batches(_PARTS, parts())).order("f0, f1")
        for batch in ordered.to_arrow_reader(_ROWS_AT_ONCE):
            if failed:
                break
            part = np.empty(len(batch), UIDS)
            part["f0"], part["f1"] = batch.column(0).to_numpy(), batch.column(1).to_numpy()
            yield part
    if failed:
        raise failed[0]


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
