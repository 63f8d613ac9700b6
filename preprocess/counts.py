"""Document frequencies by DuckDB, and the tables that are made of them.

    label file -> counts/<shard>.parquet, while it is written
    count files of all shards -> summed -> idf.parquet, idf.duckdb
    count files of some shards, or of several output folders -> `preprocess idf` -> one Parquet file like idf.parquet

Every caption is in one shard, so sums of counts are exact. Counts are stored by shard: summing them takes seconds.
"""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels import Formula
from labels.idf import idf_weights, read_idf
from labels.manifest import COUNTS, TOKENS, Manifest, ShardPart, read_manifest
from labels.show.terminal import count
from labels.storage import Layout, UserError, atomic_write, is_remote, library_path, local_copy, write_whole
from labels.subset import quoted

# With the fingerprint, what decides the labels of a caption: only counts that agree in these can be summed.
_SAME_OPTIONS = ("context", "stop_words", "ngrams")


# A storage version that the shells of several DuckDB releases open, not only the newest.
_STORAGE_VERSION = "v1.2.0"
_SHARD_MEMORY = "256MiB"
_LABELS_AT_ONCE = 1 << 21
_COUNTED_BITS = 16
_COUNT_LABELS = """
SELECT token_id, count(*) AS document_frequency FROM (SELECT unnest(label_ids) AS token_id FROM read_parquet($1))
GROUP BY token_id
"""
_SUM_COUNTS = "SELECT token_id, sum(document_frequency)::BIGINT AS document_frequency FROM {} GROUP BY token_id"
_CORPUS = """
CREATE TABLE corpus AS SELECT $1::BIGINT AS captions, (SELECT sum(document_frequency) FROM tokens)::BIGINT AS labels,
$5::BIGINT AS tokens, (SELECT count(*) FROM tokens) AS vocabulary, $2 AS formula, $3 AS tokenizer,
$4 AS tokenizer_fingerprint
"""
_SHARDS = "CREATE TABLE shards (shard VARCHAR, rows BIGINT, quarantined BIGINT, reasons MAP(VARCHAR, BIGINT))"


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
        """Write the count file: token_id int32, document_frequency int64, of the tokens that occur, ascending.

        Returns its bytes, for the marker: the file is not synced to the disk, since it is quickly made again, and its
        length shows whether a power failure has cut it.
        """
        self._count()
        counted = self._con.sql(f"{_SUM_COUNTS.format('counted')} ORDER BY token_id").to_arrow_table()
        with atomic_write(path, durable=False) as partial:
            pq.write_table(counted.cast(COUNTS), partial, compression="zstd")
            return partial.stat().st_size


@cache
def _own_connection() -> duckdb.DuckDBPyConnection:
    """One for each worker, on its core: opening a connection takes as long as counting ten thousand captions."""
    bits = _COUNTED_BITS + 1  # one for nulls
    return duckdb.connect(config={"threads": 1, "memory_limit": _SHARD_MEMORY, "perfect_ht_threshold": bits})


def sum_counts(files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    """Document frequency int64 [V] of the shards with these count files: exact, since each caption is in one shard.

    `memory`: DuckDB's limit, e.g. `1GiB`; `spill`: a folder for what does not fit.

    Raises:
        UserError: `memory` is too little even with spilling.
    """
    return _frequencies(_SUM_COUNTS.format("read_parquet($1)"), files, vocabulary, memory, spill)


def document_frequencies(files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    """Document frequencies counted from scratch over label files, whose label_ids hold each token once a caption."""
    return _frequencies(_COUNT_LABELS, files, vocabulary, memory, spill)


def _frequencies(query: str, files: Sequence[Path], vocabulary: int, memory: str, spill: Path) -> np.ndarray:
    if not files:
        return np.zeros(vocabulary, np.int64)
    config = {"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": False}
    try:
        with duckdb.connect(config=config) as con:
            if is_remote(files[0]):
                con.register_filesystem(files[0].fs)  # type: ignore[attr-defined]  # a UPath
            counted = con.sql(query, params=[[str(library_path(file)) for file in files]]).to_arrow_table()
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"build.duckdb_memory = {memory} is too little to count in: {error}", fix="raise it, e.g. to 1GiB"
        ) from None
    frequency = np.zeros(vocabulary, np.int64)
    frequency[counted["token_id"].to_numpy()] = counted["document_frequency"].to_numpy()
    return frequency


def write_idf_parquet(path: Path, tokens: list[str], frequency: np.ndarray, captions: int, formula: Formula) -> None:
    """The table tokens(token_id, token, document_frequency, idf), one row for each vocabulary entry."""
    token_ids, idf = np.arange(len(tokens), dtype=np.int32), idf_weights(frequency, captions, formula)
    table = pa.table([token_ids, pa.array(tokens), frequency, idf], schema=TOKENS)
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_idf_duckdb(
    layout: Layout,
    *,
    captions: int,
    tokens: int | None,
    formula: Formula,
    tokenizer: str,
    fingerprint: str,
    shards: Iterable[ShardPart],
) -> None:
    """idf.duckdb: tables tokens, corpus, shards, and the view labels over the Parquet files.

    The view names the files relative to the output folder, the only form that survives moving the folder: `preprocess
    sql` sets the search path, and the DuckDB shell must start inside the folder. DuckDB puts random identifiers into
    its files; their content is the same each time.

    `tokens`: token ids in all label files; None, of markers of earlier versions, counts them.
    """

    def write(partial: Path) -> None:
        partial.unlink(missing_ok=True)
        # The search path is a list split at commas, which the path may hold: a link in a temporary folder replaces it.
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
            con.execute("CREATE TABLE tokens AS SELECT * FROM read_parquet($1)", [str(idf.absolute())])
            con.execute("CREATE VIEW labels AS SELECT * FROM read_parquet('labels/*.parquet')")
            if (token_count := tokens) is None:
                query = "SELECT coalesce(sum(len(token_ids)), 0) FROM read_parquet($1)"
                [(token_count,)] = con.execute(query, [f"{library_path(everywhere)}/*.parquet"]).fetchall()
            con.execute(_CORPUS, [captions, formula, tokenizer, fingerprint, token_count])
            con.execute(_SHARDS)
            insert = "INSERT INTO shards VALUES ($1, $2, $3, MAP($4::VARCHAR[], $5::BIGINT[]))"
            for shard in shards:
                reasons = shard.quarantined
                counts = list(reasons.values())
                con.execute(insert, [shard.name, shard.rows, sum(counts), list(reasons), counts])

    write_whole(layout.idf_duckdb, write)


def _download_first(labels: Path, folder: Path) -> None:
    """Copy one label file of an object store into `folder`: all have the same schema."""
    first = next(iter(sorted(labels.glob("*.parquet"), key=str)))
    folder.mkdir()
    with local_copy(first) as file:
        shutil.copy(file, folder)


# -- preprocess idf


@dataclass(frozen=True)
class Summed:
    """What an IDF table was made of."""

    captions: int
    shards: int
    formula: Formula

    def __str__(self) -> str:
        return f"IDF ({self.formula}) of {count(self.captions, 'caption')} in {count(self.shards, 'shard')}"


def sum_idf(
    outs: list[Path],
    target: Path,
    *,
    shards: str | None = None,
    formula: Formula | None = None,
    recount: bool = False,
    memory: str = "1GiB",
) -> Summed:
    """Write one IDF table, as idf.parquet, of several output folders with the same labels to the Parquet file `target`.

    Args:
        shards: a pattern of shard names such as `0000[0-4]*`; None for all.
        formula: None for the one that they were built with.
        recount: count the label files from scratch instead of summing the shards' count files.
        memory: DuckDB's limit.

    Raises:
        UserError: an output folder is not finished, given twice, or has other labels than the first; no shard fits;
            counts are missing.
    """
    _check_target(target, outs)
    manifests = [read_manifest(out) for out in outs]
    names = _common_tokens(outs, manifests)
    formula = formula or _common_formula(outs, manifests)
    chosen = [
        (out, part)
        for out, manifest in zip(outs, manifests, strict=True)
        for part in manifest.shards
        if _fits(part, shards)
    ]
    if not chosen:
        known = [part.name for manifest in manifests for part in manifest.shards]
        raise UserError(
            f"no shard's name fits --shards {shards}",
            allowed=f"patterns of {count(len(known), 'name')} from {known[0]} to {known[-1]}",
        )
    files = [Layout(out).label_file(part.name) if recount else _count_file(out, part) for out, part in chosen]
    add_up = document_frequencies if recount else sum_counts
    captions = sum(part.rows for _, part in chosen)
    fix = f"run `preprocess verify` on {_listed(outs)}"
    try:
        with tempfile.TemporaryDirectory() as spill:
            frequency = add_up(files, len(names), memory, Path(spill))
    except (duckdb.Error, IndexError) as error:
        raise UserError(f"the shards' counts cannot be summed: {error}", fix=fix) from None
    if frequency.max(initial=0) > captions:
        raise UserError(f"the shards' counts hold a token {frequency.max()} times, in {captions} captions", fix=fix)
    write_idf_parquet(target, names, frequency, captions, formula)
    return Summed(captions, len(chosen), formula)


def _check_target(target: Path, outs: list[Path]) -> None:
    """Refuse, before any work, a file that cannot be written or that belongs to a build, and a folder given twice."""
    paths = [out if is_remote(out) else out.resolve() for out in outs]
    for path, out in zip(paths, outs, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{out} is given twice: its captions would count twice", fix="name every folder once")
        if not is_remote(path) and target.resolve().is_relative_to(path):
            raise UserError(f"--out {target} is in {out}, where only a build writes", fix="give a file elsewhere")
    if target.suffix != ".parquet" or target.is_dir():
        raise UserError(f"--out {target} is not the name of a Parquet file", allowed="a path that ends in .parquet")


def _fits(part: ShardPart, pattern: str | None) -> bool:
    return pattern is None or fnmatchcase(part.name, pattern)


def _common_tokens(outs: list[Path], manifests: list[Manifest]) -> list[str]:
    """The vocabulary, position = id, if it and the meaning of labels are the same in all output folders."""
    names, facts = _tokens(outs[0]), _label_facts(manifests[0])
    for out, manifest in zip(outs[1:], manifests[1:], strict=True):
        for key, value in _label_facts(manifest).items():
            if value != facts[key]:
                raise UserError(
                    f"{outs[0]} and {out} differ in {key}: {facts[key]} and {value}",
                    allowed="output folders with the same labels",
                    fix="build the labels of one of them again with the other's options",
                )
        if _tokens(out) != names:
            raise UserError(
                f"{outs[0]} and {out} have other classes: each chose its own word pairs (labels.ngrams)",
                fix="build them into one output folder, or both with labels.ngrams=1",
            )
    return names


def _label_facts(manifest: Manifest) -> dict[str, object]:
    options = manifest.options.get("labels", {})
    facts = {f"labels.{key}": options.get(key) for key in _SAME_OPTIONS}
    return {"their tokenizer's fingerprint": manifest.tokenizer.fingerprint, **facts}


def _tokens(out: Path) -> list[str]:
    path = Layout(out).idf_parquet
    read_idf(path)  # raises if the file is missing or damaged
    with local_copy(path) as file:
        return pq.read_table(file, columns=["token"])["token"].to_pylist()


def _common_formula(outs: list[Path], manifests: list[Manifest]) -> Formula:
    formulas = sorted({manifest.idf_formula for manifest in manifests})
    if len(formulas) > 1:
        raise UserError(
            f"{_listed(outs)} were built with different IDF formulas: {', '.join(formulas)}",
            fix="choose one with --formula",
        )
    return formulas[0]  # type: ignore[return-value]  # idf_weights refuses another


def _count_file(out: Path, part: ShardPart) -> Path:
    path = Layout(out).count_file(part.name)
    if not path.is_file():
        raise UserError(f"no counts of shard {part.name} at {path}", fix=f"run the build-labels command of {out} again")
    return path


def _listed(outs: list[Path]) -> str:
    return ", ".join(map(str, outs))
