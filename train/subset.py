"""`train.data.subset`: which samples to train on, by uid or by an SQL condition on the label rows.

.npy of DataComp | .parquet with `uid` | condition -> DuckDB over OUT/labels/*.parquet -> rows -> their samples in the betons

A uid that is there twice repeats its sample; a sample without a uid is in no file of uids.
"""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from labels import beton
from labels.errors import UserError
from labels.files import fingerprint, is_remote, sha256_file
from labels.layout import Layout
from labels.places import PLACE
from train.betons import BetonSet
from train.outs import Opened

_ALLOWED = (
    "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition on key, uid, width, height, token_ids, "
    "label_ids and the columns of train.data.metadata"
)
_MOST_REPEATS = 2**16 - 1
_ROWS_AT_ONCE = 1 << 17


def find_part(betons: BetonSet, subset: str, metadata: str | None) -> tuple[np.ndarray, str]:
    """The samples of a subset: their numbers, int64, ascending, and what tells this subset from others.

    Args:
        betons: the whole set, on this machine.
        subset: `train.data.subset`.
        metadata: `train.data.metadata`.

    Raises:
        UserError: it is none of the three, cannot be read, or selects nothing.
    """
    if betons.staging:
        raise UserError("train.data.subset needs the betons on this machine", mend="copy the OUT to a local folder")
    found = []
    for one in betons.opened:
        counts = _counts(one, subset, metadata)
        for number, part in enumerate(betons.parts):
            first = int(betons.tables.first_samples[number])
            if part.samples and betons.owner(first) is one:
                repeats = counts[_indices(betons, number)]
                found.append(np.repeat(np.arange(first, first + part.samples), repeats))
    chosen = np.concatenate(found)
    if not len(chosen):
        raise UserError(f"the subset {subset!r} selects no sample", mend="name another one")
    is_file = subset.endswith((".npy", ".parquet"))
    return chosen, fingerprint([sha256_file(Path(subset)) if is_file else subset, metadata])


def _indices(betons: BetonSet, number: int) -> np.ndarray:
    """Positions of the label rows of one file of samples, among the rows of its OUT: int64 [samples]."""
    samples, path = betons.parts[number].samples, betons.paths[number]
    if betons.tables.allocations[number]:
        return np.fromfile(path, beton.METADATA, samples, offset=beton.METADATA_OFFSET)["index"]
    return np.fromfile(path, PLACE, samples, offset=int(betons.tables.tables[number]))["index"].astype(np.int64)


def _counts(one: Opened, subset: str, metadata: str | None) -> np.ndarray:
    """How often each label row of an OUT is in the subset: uint16 [rows]."""
    counts = np.zeros(sum(part.rows for part in one.manifest.shards), np.uint16)
    files = [str(Layout(one.source.out).label_file(part.name)) for part in one.manifest.shards if part.rows]
    if is_remote(one.source.out) or not files:
        return counts
    with duckdb.connect(config={"python_enable_replacements": False}) as con:
        con.register("firsts", _first_rows(one))
        try:
            query, values = _query(con, subset, metadata)
            reader = con.sql(query, params=[files, *values]).to_arrow_reader(_ROWS_AT_ONCE)
            for batch in reader:
                rows, repeats = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
                if repeats.max(initial=0) > _MOST_REPEATS:
                    raise UserError(f"the subset {subset} repeats a uid {repeats.max()} times", allowed=f"{_MOST_REPEATS} times")
                counts[rows.astype(np.int64)] = repeats
        except (duckdb.Error, OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise UserError(f"train.data.subset {subset!r} cannot be used: {told}", allowed=_ALLOWED) from None
    return counts


def _first_rows(one: Opened) -> pa.Table:
    shards = [part for part in one.manifest.shards if part.rows]
    files = [str(Layout(one.source.out).label_file(part.name)) for part in shards]
    return pa.table({"name": files, "first_row": [part.first_index for part in shards]})


def _query(con: duckdb.DuckDBPyConnection, subset: str, metadata: str | None) -> tuple[str, list[Any]]:
    """SQL whose first parameter is the list of label files: (row, repeats)."""
    rows = (
        "SELECT first_row + file_row_number AS row, labels.* EXCLUDE (filename, file_row_number) "
        "FROM read_parquet(?, filename = true, file_row_number = true) labels JOIN firsts ON filename = name"
    )
    if subset.endswith(".npy"):
        array = np.load(subset, mmap_mode="r", allow_pickle=False)
        if [array.dtype[name].str[1:] for name in array.dtype.names or ()] != ["u8", "u8"]:
            raise ValueError(f"it holds {array.dtype}")
        first, last = array.dtype.fields
        high, low = np.ascontiguousarray(array[first]), np.ascontiguousarray(array[last])
        con.register("uids", pa.table({"high": high, "low": low}))
        numbers = [f"TRY_CAST('0x' || substr(uid, {at}, 16) AS UBIGINT)" for at in (1, 17)]
        wanted = "SELECT high, low, count(*) AS repeats FROM uids GROUP BY ALL"
        return f"SELECT row, repeats FROM ({rows}) JOIN ({wanted}) ON high = {numbers[0]} AND low = {numbers[1]} AND length(uid) = 32", []
    if subset.endswith(".parquet"):
        wanted = "SELECT uid, count(*) AS repeats FROM read_parquet(?) GROUP BY uid"
        return f"SELECT row, repeats FROM ({rows}) JOIN ({wanted}) USING (uid)", [subset]
    if len(con.extract_statements(f"SELECT 1 WHERE ({subset})")) != 1:
        raise ValueError("it is not one condition")
    if metadata is None:
        return f"SELECT row, 1 AS repeats FROM ({rows}) WHERE ({subset})", []
    pattern = f"{metadata.rstrip('/')}/*.parquet" if Path(metadata).is_dir() else metadata
    columns = con.execute("SELECT * FROM read_parquet(?) LIMIT 0", [pattern]).description or []
    own = {"uid", "key", "width", "height", "token_ids", "label_ids", "row"}
    more = ", ".join(f'"{column[0]}"' for column in columns if column[0] not in own)
    joined = f"({rows}) LEFT JOIN (SELECT DISTINCT ON (uid) uid{', ' + more if more else ''} FROM read_parquet(?)) USING (uid)"
    return f"SELECT row, 1 AS repeats FROM {joined} WHERE ({subset})", [pattern]
