"""The IDF: formulas by hand, counts against a naive Counter."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labels import Formula
from labels.idf import idf_weights, read_idf
from labels.manifest import LABELS, TOKENS
from labels.storage import UserError
from labels.tokenizers.kinds.clip import ClipTokenizer
from preprocess.counts import ShardCounts, document_frequencies, sum_counts, write_idf_parquet
from shard_factory import CAPTIONS, build, refused, rows, sample, write_tar

SPECIALS = {49406, 49407}


@pytest.mark.parametrize(
    ("formula", "df", "expected"),
    [
        ("smooth", 0, math.log(1001)),
        ("smooth", 9, math.log(100.1)),
        ("smooth", 1000, 0.0),
        ("paper", 0, math.log(1000)),
        ("paper", 9, math.log(100)),
        ("paper", 999, 0.0),
        ("paper", 1000, 0.0),
        ("none", 0, 1.0),
        ("none", 1000, 1.0),
    ],
)
def test_formulas_on_1000_captions(formula: Formula, df: int, expected: float) -> None:
    found = idf_weights(np.array([df]), 1000, formula)
    assert found.dtype == np.float64 and found[0] == pytest.approx(expected, rel=1e-14, abs=0)


def test_an_unknown_formula_is_named() -> None:
    with pytest.raises(UserError, match="unknown IDF formula 'tf'"):
        idf_weights(np.zeros(1), 1, "tf")  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sets(st.integers(0, 30)), max_size=8), min_size=1, max_size=3))
def test_counts_equal_a_naive_counter(tmp_path_factory: pytest.TempPathFactory, files: list[list[set[int]]]) -> None:
    folder = tmp_path_factory.mktemp("counts")
    paths = []
    for number, captions in enumerate(files):
        labels = [sorted(caption) for caption in captions]
        none = [None] * len(labels)
        table = pa.table([[""] * len(labels), none, none, none, labels, labels], schema=LABELS)
        pq.write_table(table, folder / f"{number} [a]*.parquet")
        paths.append(folder / f"{number} [a]*.parquet")
    naive = Counter(token for file in files for caption in file for token in caption)
    expected = [naive[token] for token in range(31)]
    assert document_frequencies(paths, 31, "100MiB", folder / "spill").tolist() == expected
    counts = [path.with_suffix(".counts") for path in paths]
    for path, count in zip(paths, counts, strict=True):
        counted = ShardCounts()
        for batch in pq.ParquetFile(path).iter_batches(3, columns=["label_ids"]):
            counted.add(batch["label_ids"].flatten().to_numpy())
        assert counted.write(count) == count.stat().st_size
    assert sum_counts(counts, 31, "100MiB", folder / "spill").tolist() == expected
    assert sum_counts([], 31, "100MiB", folder / "spill").tolist() == [0] * 31


@pytest.mark.parametrize("largest", [0, 65_535, 65_536, (1 << 31) - 1])
def test_a_shards_counts_of_ids_of_any_size(largest: int, tmp_path: Path) -> None:
    parts = [np.array(part, np.int32) for part in ([0, largest], [], [largest, 0, largest])]
    counted = ShardCounts()
    for part in parts:
        counted.add(part)
    counted.write(tmp_path / "counts")
    naive = Counter(np.concatenate(parts).tolist())
    rows = pq.read_table(tmp_path / "counts").to_pylist()
    assert [(row["token_id"], row["document_frequency"]) for row in rows] == sorted(naive.items())


@pytest.mark.parametrize("formula", ["smooth", "paper", "none"])
def test_the_built_table_equals_a_naive_count_over_the_captions(tmp_path: Path, formula: Formula) -> None:
    captions = [f"{caption} everywhere <end_of_text>" for caption in CAPTIONS] * 3
    write_tar(tmp_path / "a.tar", [m for n, caption in enumerate(captions[:7]) for m in sample(f"{n:04d}", caption)])
    write_tar(tmp_path / "b.tar", [m for n, caption in enumerate(captions[7:]) for m in sample(f"{n:04d}", caption)])
    build(tmp_path, tmp_path / "out", "--no-beton", "--set", f"labels.idf={formula}")
    tokenizer = ClipTokenizer()
    naive = Counter(token for caption in captions for token in set(tokenizer.encode([caption], 75)[0].tolist()))
    table = pq.read_table(tmp_path / "out" / "idf.parquet")
    assert table.schema.equals(TOKENS, check_metadata=True)
    assert table["token_id"].to_pylist() == list(range(49408)) and table["token"].to_pylist() == tokenizer.tokens
    frequency = table["document_frequency"].to_numpy()
    assert {token: count for token, count in enumerate(frequency.tolist()) if count} == naive
    everywhere = tokenizer.tokens.index("everywhere</w>")
    expected = {
        "smooth": lambda df: math.log(19 / (df + 1)),
        "paper": lambda df: max(0.0, math.log(18 / (df + 1))),
        "none": lambda df: 1.0,
    }
    assert np.allclose(table["idf"].to_numpy(), [expected[formula](df) for df in frequency], rtol=1e-14)
    assert frequency[everywhere] == 18 and table["idf"][everywhere].as_py() == (1.0 if formula == "none" else 0.0)
    assert read_idf(tmp_path / "out" / "idf.parquet").dtype == np.float32
    assert not any(SPECIALS & {*row["label_ids"], *row["token_ids"]} for row in rows(tmp_path / "out"))


def test_the_table_is_closed_once_it_was_read(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(50_000)]
    frequency = np.arange(len(tokens))
    write_idf_parquet(tmp_path / "idf.parquet", tokens, frequency, 60_000, "smooth")
    before = os.listdir("/proc/self/fd")
    for _ in range(400):  # by threads it was closed a moment later, now and then
        assert len(read_idf(tmp_path / "idf.parquet")) == len(tokens)
        assert os.listdir("/proc/self/fd") == before


def test_the_duckdb_file_describes_the_corpus(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [*sample("0", "a cat"), *sample("1", "a cat cat"), *sample("2", b"\xff"), *sample("3", " ")]
    )
    write_tar(tmp_path / "b.tar", [*sample("0", "a dog")])
    build(tmp_path, tmp_path / "out", "--no-beton", "--set", "build.max_bad_fraction=0.5")
    with duckdb.connect(str(tmp_path / "out" / "idf.duckdb"), read_only=True) as con:
        corpus = con.execute("SELECT captions, labels, tokens, vocabulary, formula, tokenizer FROM corpus").fetchall()
        shards = con.execute("SELECT shard, rows, quarantined, reasons FROM shards").fetchall()
        tokens = con.sql("SELECT token_id, token, document_frequency, idf FROM tokens").to_arrow_table()
    assert corpus == [(3, 6, 7, 49408, "smooth", "clip")]
    assert shards == [("a", 2, 2, {"caption is not UTF-8": 1, "empty caption": 1}), ("b", 1, 0, {})]
    assert tokens.to_pylist() == pq.read_table(tmp_path / "out" / "idf.parquet").to_pylist()


def test_markers_without_numbers_of_tokens_are_completed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("0", "a cat"), *sample("1", "a cat cat")])
    out = tmp_path / "out"
    build(tmp_path, out, "--no-beton")
    marker = out / "done" / "labels" / "a.json"
    reported = json.loads(marker.read_text())
    assert reported.pop("tokens") == 5
    marker.write_text(json.dumps(reported))
    (out / "idf.duckdb").unlink()
    build(tmp_path, out, "--no-beton")
    assert "tokens" not in json.loads(marker.read_text()), "the shard has not been labelled again"
    with duckdb.connect(str(out / "idf.duckdb"), read_only=True) as con:
        assert con.execute("SELECT tokens FROM corpus").fetchall() == [(5,)]


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0"))
    found = refused(tmp_path, tmp_path / "out", "--set", "build.duckdb_memory=1KB")
    assert "build.duckdb_memory = 1KB is too little" in found and "raise it" in found


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda path: path.unlink(), "no IDF table at"),
        (lambda path: path.write_bytes(b"PAR1 but no more"), "is not readable as Parquet"),
        (lambda path: pq.write_table(pq.read_table(path).drop(["idf"]), path), "has the columns"),
        (lambda path: pq.write_table(pq.read_table(path).slice(1), path), "token_id is not 0, 1, 2"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, spoil: Callable[[Path], object], reported: str) -> None:
    path = tmp_path / "idf.parquet"
    pq.write_table(pa.table([[0, 1], ["a", "b"], [1, 2], [0.5, 0.1]], schema=TOKENS), path)
    assert read_idf(path).tolist() == pytest.approx([0.5, 0.1])
    spoil(path)
    with pytest.raises(UserError, match=reported) as caught:
        read_idf(path)
    assert "preprocess build-labels" in str(caught.value)
