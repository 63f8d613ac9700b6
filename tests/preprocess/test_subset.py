"""`--subset`: three ways to name samples give one sorted array; rows are chosen from it exactly, repeats included."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labels import subset as subset_module
from labels.storage import UserError
from labels.subset import UIDS, count_in, open_subset, parse_uids, resolve_subset
from preprocess.readers.base import ROWS, Fault, RowBatch
from preprocess.shard import select_rows

UID = [f"{number:032x}" for number in (0, 1, 2**64 - 1, 2**64, 2**64 + 1, 2**127, 2**128 - 2, 2**128 - 1)]
SCORES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def as_array(uids: Sequence[str]) -> np.ndarray:
    """As DataComp's own scripts write it: structured, sorted."""
    return np.sort(np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], np.dtype("u8,u8")))


def pool(folder: Path) -> Path:
    """shards/ and metadata/ as DataComp has them, the metadata in two files; the folder."""
    (folder / "shards").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for name, part in (("a", slice(0, 5)), ("b", slice(5, 8))):
        pq.write_table(
            pa.table({"uid": UID[part][::-1], "clip_l14_similarity_score": SCORES[part][::-1]}),
            folder / f"metadata/{name}.parquet",
        )
    return folder


def resolve(
    text: str, folder: Path, *, metadata: str | None = None, sources: Sequence[str] | None = None
) -> tuple[list[str], str]:
    """The uids of the array, in its order, and the fingerprint."""
    target = folder / "out" / "subset.npy"
    fingerprint = resolve_subset(text, metadata, sources or [str(folder)], target, "100MiB", folder / "spill")
    array = open_subset(target)
    assert array.dtype == UIDS and (array.base is None or isinstance(array, np.memmap))
    assert [path.name for path in target.parent.iterdir()] == ["subset.npy"] and not (folder / "spill").exists()
    return [f"{high:016x}{low:016x}" for high, low in array.tolist()], fingerprint


def refused(text: str, folder: Path, **options: str) -> str:
    with pytest.raises(UserError) as error:
        resolve(text, folder, **options)  # type: ignore[arg-type]
    assert not (folder / "out" / "subset.npy").exists(), "nothing half done is left"
    return str(error.value)


def test_all_three_forms_give_the_same_array(tmp_path: Path) -> None:
    folder = pool(tmp_path)
    wanted = UID[3:]
    np.save(folder / "sorted.npy", as_array(wanted))
    np.save(folder / "mixed.npy", as_array(wanted)[[3, 0, 4, 1, 2]].astype([("high", ">u8"), ("low", ">u8")]))
    pq.write_table(
        pa.table({"uid": [uid.upper() for uid in reversed(wanted)], "other": range(5)}), folder / "chosen.parquet"
    )
    texts = [
        "clip_l14_similarity_score > 0.35",
        f"{folder}/sorted.npy",
        f"{folder}/mixed.npy",
        f"file://{folder}/chosen.parquet",
    ]
    results = [resolve(text, folder) for text in texts]
    assert results == [(wanted, results[0][1])] * 4
    assert resolve("clip_l14_similarity_score > 0.45", folder)[1] != results[0][1]


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("clip_l14_similarity_score BETWEEN 0.2 AND 0.4 OR uid LIKE '8%'", 4),
        ("clip_l14_similarity_score > (SELECT 0.5) -- the better half", 3),
        ("uid IN ('" + UID[0] + "', 'x')", 1),
        ("length(uid) = 32", 8),
    ],
)
def test_a_condition_may_be_any_expression(tmp_path: Path, condition: str, count: int) -> None:
    assert len(resolve(condition, pool(tmp_path))[0]) == count


@pytest.mark.parametrize("source", ["{}", "{}/shards", "{}/shards/", "{}/shards/*.tar", "{}/shards/0.tar"])
def test_the_metadata_is_found_in_or_next_to_the_source(tmp_path: Path, source: str) -> None:
    folder = pool(tmp_path)
    (folder / "shards" / "0.tar").touch()
    assert len(resolve("true", folder, sources=[source.format(folder)] * 2)[0]) == 8


def test_the_metadata_may_be_named(tmp_path: Path) -> None:
    folder = pool(tmp_path)
    for metadata, count in (
        (f"{folder}/metadata", 8),
        (f"{folder}/metadata/b.parquet", 3),
        (f"{folder}/meta*/[a]*.parquet", 5),
    ):
        assert len(resolve("true", folder, metadata=metadata, sources=["/nowhere"])[0]) == count
    assert "build.metadata: /nowhere does not exist or holds no .parquet" in refused(
        "true", folder / "x", metadata="/nowhere"
    )


def test_repeated_uids_stay_repeated(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", as_array([UID[1], UID[1], UID[1], UID[5]]))
    pq.write_table(pa.table({"uid": [UID[5], UID[1], UID[1], UID[1]]}), tmp_path / "a.parquet")
    assert resolve(f"{tmp_path}/a.npy", tmp_path) == resolve(f"{tmp_path}/a.parquet", tmp_path)
    assert resolve(f"{tmp_path}/a.npy", tmp_path)[0] == [UID[1]] * 3 + [UID[5]]


def test_more_than_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, sorted or not, across the borders of the parts."""
    monkeypatch.setattr(subset_module, "ROWS_AT_ONCE", 1000)
    uids = np.random.default_rng(0).integers(0, 2**64, (10_500, 2), np.uint64)
    uids[5000:5010, 0] = 7
    array = np.sort(uids.view(UIDS).reshape(-1))
    np.save(tmp_path / "sorted.npy", array)
    swapped = array.copy()
    swapped[[999, 1000]] = swapped[[1000, 999]]  # at a border
    np.save(tmp_path / "swapped.npy", swapped)
    for name in ("sorted", "swapped"):
        resolve(f"{tmp_path}/{name}.npy", tmp_path)
        assert (open_subset(tmp_path / "out" / "subset.npy") == array).all()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("clip_l14_similarity_score >", "syntax error"),
        ("nosuch > 1", 'Referenced column "nosuch" not found'),
        ("uid", "gives VARCHAR, not true or false"),
        ("true; DROP TABLE x", "more than one statement"),
        ("true LIMIT 3", "it holds a modifier"),
        ("true) OR (true", "syntax error"),
        ("SELECT 1", "syntax error"),
        ("true, false", "single expression"),
        ("", "without selection list"),
        ("count(*) > 1", "aggregates"),
        ("uid IN (SELECT content FROM read_text('/etc/hostname'))", "file system operations are disabled"),
        ("uid IN (SELECT uid FROM UID)", "UID does not exist"),
        ("clip_l14_similarity_score > 0.9", "selects no sample"),
    ],
)
def test_a_condition_that_is_none_is_refused(tmp_path: Path, condition: str, message: str) -> None:
    message = refused(condition, pool(tmp_path))
    assert message in message and repr(condition) in message


def test_the_message_names_the_columns(tmp_path: Path) -> None:
    assert "columns: uid, clip_l14_similarity_score" in refused("nosuch > 1", pool(tmp_path))


def _numbers(path: Path) -> None:
    np.save(path, np.arange(4))


def _objects(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


def _none(path: Path) -> None:
    np.save(path, as_array([]))


def _words(path: Path) -> None:
    path.write_bytes(b"these are words")


def _cut(path: Path) -> None:
    np.save(path, as_array(UID))
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_numbers, "is no .npy of uids: it holds int64"),
        (_objects, "is no .npy of uids"),
        (_words, "is no .npy of uids"),
        (_cut, "is no .npy of uids"),
        (_none, "selects no sample"),
    ],
)
def test_a_file_that_is_no_list_of_uids_is_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "a.npy")
    assert message in refused(f"{tmp_path}/a.npy", tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "no.npy does not exist" in refused(f"{tmp_path}/no.npy", tmp_path)
    assert "--subset: " in (message := refused(f"{tmp_path}/no.parquet", tmp_path)) and "does not exist" in message
    message = refused("score > 1", tmp_path)
    assert "there are no metadata/*.parquet in or next to" in message and "--set build.metadata=FOLDER" in message


def test_a_parquet_without_good_uids_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for uids, message in (
        ([UID[0], None], "gives the uid None"),
        ([UID[0], "0x12"], "gives the uid '0x12'"),
        (["g" * 32], "allowed: uids of 32 hex"),
    ):
        pq.write_table(pa.table({"uid": pa.array(uids, pa.string())}), path)
        assert message in refused(str(path), tmp_path)
    pq.write_table(pa.table({"id": UID}), path)
    assert "has no column uid" in refused(str(path), tmp_path)
    path.write_bytes(b"PAR1 and no more")
    assert "cannot be read as Parquet" in refused(str(path), tmp_path)


@pytest.mark.parametrize(("text", "memory"), [("{}/a.npy", "1MiB"), ("{}/a.npy", "8MiB"), ("true", "1MiB")])
def test_too_little_memory_is_reported(tmp_path: Path, text: str, memory: str) -> None:
    uids = np.random.default_rng(0).integers(0, 2**64, (1_500_000, 2), np.uint64)
    np.save(tmp_path / "a.npy", uids.view(UIDS).reshape(-1))
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table({"uid": [f"{row:032x}" for row in range(50_000)]}), tmp_path / "metadata" / "a.parquet")
    with pytest.raises(UserError, match=f"build.duckdb_memory = {memory} is too little for the subset: Out of Memory"):
        resolve_subset(
            text.format(tmp_path), None, [str(tmp_path)], tmp_path / "out" / "subset.npy", memory, tmp_path / "spill"
        )


def test_metadata_and_arrays_by_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    folder = pool(tmp_path)
    np.save(folder / "a.npy", as_array(UID[:2]))
    memory.put(f"{folder}/metadata", "/test-subset/metadata", recursive=True)
    memory.put_file(f"{folder}/a.npy", "/test-subset/a.npy")
    try:
        assert (
            resolve("clip_l14_similarity_score > 0.75", folder, sources=["memory://test-subset/shards"])[0] == UID[7:]
        )
        assert resolve("memory://test-subset/a.npy", folder)[0] == UID[:2]
    finally:
        memory.rm("/test-subset", recursive=True)


def batch(uids: Sequence[str | None]) -> RowBatch:
    keys = [f"k{row}" for row in range(len(uids))]
    empty = [None] * len(keys)
    table = pa.table(
        [
            pa.array(keys),
            pa.array(uids, pa.string()),
            pa.array(empty, pa.int32()),
            pa.array(empty, pa.int32()),
            pa.array(keys),
        ],
        schema=ROWS,
    )
    return RowBatch(table, [Fault("f", "no caption", "")])


_SOME_UID = st.one_of(st.sampled_from(UID), st.text("0123456789abcdefABCDEF", min_size=32, max_size=32))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_SOME_UID, min_size=1, max_size=40),
    st.lists(st.one_of(_SOME_UID, st.none(), st.text("01afgé", max_size=33)), max_size=40),
    st.integers(0, 5),
)
def test_select_as_the_reference(chosen: list[str], rows: list[str | None], skipped: int) -> None:
    rows += chosen[:10]
    counts = Counter(uid.lower() for uid in chosen)
    wanted = [
        f"k{row}" for row, uid in enumerate(rows) for _ in range(counts[uid.lower()] if uid else 0) if row >= skipped
    ]
    whole = batch(rows)
    part = RowBatch(whole.table.slice(skipped), whole.faults)  # offsets into the buffers are not 0
    selected, skipped_rows = select_rows(part, as_array(chosen))
    assert (
        selected.table["key"].to_pylist() == wanted
        and selected.table.schema.equals(ROWS)
        and selected.faults == whole.faults
    )
    assert skipped_rows == len(part.table) - len(set(wanted))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30),
)
def test_counting_among_equal_halves(array: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    counts = count_in(np.array(wanted, UIDS), np.sort(np.array(array, UIDS)))
    assert counts.tolist() == [array.count(pair) for pair in wanted]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(st.none(), st.text("0123456789abcdefABCDEF", min_size=31, max_size=33), st.text(max_size=34)),
        max_size=20,
    )
)
def test_uids_as_numbers_as_python_reads_them(strings: list[str | None]) -> None:
    digits = set("0123456789abcdefABCDEF")
    good = [row for row, text in enumerate(strings) if text is not None and len(text) == 32 and set(text) <= digits]
    uids, rows = parse_uids(pa.array(strings, pa.string()))
    assert rows.tolist() == good
    assert [(high << 64) + low for high, low in uids.tolist()] == [int(strings[row] or "", 16) for row in good]


def test_a_subset_without_any_row(tmp_path: Path) -> None:
    selected, skipped_rows = select_rows(batch([]), as_array(UID))
    assert len(selected.table) == skipped_rows == 0
    assert select_rows(batch([None, UID[0]]), as_array(UID[1:]))[1] == 2
