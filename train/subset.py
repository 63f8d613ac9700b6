"""`train.data.subset`: which samples to train on, by uid or by an SQL condition on the label rows.

.npy of DataComp | .parquet with `uid` | condition -> DuckDB over labels/*.parquet -> rows -> their samples in the betons

A uid that is there twice repeats its sample; a sample without a uid is in no file of uids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from labels import beton
from labels.errors import UserError
from labels.layout import Layout
from labels.places import PLACE
from labels.storage import fingerprint, is_remote, sha256_file
from labels.subset import ROWS_AT_ONCE, UIDS, count_in, in_parts, is_sorted, map_uids, one_line, parse_uids, quoted, where
from train.data.dataset import BetonSet
from train.data.mixture import Opened

if TYPE_CHECKING:
    import duckdb

_ALLOWED = (
    "an .npy of dtype u8,u8 as DataComp's, a .parquet with a column uid, or one SQL condition on key, uid, width, height, token_ids, "
    "label_ids and the columns of train.data.metadata"
)
_MOST_REPEATS = 2**16 - 1
_OPTION = "train.data.subset"


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
        raise UserError("train.data.subset needs the betons on this machine", mend="copy the output folder to this machine")
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
    """Positions of the label rows of one file of samples, among the rows of its output folder: int64 [samples]."""
    samples, path = betons.parts[number].samples, betons.paths[number]
    if betons.tables.allocations[number]:
        return np.fromfile(path, beton.METADATA, samples, offset=beton.METADATA_OFFSET)["index"]
    return np.fromfile(path, PLACE, samples, offset=int(betons.tables.tables[number]))["index"].astype(np.int64)


def _counts(one: Opened, subset: str, metadata: str | None) -> np.ndarray:
    """How often each label row of an output folder is in the subset: uint16 [rows]."""
    import duckdb

    counts = np.zeros(sum(part.rows for part in one.manifest.shards), np.uint16)
    shards = [part for part in one.manifest.shards if part.rows]
    files = [str(Layout(one.source.out).label_file(part.name)) for part in shards]
    if is_remote(one.source.out) or not files:
        return counts
    with duckdb.connect(config={"python_enable_replacements": False}) as con:
        con.register("firsts", pa.table({"name": files, "first_row": [part.first_index for part in shards]}))
        try:
            for rows, repeats in _repeats(con, files, subset, metadata):
                if repeats.max(initial=0) > _MOST_REPEATS:
                    raise UserError(f"the subset {subset} repeats a uid {repeats.max()} times", allowed=f"{_MOST_REPEATS} times")
                counts[rows] = repeats
        except (duckdb.Error, OSError, ValueError) as error:
            raise UserError(f"{_OPTION} {subset!r} cannot be used: {one_line(error)}", allowed=_ALLOWED) from None
    return counts


def _repeats(
    con: duckdb.DuckDBPyConnection, files: list[str], subset: str, metadata: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Label rows, int64 [N], and how often each is in the subset, int64 [N], in batches."""
    names = ", ".join(map(quoted, files))
    rows = (
        "SELECT first_row + file_row_number AS row, labels.* EXCLUDE (filename, file_row_number) "
        f"FROM read_parquet([{names}], filename = true, file_row_number = true) labels JOIN firsts ON filename = name"
    )
    if subset.endswith(".npy"):
        with map_uids(subset, _OPTION) as array:
            ascending, uids = is_sorted(array), np.concatenate([np.empty(0, UIDS), *in_parts(array)])
        uids = uids if ascending else uids[np.lexsort((uids["f1"], uids["f0"]))]
        for batch in con.sql(f"SELECT row, uid FROM ({rows})").to_arrow_reader(ROWS_AT_ONCE):
            wanted, places = parse_uids(batch.column(1).cast(pa.string()))
            yield batch.column(0).to_numpy()[places].astype(np.int64), count_in(wanted, uids)
        return
    if subset.endswith(".parquet"):
        wanted = f"SELECT uid, count(*) AS repeats FROM read_parquet({quoted(subset)}) GROUP BY uid"
        table = con.sql(f"SELECT row, repeats FROM ({rows}) JOIN ({wanted}) USING (uid)")
    else:
        table = where(_with_metadata(con, rows, metadata), subset, _OPTION, _ALLOWED).project("row, 1 AS repeats")
    for batch in table.to_arrow_reader(ROWS_AT_ONCE):
        yield batch.column(0).to_numpy().astype(np.int64), batch.column(1).to_numpy()


def _with_metadata(con: duckdb.DuckDBPyConnection, rows: str, metadata: str | None) -> duckdb.DuckDBPyRelation:
    """The label rows, and of `train.data.metadata` the columns that they do not have."""
    if metadata is None:
        return con.sql(rows)
    pattern = quoted(f"{metadata.rstrip('/')}/*.parquet" if Path(metadata).is_dir() else metadata)
    own = {"uid", "key", "width", "height", "token_ids", "label_ids", "row"}
    more = [f'"{name}"' for name in con.sql(f"FROM read_parquet({pattern})").columns if name not in own]
    scores = f"SELECT DISTINCT ON (uid) {', '.join(['uid', *more])} FROM read_parquet({pattern})"
    return con.sql(f"SELECT * FROM ({rows}) LEFT JOIN ({scores}) USING (uid)")
