"""Word pairs: the compiled, DuckDB-counted path against a naive one in plain Python; pair classes of rows; the file."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labels.manifest import LABELS
from labels.storage import UserError
from preprocess.ngrams import PAIRS, append_rows, choose_pairs, pair_labels, pair_names, read_pairs, write_pairs

V = 12
Rows = list[list[int]]
ROWS = st.lists(st.lists(st.integers(0, V - 1), max_size=9), max_size=30)
FLAGS = st.lists(st.booleans(), min_size=V, max_size=V)
ALL, NONE = [True] * V, [False] * V


def write_labels(path: Path, rows: Rows) -> Path:
    empty = [None] * len(rows)
    pq.write_table(
        pa.table([[""] * len(rows), empty, empty, empty, rows, [[]] * len(rows)], schema=LABELS), path, row_group_size=7
    )
    return path


def flags(values: Sequence[bool]) -> np.ndarray:
    return np.array(values, bool)


def chosen(
    folder: Path,
    files: Sequence[Rows],
    starts: Sequence[bool],
    ends: Sequence[bool],
    classes: int = 1000,
    least: int = 1,
) -> pa.Table:
    paths = [write_labels(folder / f"{number} [a]*.parquet", rows) for number, rows in enumerate(files)]
    return choose_pairs(paths, flags(starts), flags(ends), classes, least, "200MiB", folder / "spill")


def naive_words(row: list[int], starts: Sequence[bool], ends: Sequence[bool]) -> list[tuple[int, ...]]:
    """The row cut at its borders."""
    words: list[tuple[int, ...]] = []
    for at, token in enumerate(row):
        if at == 0 or ends[row[at - 1]] or starts[token]:
            words.append((token,))
        else:
            words[-1] += (token,)
    return words


def naive_pairs(row: list[int], starts: Sequence[bool], ends: Sequence[bool]) -> set[tuple[int, int]]:
    words = naive_words(row, starts, ends)
    return {(a[0], b[0]) for a, b in pairwise(words) if len(a) == len(b) == 1}


def naive_choice(
    rows: Rows, starts: Sequence[bool], ends: Sequence[bool], classes: int, least: int
) -> list[tuple[int, int, int, float]]:
    words = Counter(
        token for row in rows for token in {word[0] for word in naive_words(row, starts, ends) if len(word) == 1}
    )
    pairs = Counter(pair for row in rows for pair in naive_pairs(row, starts, ends))
    ranked = []
    for (a, b), count in pairs.items():
        lift = count * len(rows) / (words[a] * words[b])
        if count >= least and lift > 1:
            ranked.append((a, b, count, count * (math.log(lift) / math.log(len(rows) / count))))
    return sorted(ranked, key=lambda pair: (-pair[3], pair[:2]))[:classes]


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=3), FLAGS, FLAGS, st.integers(1, 20), st.integers(0, 3))
@example([[[1, 2], [1, 2], [3]]], ALL, NONE, 5, 1)
@example([[]], ALL, ALL, 5, 1)
@example([[list(range(V)) * 9, list(range(V))[::-1] * 9, [3]]], ALL, ALL, 50, 1)
def test_chosen_pairs_equal_a_naive_count(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[Rows],
    starts: list[bool],
    ends: list[bool],
    classes: int,
    least: int,
) -> None:
    table = chosen(tmp_path_factory.mktemp("pairs"), files, starts, ends, classes, least)
    expected = naive_choice([row for rows in files for row in rows], starts, ends, classes, least)
    assert table.schema.equals(PAIRS)
    # Scores to the last bit but one, in case the two logarithms differ; an order that differs only among equals to that
    # degree.
    assert [row["score"] for row in table.to_pylist()] == pytest.approx([score for *_, score in expected], rel=1e-12)
    near = {round(expected[-1][3], 9)} if expected else set()
    found = {
        (row["first"], row["second"], row["document_frequency"])
        for row in table.to_pylist()
        if round(row["score"], 9) not in near
    }
    assert found == {pair[:3] for pair in expected if round(pair[3], 9) not in near}
    again = [(-row["score"], row["first"], row["second"]) for row in table.to_pylist()]
    assert again == sorted(again)


def test_a_corpus_by_hand(tmp_path: Path) -> None:
    # "new york" in 2 of 8 captions, in one of them twice; "york new" in one; "the cat" in 2, as by chance; 5 6 is one
    # word.
    new, york, the, cat, five, six = 1, 2, 3, 4, 5, 6
    rows = [
        [new, york],
        [the, new, york, new, york],
        [the, cat],
        [the, cat, five, six],
        [the],
        [the],
        [five, six, cat],
        [five, six, cat],
    ]
    table = chosen(tmp_path, [rows], NONE, [token != five for token in range(V)])
    expected = [(new, york, 2, 2 * math.log(4) / math.log(4)), (york, new, 1, math.log(2) / math.log(8))]
    assert [(row["first"], row["second"], row["document_frequency"]) for row in table.to_pylist()] == [
        row[:3] for row in expected
    ]
    assert table["score"].to_pylist() == pytest.approx([row[3] for row in expected])


def test_pairs_of_all_captions_and_pairs_of_chance_are_skipped(tmp_path: Path) -> None:
    assert len(chosen(tmp_path, [[[1, 2]] * 5], ALL, ALL)) == 0
    assert len(chosen(tmp_path, [[[1, 2], [1, 3], [4, 2], [5]]], ALL, ALL, least=1)) == 2


def test_threads_and_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ends = [token % 3 > 0 for token in range(V)]
    rows = [(rng.integers(0, 4, rng.integers(0, 150)) + 4 * rng.integers(0, 3)).tolist() for _ in range(300)]
    whole = chosen(tmp_path, [rows], NONE, ends)
    expected = naive_choice(rows, NONE, ends, 1000, 1)
    assert len(expected) > 10 and max(len(naive_pairs(row, NONE, ends)) for row in rows) > 3
    assert list(zip(*(whole[name].to_pylist() for name in ("first", "second", "document_frequency")), strict=True)) == [
        pair[:3] for pair in expected
    ]
    connect = duckdb.connect
    for threads in (1, 3):
        monkeypatch.setattr(
            duckdb, "connect", lambda config, threads=threads: connect(config={**config, "threads": threads})
        )
        cut = chosen(tmp_path, [rows[:1], [], rows[1:200], rows[200:]], NONE, ends)
        assert cut.equals(whole)


@settings(max_examples=100, deadline=None)
@given(
    ROWS,
    FLAGS,
    FLAGS,
    st.lists(st.tuples(st.integers(0, V - 1), st.integers(0, V - 1)), unique=True),
    st.integers(0, 2),
)
@example([list(range(V)) * 9, list(range(V))[::-1] * 9], ALL, ALL, [(a, b) for a in range(V) for b in range(V)], 0)
def test_pair_labels_equal_a_naive_look_up(
    rows: Rows, starts: list[bool], ends: list[bool], known: list[tuple[int, int]], skipped: int
) -> None:
    table = pa.table([[a for a, _ in known], [b for _, b in known], [1] * len(known), [1.0] * len(known)], schema=PAIRS)
    ids = np.array([token for row in rows for token in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    offsets, rows = offsets[min(skipped, len(rows)) :], rows[skipped:]  # a slice of a longer array begins later
    found, found_offsets = pair_labels(ids, offsets, table, V, flags(starts), flags(ends))
    expected = [
        sorted(V + known.index(pair) for pair in naive_pairs(row, starts, ends) if pair in known) for row in rows
    ]
    assert found.dtype == np.int32 and found_offsets.dtype == np.int64
    assert [found[a:b].tolist() for a, b in pairwise(found_offsets)] == expected


@given(st.lists(st.tuples(st.lists(st.integers(0, 9)), st.lists(st.integers(10, 19)))))
def test_rows_are_appended(rows: list[tuple[list[int], list[int]]]) -> None:
    flat = [np.array([value for row in rows for value in row[side]], np.int32) for side in (0, 1)]
    offsets = [np.cumsum([0, *(len(row[side]) for row in rows)]).astype(np.int64) for side in (0, 1)]
    joined, begins = append_rows(flat[0], offsets[0], flat[1], offsets[1])
    assert joined.dtype == np.int32 and begins.dtype == np.int64
    assert [joined[a:b].tolist() for a, b in pairwise(begins)] == [first + second for first, second in rows]


def test_the_file(tmp_path: Path) -> None:
    table = chosen(tmp_path, [[[1, 2], [1, 2], [3, 4], [5]]], ALL, ALL)
    path = tmp_path / "pairs.parquet"
    write_pairs(path, table)
    first = path.read_bytes()
    assert read_pairs(path, V).equals(table)
    write_pairs(path, pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    assert path.read_bytes() == first
    assert pair_names(table, [f"t{token}</w>" for token in range(V)]) == ["t1</w> t2</w>", "t3</w> t4</w>"]
    with pytest.raises(UserError, match="token ids from 1 to 3, allowed: 0 to 2"):
        read_pairs(path, 3)


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda path: path.unlink(), "no word pairs at"),
        (lambda path: path.write_bytes(b"PAR1 but no more"), "is not readable as Parquet"),
        (lambda path: pq.write_table(pq.read_table(path).drop(["score"]), path), "has the columns"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, spoil: Callable[[Path], object], reported: str) -> None:
    path = tmp_path / "pairs.parquet"
    write_pairs(path, PAIRS.empty_table())
    spoil(path)
    with pytest.raises(UserError, match=reported) as caught:
        read_pairs(path, V)
    assert "fix: run `preprocess build-labels`" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"PAR1 but no more"), "cannot be counted for word pairs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)), "cannot be counted for word pairs"),
        (lambda path: write_labels(path, [[1, V]]), f"token ids from 1 to {V}, allowed: 0 to {V - 1}"),
        (lambda path: write_labels(path, [[-1, 2]]), "token ids from -1 to 2"),
        (lambda path: pq.write_table(pq.read_table(path).drop(["token_ids"]), path), "token_ids"),
        (
            lambda path: pq.write_table(pa.table({"token_ids": pa.array([[1, None]])}), path),
            "cannot be counted for word pairs",
        ),
    ],
)
def test_a_bad_label_file_is_an_error_without_a_traceback(
    tmp_path: Path, spoil: Callable[[Path], object], reported: str
) -> None:
    good, bad = write_labels(tmp_path / "a.parquet", [[1, 2]]), write_labels(tmp_path / "b.parquet", [[1, 2]])
    spoil(bad)
    with pytest.raises(UserError, match=reported) as caught:
        choose_pairs([good, bad], flags(ALL), flags(ALL), 5, 1, "200MiB", tmp_path / "spill")
    assert (
        str(bad) in str(caught.value)
        and "preprocess verify" in str(caught.value)
        and "Traceback" not in str(caught.value)
    )


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="duckdb_memory = 1KB is too little"):
        choose_pairs(
            [write_labels(tmp_path / "a.parquet", [[1, 2]])], flags(ALL), flags(ALL), 5, 1, "1KB", tmp_path / "spill"
        )
