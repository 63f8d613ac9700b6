"""Word-pair classes into one shard's label file: between the first pass and the counting, where `labels.ngrams` is 2.

labels/<shard>.parquet (token_ids) + pairs.parquet -> label_ids with pair classes -> the same file, its counts and its marker
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels.files import local_copy, write_json
from labels.layout import Layout
from labels.settings import Labels
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.label_job import label_table, write_labels
from preprocess.ngrams import append_rows, pair_labels, read_pairs
from preprocess.plan import read_marker

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class PairsTask:
    """`pairs`: fingerprint of the chosen pairs, written into the marker."""

    shard: str
    out: Path
    settings: Labels
    pairs: str


def add_pairs(task: PairsTask) -> dict[str, Any]:
    """Rewrite one label file; return its marker less the list of faults. The pairs of an earlier choice are replaced."""
    layout = Layout(task.out)
    path, marker_path = layout.label_file(task.shard), layout.label_marker(task.shard)
    marker = read_marker(marker_path)
    assert marker is not None  # the first pass has just written or checked it
    marker_path.unlink()  # killed from here on, the shard is labelled anew
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
        marker.update(write_labels(layout, task.shard, batches(source)), pairs=task.pairs)
    write_json(marker_path, marker)
    return {key: value for key, value in marker.items() if key != "faults"}


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and offsets int64 [N + 1] from 0 on."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def _tokens_only(ids: np.ndarray, offsets: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows without the pair classes of an earlier choice."""
    keep = ids < vocabulary
    return ids[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)
