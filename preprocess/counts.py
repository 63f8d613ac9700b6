"""Document frequencies by DuckDB, and the two files that hold them: idf.parquet, idf.duckdb.

label file -> count file, one a shard -> summed -> idf.parquet, idf.duckdb. The counts of a shard are kept, so that the table of a
part of the shards, or of more of them, is summed in seconds.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.choices import Formula
from labels.errors import UserError
from labels.files import is_remote, local_copy, whole_file, write_whole
from labels.idf import idf_weights
from labels.layout import Layout
from labels.manifest import ShardPart
from labels.schema import COUNTS, TOKENS

# A storage version that the shells of several DuckDB releases open, not only the newest.
_STORAGE_VERSION = "v1.2.0"
_SHARD_MEMORY = "256MiB"
_LABELS_AT_ONCE = 1 << 21
_COUNTED_BITS = 16
_COUNT_LABELS = (
    "SELECT token_id, count(*) AS document_frequency FROM (SELECT unnest(label_ids) AS token_id FROM read_parquet($1)) GROUP BY token_id"
)


class ShardCounts:
    """Document frequencies of one shard, counted by DuckDB batch by batch while its label file is written."""

    def __init__(self) -> None:
        self._con = _own_connection()
        self._con.execute("CREATE OR REPLACE TEMP TABLE counted (token_id INTEGER, document_frequency BIGINT)")
        self._waiting: list[np.ndarray] = []

    def add(self, label_ids: np.ndarray) -> None:
        """Count the labels of more captions, int32 [T], each once a caption."""
        self._waiting.append(label_ids)
        if sum(map(len, self._waiting)) >= _LABELS_AT_ONCE:
            self._count()

    def _count(self) -> None:
        labels = np.concatenate([np.empty(0, np.int32), *self._waiting])
        if labels.max(initial=0) < 1 << _COUNTED_BITS:
            labels = labels.astype(np.uint16)  # DuckDB takes the range from this type, and counts in an array
        self._con.register("labels", pa.table({"token_id": labels}))
        self._con.execute("INSERT INTO counted SELECT token_id, count(*) FROM labels GROUP BY token_id")
        self._con.unregister("labels")
        self._waiting = []

    def write(self, path: Path) -> int:
        """The count file: token_id int32, document_frequency int64, of the tokens that occur, ascending.

        Returns:
            bytes of the file, by which its marker knows it: it is made in no time, and so not worth an fsync.
        """
        self._count()
        query = "SELECT token_id, sum(document_frequency)::BIGINT AS document_frequency FROM counted GROUP BY token_id ORDER BY token_id"
        counted = self._con.sql(query).to_arrow_table()
        with whole_file(path, durable=False) as partial:
            pq.write_table(counted.cast(COUNTS), partial, compression="zstd")
            return partial.stat().st_size


@cache
def _own_connection() -> duckdb.DuckDBPyConnection:
    """One a process: to open one takes as long as to count ten thousand captions. The other workers have the other cores."""
    # One bit more, for nulls.
    return duckdb.connect(config={"threads": 1, "memory_limit": _SHARD_MEMORY, "perfect_ht_threshold": _COUNTED_BITS + 1})


def sum_counts(files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    """Document frequency int64 [V] over the shards whose count files are given: exact, since each caption is in one shard.

    Args:
        files: what `count_shard` wrote.
        vocabulary: V.
        memory: DuckDB's limit, e.g. `1GiB`.
        spill: a folder for what does not fit.

    Raises:
        UserError: `memory` is too little even with spilling.
    """
    if not files:
        return np.zeros(vocabulary, np.int64)
    query = "SELECT token_id, sum(document_frequency)::BIGINT AS document_frequency FROM read_parquet($1) GROUP BY token_id"
    return _frequencies(query, files, vocabulary, memory, spill)


def document_frequencies(files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    """The same counted anew over label Parquet files; their label_ids hold each token once a caption."""
    if not files:
        return np.zeros(vocabulary, np.int64)
    return _frequencies(_COUNT_LABELS, files, vocabulary, memory, spill)


def _frequencies(query: str, files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    config = {"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": False}
    try:
        with duckdb.connect(config=config) as con:
            if is_remote(files[0]):
                con.register_filesystem(files[0].fs)  # type: ignore[attr-defined]  # a UPath
            counted = con.sql(query, params=[[str(file) for file in files]]).to_arrow_table()
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"build.duckdb_memory = {memory} is too little to count in: {error}", mend="raise it, e.g. to 1GiB") from None
    frequency = np.zeros(vocabulary, np.int64)
    frequency[counted["token_id"].to_numpy()] = counted["document_frequency"].to_numpy()
    return frequency


def write_idf_parquet(path: Path, tokens: list[str], frequency: np.ndarray, captions: int, formula: Formula) -> None:
    """The table tokens(token_id, token, document_frequency, idf), one row a vocabulary entry."""
    columns = [np.arange(len(tokens), dtype=np.int32), pa.array(tokens), frequency, idf_weights(frequency, captions, formula)]
    table = pa.table(columns, schema=TOKENS)
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_idf_duckdb(
    layout: Layout, *, captions: int, tokens: int | None, formula: Formula, tokenizer: str, fingerprint: str, shards: Iterable[ShardPart]
) -> None:
    """idf.duckdb: tables tokens, corpus, shards, and the view labels over the Parquet files.

    The view names the files relative to OUT, so that it survives moving OUT: `preprocess sql` sets the search path,
    the DuckDB shell is started inside OUT. DuckDB puts random identifiers into its files; their content is the same. `tokens`: token ids in
    all label files; None, of an OUT begun before its shards told them, reads them all.
    """

    def write(partial: Path) -> None:
        partial.unlink(missing_ok=True)
        # The search path is a list split at commas, which OUT may hold: a link in a folder of our own stands for it.
        with tempfile.TemporaryDirectory() as folder, duckdb.connect() as con, local_copy(layout.idf_parquet) as idf:
            labels, everywhere = Path(folder) / layout.labels.name, layout.labels
            if is_remote(layout.out):
                _download_first(layout.labels, labels)  # a view is only made over files that are there
                con.register_filesystem(layout.out.fs)  # type: ignore[attr-defined]  # a UPath
            else:
                everywhere = layout.labels.resolve()  # the search path below would hide a relative one
                labels.symlink_to(everywhere)
            con.execute(f"SET file_search_path = {quoted(Path(folder))}")
            con.execute(f"ATTACH {quoted(partial)} AS idf (STORAGE_VERSION '{_STORAGE_VERSION}')")
            con.execute("USE idf")
            con.execute("CREATE TABLE tokens AS SELECT * FROM read_parquet($1)", [str(idf.resolve())])
            con.execute("CREATE VIEW labels AS SELECT * FROM read_parquet('labels/*.parquet')")
            found = tokens
            if found is None:
                query = "SELECT coalesce(sum(len(token_ids)), 0) FROM read_parquet($1)"
                [(found,)] = con.execute(query, [f"{everywhere}/*.parquet"]).fetchall()
            con.execute(
                "CREATE TABLE corpus AS SELECT $1::BIGINT AS captions, (SELECT sum(document_frequency) FROM tokens)::BIGINT AS labels,"
                " $5::BIGINT AS tokens,"
                " (SELECT count(*) FROM tokens) AS vocabulary,"
                " $2 AS formula, $3 AS tokenizer, $4 AS tokenizer_fingerprint",
                [captions, formula, tokenizer, fingerprint, found],
            )
            con.execute("CREATE TABLE shards (shard VARCHAR, rows BIGINT, quarantined BIGINT, reasons MAP(VARCHAR, BIGINT))")
            for shard in shards:
                reasons = Counter(shard.quarantined)
                con.execute(
                    "INSERT INTO shards VALUES ($1, $2, $3, MAP($4::VARCHAR[], $5::BIGINT[]))",
                    [shard.name, shard.rows, reasons.total(), list(reasons), list(reasons.values())],
                )

    write_whole(layout.idf_duckdb, write)


def _download_first(labels: Path, folder: Path) -> None:
    """One label file of an object store into `folder`: all have the same schema."""
    first = next(iter(sorted(labels.glob("*.parquet"), key=str)))
    folder.mkdir()
    with local_copy(first) as file:
        shutil.copy(file, folder)


def quoted(path: Path) -> str:
    """A path as an SQL string literal."""
    return "'" + str(path).replace("'", "''") + "'"
