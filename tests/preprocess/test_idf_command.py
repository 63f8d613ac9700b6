"""`preprocess idf`: sums over shards and label datasets equal a naive count; what must not be summed is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels import Formula
from labels.idf import idf_weights
from labels.manifest import COUNTS, LABELS, TOKENS, Manifest, ShardPart, TokenizerPart, write_manifest
from labels.storage import Layout, UserError, sha256_file
from preprocess.counts import ShardCounts, sum_idf, write_idf_parquet
from shard_factory import Built, preprocess

Rows = list[list[int]]
TOKENS_OF_ALL = ["a</w>", "cat</w>", "犬", "quote\"'", "never</w>", "<end>"]
FIRST: dict[str, Rows] = {"00000": [[0, 1], [0], []], "00001": [[1, 2, 3]], "00010": []}
SECOND: dict[str, Rows] = {"00000": [[0, 2], [2]], "it's [a] shard*": [[0, 3]] * 4}


def make_out(
    out: Path,
    shards: dict[str, Rows],
    *,
    tokens: list[str] | None = None,
    formula: Formula = "smooth",
    fingerprint: str = "f1",
    **options: Any,
) -> Path:
    """A finished label dataset without betons: labels, counts, IDF table, manifest."""
    layout, names, parts = Layout(out), tokens or TOKENS_OF_ALL, []
    for name, rows in shards.items():
        empty = [None] * len(rows)
        layout.labels.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table([[""] * len(rows), empty, empty, empty, rows, rows], schema=LABELS), layout.label_file(name)
        )
        counts = ShardCounts()
        counts.add(np.array([label for row in rows for label in row], np.int32))
        counts.write(layout.count_file(name))
        sha256 = sha256_file(layout.label_file(name))
        parts.append(
            ShardPart(
                name=name,
                source=name,
                source_bytes=1,
                first_index=0,
                rows=len(rows),
                labels_sha256=sha256,
                keys_sha256="",
                quarantined={},
            )
        )
    frequency, captions = naive(list(shards.values()), len(names))
    write_idf_parquet(layout.idf_parquet, names, frequency, captions, formula)
    write_manifest(
        layout,
        Manifest(
            fingerprint="rows",
            options={"labels": {"context": 75, **options}},
            label_limit=75,
            tokenizer=TokenizerPart(
                name="clip", fingerprint=fingerprint, path="fast", vocabulary=len(names), excluded=[5]
            ),
            captions=captions,
            idf_formula=formula,
            idf_sha256="",
            quarantine_sha256="",
            shards=parts,
            betons=[],
        ),
    )
    return out


def naive(shards: list[Rows], vocabulary: int = len(TOKENS_OF_ALL)) -> tuple[np.ndarray, int]:
    counts = Counter(token for rows in shards for row in rows for token in row)
    return np.array([counts[token] for token in range(vocabulary)]), sum(map(len, shards))


@pytest.fixture
def outs(tmp_path: Path) -> list[Path]:
    return [make_out(tmp_path / "one", FIRST), make_out(tmp_path / "two's [x]", SECOND)]


@pytest.mark.parametrize(
    ("which", "pattern", "formula", "summed"),
    [
        ([0], None, None, [*FIRST.values()]),
        ([0, 1], None, None, [*FIRST.values(), *SECOND.values()]),
        ([1, 0], None, "paper", [*FIRST.values(), *SECOND.values()]),
        ([0], "0000?", "none", [FIRST["00000"], FIRST["00001"]]),
        ([0, 1], "00000", "smooth", [FIRST["00000"], SECOND["00000"]]),
        ([1], "it's*", None, [SECOND["it's [a] shard*"]]),
        ([0], "00010", None, [[]]),
    ],
)
def test_sums_equal_a_naive_count(
    outs: list[Path], tmp_path: Path, which: list[int], pattern: str | None, formula: Formula | None, summed: list[Rows]
) -> None:
    target = tmp_path / "new" / "sum.parquet"
    reported = sum_idf([outs[number] for number in which], target, shards=pattern, formula=formula)
    frequency, captions = naive(summed)
    table = pq.read_table(target)
    assert table.schema.equals(TOKENS, check_metadata=True)
    assert table["token"].to_pylist() == TOKENS_OF_ALL and table["token_id"].to_pylist() == list(range(6))
    assert table["document_frequency"].to_pylist() == frequency.tolist()
    assert table["idf"].to_pylist() == idf_weights(frequency, captions, formula or "smooth").tolist()
    assert (reported.captions, reported.shards, reported.formula) == (captions, len(summed), formula or "smooth")


def test_the_sum_of_all_shards_is_the_outs_own_table(outs: list[Path], tmp_path: Path) -> None:
    reported = sum_idf(outs[:1], tmp_path / "sum.parquet")
    assert (tmp_path / "sum.parquet").read_bytes() == (outs[0] / "idf.parquet").read_bytes()
    assert str(reported) == "IDF (smooth) of 4 captions in 3 shards"


def test_the_formula_is_the_outs_own_or_has_to_be_chosen(outs: list[Path], tmp_path: Path) -> None:
    paper = make_out(tmp_path / "paper", FIRST, formula="paper")
    assert sum_idf([paper], tmp_path / "sum.parquet").formula == "paper"
    with pytest.raises(UserError, match=r"different IDF formulas: paper, smooth\n.*--formula"):
        sum_idf([outs[0], paper], tmp_path / "sum.parquet")
    assert sum_idf([outs[0], paper], tmp_path / "sum.parquet", formula="none").formula == "none"


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"fingerprint": "f2"}, "differ in their tokenizer's fingerprint: f1 and f2"),
        ({"context": 10}, r"differ in labels\.context: 75 and 10"),
        ({"stop_words": "remove"}, r"differ in labels\.stop_words: None and remove"),
        ({"ngrams": 2}, r"differ in labels\.ngrams: None and 2"),
        ({"tokens": [*TOKENS_OF_ALL, "a</w> cat</w>"]}, "other classes: each chose its own word pairs"),
    ],
)
def test_other_labels_are_not_summed(outs: list[Path], tmp_path: Path, options: dict[str, Any], reported: str) -> None:
    other = make_out(tmp_path / "other", FIRST, **options)
    with pytest.raises(UserError, match=reported) as caught:
        sum_idf([outs[0], other], tmp_path / "sum.parquet")
    assert str(outs[0]) in str(caught.value) and str(other) in str(caught.value) and "fix: " in str(caught.value)
    assert not (tmp_path / "sum.parquet").exists()


def test_what_cannot_be_meant_is_refused(outs: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "sum.parquet"
    refused: list[tuple[list[Path], Path, str | None, str]] = [
        ([outs[0], outs[1] / ".." / outs[0].name], target, None, "is given twice"),
        (outs, outs[1] / "idf.parquet", None, "where only a build writes"),
        (outs, tmp_path / "sum.csv", None, r"a path that ends in \.parquet"),
        (outs, target, "1*", r"no shard's name fits --shards 1\*\n.*5 names from 00000 to it's"),
        ([tmp_path / "nowhere"], target, None, "does not exist"),
    ]
    for given, path, pattern, reported in refused:
        with pytest.raises(UserError, match=reported):
            sum_idf(given, path, shards=pattern)
    assert not target.exists()


def counts_of(rows: list[tuple[int, int]]) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table([[a for a, _ in rows], [b for _, b in rows]], schema=COUNTS), path)


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda path: path.unlink(), "no counts of shard 00001 at"),
        (lambda path: path.write_bytes(b"PAR1 but no more"), "counts cannot be summed"),
        (counts_of([(6, 1)]), "counts cannot be summed"),
        (counts_of([(0, 1), (2, 40)]), "hold a token 40 times, in 4 captions"),
    ],
)
def test_damaged_counts_are_an_error(
    outs: list[Path], tmp_path: Path, spoil: Callable[[Path], object], reported: str
) -> None:
    spoil(Layout(outs[0]).count_file("00001"))
    with pytest.raises(UserError, match=reported) as caught:
        sum_idf(outs[:1], tmp_path / "sum.parquet")
    assert "fix: run " in str(caught.value) and str(outs[0]) in str(caught.value)


def test_the_command(outs: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "sum.parquet"
    said = preprocess("idf", *outs, "--shards", "*0", "--formula", "paper", "--out", target)
    assert (said.code, said.out) == (0, f"{target}: IDF (paper) of 5 captions in 3 shards\n"), said.err
    frequency, captions = naive([FIRST["00000"], FIRST["00010"], SECOND["00000"]])
    assert pq.read_table(target)["idf"].to_pylist() == idf_weights(frequency, captions, "paper").tolist()
    assert preprocess("idf", outs[0], "--shards", "00000", "--out", target).out.endswith(
        "IDF (smooth) of 3 captions in 1 shard\n"
    )
    said = preprocess("idf", outs[0], "--shards", "x*", "--out", target)
    assert said.code == 2 and "error: no shard's name fits --shards x*" in said.err


def test_a_builds_own_table_is_the_sum_of_its_shards(finished: Built, tmp_path: Path) -> None:
    assert sum_idf([finished.out], tmp_path / "sum.parquet").captions == 22
    assert (tmp_path / "sum.parquet").read_bytes() == (finished.out / "idf.parquet").read_bytes()
