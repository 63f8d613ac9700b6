"""Which samples a subset names: a file of uids or one SQL condition, read in the same way by both stages.

    .npy of DataComp     -> `map_uids`: checked and mapped -> `in_parts`
    .parquet with `uid`  -> DuckDB -> `parse_uids`: 32 hex digits are two u8
    SQL condition        -> `where`: one expression that is true or false, on a table of DuckDB
    -> `sort_uids`, which spills what does not fit -> `count_in`: how often each sample's uid is in the array

A uid that is there twice repeats its sample; a sample without a uid is in no subset of uids. Shapes: N uids of a batch,
U of the array. duckdb is imported where it is used, so that a training node without a subset works without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from labels.storage import UserError, local_copy, out_path

if TYPE_CHECKING:
    import duckdb

UIDS = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""DataComp's: the first and the last 16 hex digits."""
ALLOWED = "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition, e.g. 'clip_l14_similarity_score > 0.3'"

ROWS_AT_ONCE = 1 << 17
_PARTS = pa.schema([("f0", pa.uint64()), ("f1", pa.uint64())])
OUT_OF_MEMORY = "Out of Memory Error"
_DIGITS = 32
_NO_DIGIT = 255
_HEX = np.full(256, _NO_DIGIT, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


@contextmanager
def map_uids(text: str, option: str) -> Iterator[np.ndarray]:
    """An .npy of uids, mapped: a structured array [U] of two u8; a remote one is downloaded first.

    Args:
        text: path or URL.
        option: what the user set, for the message.

    Raises:
        UserError: it does not exist, or holds something else than uids.
    """
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_copy(out_path(text)))
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            kinds = (
                [array.dtype[name].str[1:] for name in array.dtype.names or ()] if isinstance(array, np.ndarray) else []
            )
            if kinds != ["u8", "u8"] or array.ndim != 1:
                raise ValueError(f"it holds {getattr(array, 'dtype', type(array).__name__)}")
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
    # Each part with the first uid of the next one.
    parts = (
        np.asarray(array[start : start + ROWS_AT_ONCE + 1]).astype(UIDS) for start in range(0, len(array), ROWS_AT_ONCE)
    )
    return all(_ascending(part["f0"], part["f1"]) for part in parts)


def _ascending(high: np.ndarray, low: np.ndarray) -> bool:
    return bool(((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))).all())


def sort_uids(uids: Iterator[np.ndarray], memory: str, spill: Path) -> Iterator[np.ndarray]:
    """The same UIDS in ascending order, in batches, by way of DuckDB, which spills what does not fit.

    Args:
        memory: DuckDB's limit, e.g. `1GiB`.
        spill: a folder for what does not fit.
    """
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
    """The rows of a table that meet one SQL condition.

    Raises:
        UserError: `condition` is not one expression that is true or false, or DuckDB refuses it.
    """
    import duckdb

    try:
        expression = duckdb.SQLExpression(condition)
        kinds = [str(kind) for kind in table.select(expression).types]
        if kinds != ["BOOLEAN"]:
            raise UserError(
                f"{option} {condition!r} cannot be used: it gives {', '.join(kinds)}, not true or false",
                allowed=allowed,
            )
        return table.filter(expression)
    except duckdb.Error as error:
        raise_if_out_of_memory(error)
        raise UserError(
            f"{option} {condition!r} cannot be used: it is not one SQL condition: {one_line(error)}",
            allowed=f"{allowed}; columns: {', '.join(table.columns)}",
        ) from None


def parse_uids(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """UIDS [N] of those strings that are 32 hex digits, and their rows, int64 [N]; the others, and nulls, are skipped."""
    _, places, data = strings.buffers()
    if not len(strings):
        return np.empty(0, UIDS), np.empty(0, np.int64)
    offsets = np.frombuffer(places, np.int32, len(strings) + 1, strings.offset * 4)
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
    """How often each of UIDS [N] stands in the sorted UIDS [U]: int64 [N]; touches some of the array's pages only."""
    high, low = array["f0"], array["f1"]
    # In order, so that neighbours share pages of a file that is larger than memory.
    order = np.argsort(uids["f0"])
    wanted = uids[order]
    begin = np.searchsorted(high, wanted["f0"], "left")
    end = np.searchsorted(high, wanted["f0"], "right")
    counts = np.empty(len(uids), np.int64)
    counts[order] = _bound(low, begin, end, wanted["f1"], np.less_equal) - _bound(
        low, begin, end, wanted["f1"], np.less
    )
    return counts


def _bound(values: np.ndarray, begin: np.ndarray, end: np.ndarray, wanted: np.ndarray, before: np.ufunc) -> np.ndarray:
    """For each i the first place in begin[i]:end[i] of the sorted `values` that is not `before` wanted[i]: N bisections
    at once.
    """
    begin, end = begin.copy(), end.copy()
    while (open_rows := np.flatnonzero(begin < end)).size:
        middle = (begin[open_rows] + end[open_rows]) // 2
        left = before(values[middle], wanted[open_rows])
        begin[open_rows[left]] = middle[left] + 1
        end[open_rows[~left]] = middle[~left]
    return begin


def quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def raise_if_out_of_memory(error: Exception) -> None:
    """DuckDB's complaint of too little memory as it is: by way of Arrow it comes as an OSError."""
    if OUT_OF_MEMORY in str(error):
        raise error
