"""Document frequencies by DuckDB over the label Parquet, and the two files that hold them: idf.parquet, idf.duckdb."""

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.errors import UserError
from labels.files import write_whole
from labels.idf import Formula, idf_weights
from labels.layout import Layout
from labels.manifest import ShardPart
from labels.schema import TOKENS

# A storage version that the shells of several DuckDB releases open, not only the newest.
_STORAGE_VERSION = "v1.2.0"


def document_frequencies(files: list[Path], vocabulary: int, memory: str, spill: Path) -> tuple[np.ndarray, int]:
    """Count, exactly and in bounded memory, in how many captions every token occurs.

    Args:
        files: label Parquet files; label_ids hold each token once a caption.
        vocabulary: V.
        memory: DuckDB's limit, e.g. `1GiB`.
        spill: a folder for what does not fit.

    Returns:
        document frequency int64 [V], and the number of captions.

    Raises:
        UserError: `memory` is too little even with spilling.
    """
    try:
        return _count(files, vocabulary, memory, spill)
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"build.duckdb_memory = {memory} is too little to count in: {error}", mend="raise it, e.g. to 1GiB") from None


def _count(files: list[Path], vocabulary: int, memory: str, spill: Path) -> tuple[np.ndarray, int]:
    with duckdb.connect(config={"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": False}) as con:
        names = [str(file) for file in files]
        counted = con.sql(
            "SELECT token_id, count(*) AS df FROM (SELECT unnest(label_ids) AS token_id FROM read_parquet($1)) GROUP BY token_id",
            params=[names],
        ).to_arrow_table()
        row = con.execute("SELECT count(*) FROM read_parquet($1)", [names]).fetchone()
    frequency = np.zeros(vocabulary, np.int64)
    frequency[counted["token_id"].to_numpy()] = counted["df"].to_numpy()
    return frequency, row[0] if row else 0


def write_idf_parquet(path: Path, tokens: list[str], frequency: np.ndarray, captions: int, formula: Formula) -> None:
    """The table tokens(token_id, token, document_frequency, idf), one row a vocabulary entry."""
    columns = [np.arange(len(tokens), dtype=np.int32), pa.array(tokens), frequency, idf_weights(frequency, captions, formula)]
    table = pa.table(columns, schema=TOKENS)
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_idf_duckdb(
    layout: Layout, *, captions: int, formula: Formula, tokenizer: str, fingerprint: str, shards: Iterable[ShardPart]
) -> None:
    """idf.duckdb: tables tokens, corpus, shards, and the view labels over the Parquet files.

    The view names the files relative to OUT, so that it survives moving OUT: `preprocess sql` sets the search path,
    the DuckDB shell is started inside OUT. DuckDB puts random identifiers into its files; their content is the same.
    """

    def write(partial: Path) -> None:
        partial.unlink(missing_ok=True)
        # The search path is a list split at commas, which OUT may hold: a link in a folder of our own stands for it.
        with tempfile.TemporaryDirectory() as folder, duckdb.connect() as con:
            (Path(folder) / layout.labels.name).symlink_to(layout.labels.resolve())
            con.execute(f"SET file_search_path = {quoted(Path(folder))}")
            con.execute(f"ATTACH {quoted(partial)} AS idf (STORAGE_VERSION '{_STORAGE_VERSION}')")
            con.execute("USE idf")
            con.execute("CREATE TABLE tokens AS SELECT * FROM read_parquet($1)", [str(layout.idf_parquet)])
            con.execute("CREATE VIEW labels AS SELECT * FROM read_parquet('labels/*.parquet')")
            con.execute(
                "CREATE TABLE corpus AS SELECT $1::BIGINT AS captions, (SELECT sum(document_frequency) FROM tokens)::BIGINT AS labels,"
                " (SELECT coalesce(sum(len(token_ids)), 0) FROM labels)::BIGINT AS tokens,"
                " (SELECT count(*) FROM tokens) AS vocabulary,"
                " $2 AS formula, $3 AS tokenizer, $4 AS tokenizer_fingerprint",
                [captions, formula, tokenizer, fingerprint],
            )
            con.execute("CREATE TABLE shards (shard VARCHAR, rows BIGINT, quarantined BIGINT, reasons MAP(VARCHAR, BIGINT))")
            for shard in shards:
                reasons = Counter(shard.quarantined)
                con.execute(
                    "INSERT INTO shards VALUES ($1, $2, $3, MAP($4::VARCHAR[], $5::BIGINT[]))",
                    [shard.name, shard.rows, reasons.total(), list(reasons), list(reasons.values())],
                )

    write_whole(layout.idf_duckdb, write)


def quoted(path: Path) -> str:
    """A path as an SQL string literal."""
    return "'" + str(path).replace("'", "''") + "'"
