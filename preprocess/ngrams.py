"""N-gram labels (`labels.ngrams` = 2): the most informative pairs of neighbouring words as classes after the tokens.

    choose   label files (token_ids) -> pairs of whole words (compiled) -> counted, ranked by DuckDB -> pairs.parquet
    add      token_ids + pairs.parquet -> pair classes of each row -> label file, count file and marker written again

These are two stages of a build, between the labels and the IDF table: pairs need the counts of all shards. Pair classes
have ids above all token ids, which keeps label rows sorted.

A border is before a row's first token, after its last, and between neighbours a, b where ends[a] or starts[b]. A token
with a border on both sides is a whole word. Shapes: V token classes, P pair classes (ids V .. V + P - 1, in rank
order), N captions, T ids in all; starts, ends: bool [V]; ids: int32 [T]; offsets: int64 [N + 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.manifest import LABELS
from labels.native import njit
from labels.settings import Labels
from labels.storage import Layout, UserError, fingerprint, local_copy, sha256_file, write_whole
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.shard import label_table, write_labels
from preprocess.stage import (
    BuildContext,
    CorpusMarker,
    CorpusTask,
    LabelMarker,
    Stage,
    read_faults,
    read_marker,
    run_stage,
    spill_folder,
    write_marker,
)

# Up to this many pairs of a caption are sorted by insertion, which makes no copy.
_INSERTED = 64

# -- compiled: ids must be in 0 .. V - 1, which these functions do not check.


@njit(nogil=True, inline="always")
def _whole(ids: np.ndarray, begin: Any, end: Any, position: Any, starts: np.ndarray, ends: np.ndarray) -> Any:
    """Is ids[position] a whole word of the row ids[begin:end]?"""
    before = position == begin or ends[ids[position - 1]] or starts[ids[position]]
    behind = position == end - 1 or ends[ids[position]] or starts[ids[position + 1]]
    return before and behind


@njit(nogil=True, cache=True)
def count_words(
    ids: np.ndarray, offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray, frequency: np.ndarray
) -> None:
    """Add to `frequency`, int64 [V], the number of rows in which each token is a whole word."""
    seen = np.full(len(frequency), -1, np.int64)
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        for position in range(begin, end):
            token = ids[position]
            if seen[token] != row and _whole(ids, begin, end, position, starts, ends):
                seen[token] = row
                frequency[token] += 1


@njit(nogil=True, cache=True)
def _sort_distinct(values: np.ndarray, begin: Any, end: Any) -> Any:
    """Sort values[begin:end] in place, each value once; return the new end."""
    if end - begin > _INSERTED:
        values[begin:end] = np.sort(values[begin:end])
    else:
        for i in range(begin + 1, end):
            value, hole = values[i], i
            while hole > begin and values[hole - 1] > value:
                values[hole] = values[hole - 1]
                hole -= 1
            values[hole] = value
    stop = begin
    for i in range(begin, end):
        if stop == begin or values[stop - 1] != values[i]:
            values[stop] = values[i]
            stop += 1
    return stop


@njit(nogil=True, cache=True)
def caption_pairs(ids: np.ndarray, offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The pairs of all rows as int64 first << 32 | second, each once a row."""
    pairs = np.empty(offsets[-1] - offsets[0], np.int64)
    stop = 0
    for row in range(len(offsets) - 1):
        begin, end, first = offsets[row], offsets[row + 1], stop
        for position in range(begin, end - 1):
            if _whole(ids, begin, end, position, starts, ends) and _whole(ids, begin, end, position + 1, starts, ends):
                pairs[stop] = (np.int64(ids[position]) << 32) | np.int64(ids[position + 1])
                stop += 1
        stop = _sort_distinct(pairs, first, stop)
    return pairs[:stop]


@njit(nogil=True, cache=True)
def _find(values: np.ndarray, begin: Any, end: Any, wanted: Any) -> Any:
    """Index of `wanted` in the ascending values[begin:end], or -1."""
    stop = end
    while begin < stop:
        middle = (begin + stop) // 2
        if values[middle] < wanted:
            begin = middle + 1
        else:
            stop = middle
    return begin if begin < end and values[begin] == wanted else -1


@njit(nogil=True, cache=True)
def known_pairs(
    ids: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    begins: np.ndarray,
    seconds: np.ndarray,
    classes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The classes of the known pairs of every row, distinct and ascending: int32 [T'], and offsets int64 [N + 1].

    Token a begins the pairs begins[a] .. begins[a + 1], with `begins` int64 [V + 1]; `seconds`, int32 [P], are their
    second tokens, ascending for each first token, and `classes`, int32 [P], their classes.
    """
    labels = np.empty(offsets[-1] - offsets[0], np.int32)
    rows = np.zeros(len(offsets), np.int64)
    stop = 0
    for row in range(len(offsets) - 1):
        begin, end, first = offsets[row], offsets[row + 1], stop
        for position in range(begin, end - 1):
            pair = _find(seconds, begins[ids[position]], begins[ids[position] + 1], ids[position + 1])
            if pair < 0 or not _whole(ids, begin, end, position, starts, ends):
                continue
            if _whole(ids, begin, end, position + 1, starts, ends):
                labels[stop] = classes[pair]
                stop += 1
        stop = _sort_distinct(labels, first, stop)
        rows[row + 1] = stop
    return labels[:stop].copy(), rows


PAIRS = pa.schema(
    [
        pa.field("first", pa.int32(), nullable=False),
        pa.field("second", pa.int32(), nullable=False),
        pa.field("document_frequency", pa.int64(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ],
    metadata=LABELS.metadata,
)
"""One row for each pair class, in rank order: the pair of row r is class V + r."""

_STREAM = pa.schema([("pair", pa.int64())])
_ROWS_AT_ONCE = 65_536
_VERIFY = "run `preprocess verify` on this output folder"

# Counted before it is joined: the words' own counts are whole only when all pairs have been read.
_COUNT = "CREATE TEMP TABLE counted AS SELECT pair, count(*) AS df FROM stream GROUP BY pair HAVING count(*) >= $least"
_RANK = """
WITH scored AS (
    SELECT (pair >> 32)::INTEGER AS first, (pair & 4294967295)::INTEGER AS second, counted.df,
           (counted.df::DOUBLE * $captions::DOUBLE) / (a.df::DOUBLE * b.df::DOUBLE) AS lift,
           $captions::DOUBLE / counted.df::DOUBLE AS rarity
    FROM counted JOIN words a ON a.id = pair >> 32 JOIN words b ON b.id = pair & 4294967295
)
SELECT first, second, df AS document_frequency, df::DOUBLE * (ln(lift) / ln(rarity)) AS score
FROM scored WHERE lift > 1 ORDER BY score DESC, first, second LIMIT $classes
"""


def run_pair_stages(
    build: BuildContext, labelled: list[LabelMarker], fresh: frozenset[str], *, keep: bool
) -> list[LabelMarker]:
    """Choose the word pairs of all shards and put their classes into every label file; return the new label markers.

    `labelled`: markers of all shards; `fresh`: as for `run_stage`; `keep`: the chosen pairs also serve shards that were
    added later.
    """
    layout, labels = build.layout, build.settings.labels
    # What decides the token ids; the label files change when the pair classes are put in.
    rows = [[marker.shard, marker.source, marker.options, marker.keys_sha256] for marker in labelled]
    of = {"rows": fingerprint(rows), "classes": labels.ngram_classes, "min_count": labels.ngram_min_count}
    shards = [marker.shard for marker in labelled]

    def choose(task: CorpusTask) -> CorpusMarker:
        path, memory = layout.markers / "pairs.json", build.settings.build.duckdb_memory
        path.unlink(missing_ok=True)
        with spill_folder(layout) as spill:
            files = [layout.label_file(shard) for shard in task.shards]
            limits = labels.ngram_classes, labels.ngram_min_count
            pairs = choose_pairs(files, *build.tokenizer.whole_words, *limits, memory, spill)
        write_pairs(layout.pairs, pairs)
        marker = CorpusMarker(of=dict(task.of), sha256=sha256_file(layout.pairs))
        write_marker(path, marker)
        return marker

    choosing = Stage(None, choose, CorpusMarker, layout.markers, [layout.out])
    [chosen] = run_stage(build, choosing, [CorpusTask("pairs", of, shards, (layout.pairs.name,), keep)], fresh=fresh)
    adding = Stage("word pairs", add_pairs, LabelMarker, layout.markers / "labels", [])
    return run_stage(
        build, adding, [PairsTask(shard, layout.out, labels, chosen.sha256) for shard in shards], fresh=fresh
    )


def class_names(build: BuildContext) -> list[str]:
    """Names of all label classes, position = id: the tokens, and after them the word pairs."""
    tokens = build.tokenizer.tokens
    if build.settings.labels.ngrams == 1:
        return tokens
    return [*tokens, *pair_names(read_pairs(build.layout.pairs, len(tokens)), tokens)]


def choose_pairs(
    label_files: Sequence[Path],
    starts_word: np.ndarray,
    ends_word: np.ndarray,
    classes: int,
    min_count: int,
    memory: str,
    spill: Path,
) -> pa.Table:
    """The most informative pairs of neighbouring whole words of the corpus.

    With N captions, n(ab) of them holding the pair at least once and n(a), n(b) holding its words as whole words,
    p = n / N and pmi = log(p(ab) / (p(a) p(b))), pairs are ranked by their count times normalised PMI,

        score = n(ab) * pmi / -log p(ab),

    ties by (first, second). Pairs that come no more often than chance (pmi <= 0) are no classes. The result does not
    depend on the number of threads, or on how the rows are cut into files.

    `classes`: the most pairs; `min_count`: the least n(ab); `memory`: DuckDB's limit, e.g. `1GiB`; `spill`: a folder
    for what does not fit. Returns the schema `PAIRS`, in rank order.

    Raises:
        UserError: `memory` is too little even with spilling; a label file is damaged or holds ids beyond V.
    """
    corpus = _Corpus(label_files, starts_word, ends_word)
    config = {"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": False}
    try:
        with duckdb.connect(config=config) as con:
            con.register("stream", pa.RecordBatchReader.from_batches(_STREAM, corpus.pairs()))
            con.execute(_COUNT, {"least": max(min_count, 1)})
            con.register("words", pa.table({"id": np.arange(len(corpus.words)), "df": corpus.words}))
            return con.sql(_RANK, params={"captions": corpus.captions, "classes": classes}).to_arrow_table().cast(PAIRS)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"build.duckdb_memory = {memory} is too little to count pairs in: {error}", fix="raise it, e.g. to 1GiB"
        ) from None
    except duckdb.Error:
        if corpus.error is None:
            raise
        raise corpus.error from None


class _Corpus:
    """One reading of the label files: streams their pairs, and counts captions and whole words (int64 [V]) on the way.

    `error`: why the stream ended early; DuckDB would raise it as a traceback.
    """

    def __init__(self, files: Sequence[Path], starts_word: np.ndarray, ends_word: np.ndarray) -> None:
        self._files, self._starts, self._ends = files, starts_word, ends_word
        self.captions = 0
        self.words = np.zeros(len(ends_word), np.int64)
        self.error: UserError | None = None

    def pairs(self) -> Iterator[pa.RecordBatch]:
        """Pairs as first << 32 | second, each once per caption."""
        for file in self._files:
            try:
                with local_copy(file) as local:
                    for batch in pq.ParquetFile(local, pre_buffer=False).iter_batches(
                        _ROWS_AT_ONCE, columns=["token_ids"]
                    ):
                        yield self._count(batch["token_ids"])
            except UserError as error:
                self.error = error
                raise
            except (OSError, ValueError, KeyError) as error:
                self.error = UserError(f"{file} cannot be counted for word pairs: {error}", fix=_VERIFY)
                raise self.error from None

    def _count(self, rows: pa.ListArray) -> pa.RecordBatch:
        offsets = rows.offsets.to_numpy().astype(np.int64)
        ids = rows.values.to_numpy()
        _check_ids(ids[offsets[0] : offsets[-1]], len(self.words))
        count_words(ids, offsets, self._starts, self._ends, self.words)
        self.captions += len(rows)
        return pa.record_batch([pa.array(caption_pairs(ids, offsets, self._starts, self._ends))], schema=_STREAM)


def pair_labels(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    pairs: pa.Table,
    vocabulary: int,
    starts_word: np.ndarray,
    ends_word: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The pair classes of every row, distinct and ascending: ids int32 [T'] >= `vocabulary`, offsets int64 [N + 1].

    `token_ids`: in the captions' order; `pairs`: of `choose_pairs`.
    """
    first, second = pairs["first"].to_numpy(), pairs["second"].to_numpy()
    order = np.lexsort((second, first))
    begins = np.searchsorted(first[order], np.arange(vocabulary + 1))
    classes = (order + vocabulary).astype(np.int32)
    _check_ids(token_ids[offsets[0] : offsets[-1]], vocabulary)
    return known_pairs(token_ids, offsets.astype(np.int64), starts_word, ends_word, begins, second[order], classes)


def append_rows(
    ids: np.ndarray, offsets: np.ndarray, more: np.ndarray, more_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, `more` after `ids`: flat ids [T], [T'] with offsets [N + 1] each to ids int32 [T + T'], offsets int64
    [N + 1].
    """
    begins = offsets + more_offsets
    joined = np.empty(begins[-1], np.int32)
    joined[np.arange(len(ids)) + np.repeat(more_offsets[:-1], np.diff(offsets))] = ids
    joined[np.arange(len(more)) + np.repeat(offsets[1:], np.diff(more_offsets))] = more
    return joined, begins.astype(np.int64)


def pair_names(pairs: pa.Table, tokens: Sequence[str]) -> list[str]:
    """Names of the pair classes: the two tokens, joined by a space."""
    return [
        f"{tokens[a]} {tokens[b]}" for a, b in zip(pairs["first"].to_pylist(), pairs["second"].to_pylist(), strict=True)
    ]


def write_pairs(path: Path, pairs: pa.Table) -> None:
    """Put pairs.parquet in place in one step; equal tables give equal bytes."""
    write_whole(path, lambda partial: pq.write_table(pairs.cast(PAIRS).combine_chunks(), partial, compression="zstd"))


def read_pairs(path: Path, vocabulary: int) -> pa.Table:
    """pairs.parquet as `choose_pairs` gave it.

    Raises:
        UserError: the file is missing, unreadable, no such table, or of another vocabulary than V.
    """
    fix = "run `preprocess build-labels` for this output folder again"
    if not path.is_file():
        raise UserError(f"no word pairs at {path}", fix=fix)
    try:
        with local_copy(path) as local:
            table = pq.read_table(local)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as Parquet: {error}", fix=fix) from None
    if not table.schema.equals(PAIRS):
        raise UserError(
            f"{path} has the columns {table.schema.names}",
            allowed=f"{PAIRS.names}, of their types and never null",
            fix=fix,
        )
    for name in ("first", "second"):
        try:
            _check_ids(table[name].to_numpy(), vocabulary)
        except ValueError as error:
            raise UserError(f"{path}: {error}", fix=fix) from None
    return table


def _check_ids(ids: np.ndarray, vocabulary: int) -> None:
    """Compiled code checks no bounds."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()}, allowed: 0 to {vocabulary - 1}")


@dataclass(frozen=True)
class PairsTask:
    """`pairs`: SHA-256 of pairs.parquet, written into the marker."""

    shard: str
    out: Path
    settings: Labels
    pairs: str
    file_count: int = 1

    @property
    def name(self) -> str:
        return self.shard

    @property
    def shards(self) -> tuple[str, ...]:
        return (self.shard,)

    def is_done(self, marker: LabelMarker, sizes: Mapping[str, int]) -> bool:
        return marker.pairs == self.pairs


def add_pairs(task: PairsTask) -> LabelMarker:
    """Write one label file again, with pair classes in place of those of an earlier choice; return its marker."""
    layout = Layout(task.out)
    path, marker_path = layout.label_file(task.shard), layout.label_marker(task.shard)
    marker, faults = read_marker(marker_path, LabelMarker), read_faults(marker_path)
    assert marker is not None  # the label stage has just written or checked it
    marker_path.unlink()  # killed from here on, the shard is labelled again
    tokenizer = make_tokenizer(task.settings)
    vocabulary = len(tokenizer.tokens)
    pairs = read_pairs(layout.pairs, vocabulary)

    def batches(source: Path) -> Iterator[pa.Table]:
        for batch in pq.ParquetFile(source, pre_buffer=False).iter_batches(_ROWS_AT_ONCE):
            ids, offsets = _flat(batch["token_ids"])
            singles = _tokens_only(*_flat(batch["label_ids"]), vocabulary)
            both = append_rows(*singles, *pair_labels(ids, offsets, pairs, vocabulary, *tokenizer.whole_words))
            yield label_table(pa.Table.from_batches([batch]), ids, offsets, *both)

    with local_copy(path) as source:
        written = write_labels(layout, task.shard, batches(source))
    marker = marker.model_copy(update={**written, "pairs": task.pairs})
    write_marker(marker_path, marker, faults)
    return marker


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and offsets int64 [N + 1] from 0 on."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def _tokens_only(ids: np.ndarray, offsets: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows without the pair classes of an earlier choice."""
    keep = ids < vocabulary
    return ids[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)
