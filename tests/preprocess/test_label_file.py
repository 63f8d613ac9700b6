"""Label files: what is written is what pyarrow and DuckDB read, with the schema, hashes and counts of its rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labels.manifest import COUNTS, LABELS
from labels.storage import Layout, sha256_file
from preprocess.shard import label_table, write_labels

_ids = st.one_of(st.integers(0, 3), st.integers(0, 49_407), st.integers(0, (1 << 31) - 1))
_keys = st.one_of(
    st.text(max_size=8).filter(lambda word: not any(0xD800 <= ord(char) < 0xE000 for char in word)), st.just("7")
)
_sides = st.none() | st.integers(1, (1 << 31) - 1)
_labels = st.sets(_ids, max_size=40).map(sorted)
_rows = st.tuples(_keys, st.none() | _keys, _sides, _sides, st.lists(_ids, max_size=40), _labels)


def table(rows: list[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(LABELS)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, LABELS, strict=True)], schema=LABELS
    )


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return np.array([number for row in lists.to_pylist() for number in row], np.int32), offsets


def write(out: Path, batches: list[pa.Table]) -> tuple[Path, dict[str, Any]]:
    tables = (
        label_table(batch.select(LABELS.names[:4]), *flat(batch["token_ids"]), *flat(batch["label_ids"]))
        for batch in batches
    )
    return Layout(out).label_file("s"), write_labels(Layout(out), "s", tables)


@settings(deadline=None, max_examples=150)
@given(batches=st.lists(st.lists(_rows, max_size=30), max_size=4), uids=st.booleans())
def test_every_reader_gets_the_rows_that_were_written(
    batches: list[list[tuple]], uids: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if uids:  # as of a table of uids alone, which are the keys too
        batches = [[(key, key, *rest) for key, _, *rest in rows] for rows in batches]
    tables = [table(rows) for rows in batches]
    out, expected = tmp_path_factory.getbasetemp() / "out", pa.concat_tables([LABELS.empty_table(), *tables])
    path, written = write(out, tables)
    read = pq.read_table(path)
    assert read.schema.equals(LABELS, check_metadata=True)
    assert read.equals(expected)
    rows = expected.to_pylist()
    assert duckdb.read_parquet(str(path)).fetchall() == [tuple(row.values()) for row in rows]
    frequency = Counter(label for row in rows for label in row["label_ids"])
    counts = pq.read_table(Layout(out).count_file("s"))
    assert counts.schema.equals(COUNTS) and list(zip(*counts.to_pydict().values(), strict=True)) == sorted(
        frequency.items()
    )
    assert written == {
        "rows": len(rows),
        "tokens": sum(len(row["token_ids"]) for row in rows),
        "unlabelled": sum(not row["label_ids"] for row in rows),
        "sha256": sha256_file(path),
        "count_bytes": Layout(out).count_file("s").stat().st_size,
        "keys_sha256": hashlib.sha256("".join(f"{row['key']}\n" for row in rows).encode()).hexdigest(),
    }
    assert write(out, tables) == (path, written), "the same rows give the same bytes"


def test_columns_that_are_slices_or_in_parts(tmp_path: Path) -> None:
    rows = table([(f"key{row}", None if row % 3 else f"uid{row}", row + 1, None, [row], [row]) for row in range(50)])
    parts = pa.concat_tables([rows.slice(5, 10), rows.slice(20, 7)])
    path, written = write(tmp_path, [parts])
    assert pq.read_table(path).equals(parts.combine_chunks())
    keys = "".join(f"key{row}\n" for row in [*range(5, 15), *range(20, 27)])
    assert (written["rows"], written["keys_sha256"]) == (17, hashlib.sha256(keys.encode()).hexdigest())
    writing = write_labels(Layout(tmp_path / "again"), "s", iter([parts]))
    assert writing["keys_sha256"] == written["keys_sha256"]
    assert pq.read_table(Layout(tmp_path / "again").label_file("s")).equals(parts.combine_chunks())


def test_encodings_that_every_reader_has(tmp_path: Path) -> None:
    """Packed ids without compression, keys as lengths and bytes, a row group for each batch, no dictionary."""
    rows = table([(f"{row:05d}", "b", 1, 2, [1, 2], [1]) for row in range(5000)])
    path, _ = write(tmp_path, [rows, rows.slice(0, 7)])
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [5000, 7]
    columns = [metadata.row_group(0).column(column) for column in range(len(LABELS))]
    assert [(column.compression, set(column.encodings) - {"RLE"}) for column in columns] == [
        *[("ZSTD", {"DELTA_LENGTH_BYTE_ARRAY"})] * 2,
        *[("ZSTD", {"PLAIN"})] * 2,
        *[("UNCOMPRESSED", {"DELTA_BINARY_PACKED"})] * 2,
    ]
    assert not any(column.has_dictionary_page or column.is_stats_set for column in columns)


@pytest.mark.parametrize(
    ("offsets", "dtype"),
    [
        ([0, 1], "i4"),
        ([0, 1, 2, 3], "i4"),
        ([1, 1, 2], "i4"),
        ([0, 1, 1], "i4"),
        ([0, 3, 2], "i4"),
        ([0, 1, 2], "i8"),
    ],
)
def test_ids_that_do_not_fit_their_offsets_are_refused(offsets: list[int], dtype: str) -> None:
    rows = table([("a", None, None, None, [1], [1]), ("b", None, None, None, [2], [2])]).select(LABELS.names[:4])
    good, bad = (np.array([1, 2], np.int32), np.array([0, 1, 2])), (np.array([1, 2], dtype), np.array(offsets))
    assert label_table(rows, *good, *good)["key"].to_pylist() == ["a", "b"]
    for lists in ((*good, *bad), (*bad, *good)):
        with pytest.raises(ValueError, match="do not fit"):
            label_table(rows, *lists)


def test_a_null_key_is_refused(tmp_path: Path) -> None:
    rows = pa.table([["a", None], *[pa.nulls(2)] * 3], names=LABELS.names[:4])
    lists = np.array([1, 2], np.int32), np.array([0, 1, 2])
    with pytest.raises(ValueError, match="'key' is declared non-nullable but contains nulls"):
        write_labels(Layout(tmp_path), "s", [label_table(rows, *lists, *lists)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_shard_whose_reading_fails_leaves_no_file(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.Table]:
        yield table([("a", "b", 1, 2, [1], [1])])
        raise ValueError("the next batch cannot be read")

    with pytest.raises(ValueError, match="the next batch"):
        write_labels(Layout(tmp_path), "s", batches())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
