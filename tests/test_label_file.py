"""Label files: the Parquet that is written here, read by pyarrow and DuckDB."""

import hashlib
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from guarded_array import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from labels.files import sha256_file
from labels.schema import LABELS
from preprocess import label_file
from preprocess.label_file import LabelFile
from preprocess.label_pages import put_lists, put_numbers, room_for
from preprocess.thrift import boolean, i32, i64, many, struct, text

Lists = list[list[int]]

_ids = st.one_of(st.integers(0, 3), st.integers(0, 49_407), st.integers(0, (1 << 31) - 1))
_keys = st.one_of(st.text(max_size=8).filter(lambda word: not any(0xD800 <= ord(char) < 0xE000 for char in word)), st.just("7"))
_sides = st.none() | st.integers(1, (1 << 31) - 1)
_rows = st.tuples(_keys, st.none() | _keys, _sides, _sides, st.lists(_ids, max_size=40), st.lists(_ids, max_size=40))


def table(rows: list[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(LABELS)
    return pa.Table.from_arrays([pa.array(column, field.type) for column, field in zip(columns, LABELS, strict=True)], schema=LABELS)


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return np.array([number for row in lists.to_pylist() for number in row], np.int32), offsets


def write(path: Path, batches: list[pa.Table]) -> LabelFile:
    with LabelFile(path) as file:
        for batch in batches:
            file.write(batch.select(LABELS.names[:4]), *flat(batch["token_ids"]), *flat(batch["label_ids"]))
    return file


@settings(deadline=None, max_examples=150)
@given(batches=st.lists(st.lists(_rows, max_size=30), max_size=4), most=st.sampled_from([1, 20, 1 << 24]), uids=st.booleans())
def test_every_reader_gets_the_rows_that_were_written(
    batches: list[list[tuple]], most: int, uids: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if uids:  # as of a table of uids alone, which are the keys too
        batches = [[(key, key, *rest) for key, _, *rest in rows] for rows in batches]
    tables = [table(rows) for rows in batches]
    path, expected = tmp_path_factory.getbasetemp() / "labels.parquet", pa.concat_tables([LABELS.empty_table(), *tables])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_file, "_MOST_IDS", most)
        file = write(path, tables)
    read = pq.read_table(path)
    assert read.schema.equals(LABELS, check_metadata=True)
    assert read.equals(expected)
    assert duckdb.sql(f"SELECT * FROM '{path}'").fetchall() == [tuple(row.values()) for row in expected.to_pylist()]
    assert (file.rows, file.tokens) == (len(expected), sum(map(len, expected["token_ids"].to_pylist())))
    assert file.sha256 == sha256_file(path)
    assert file.keys_sha256 == hashlib.sha256("".join(f"{key}\n" for key in expected["key"].to_pylist()).encode()).hexdigest()
    if most == 1 and len(expected) > 1:
        for group in range(pq.ParquetFile(path).num_row_groups):
            lists = pq.ParquetFile(path).read_row_group(group)
            assert len(lists) == 1 or max(len(flat(lists[name])[0]) for name in ("token_ids", "label_ids")) <= most


def test_columns_that_are_slices_or_in_parts(tmp_path: Path) -> None:
    rows = table([(f"key{row}", None if row % 3 else f"uid{row}", row + 1, None, [row], [row]) for row in range(50)])
    parts = pa.concat_tables([rows.slice(5, 10), rows.slice(20, 7)])
    write(tmp_path / "file", [parts])
    assert pq.read_table(tmp_path / "file").equals(parts.combine_chunks())


def test_parquets_own_words_for_the_columns(tmp_path: Path) -> None:
    """What a reader without Arrow's schema goes by: the same as pyarrow's writer tells it."""
    path = tmp_path / "file"
    rows = table([("a", "b", 1, 2, [1], [1]), ("a", "b", 1, 2, [], [2])])
    write(path, [rows])
    pq.write_table(rows, tmp_path / "theirs")
    assert pq.ParquetFile(path).schema.equals(pq.ParquetFile(tmp_path / "theirs").schema)
    ours, theirs = (pq.ParquetFile(file).metadata for file in (path, tmp_path / "theirs"))
    assert ours.row_group(0).num_rows == theirs.row_group(0).num_rows == 2
    for column in range(len(LABELS)):
        mine, other = (file.row_group(0).column(column) for file in (ours, theirs))
        assert (mine.path_in_schema, mine.physical_type, mine.num_values) == (other.path_in_schema, other.physical_type, other.num_values)
    places = [ours.row_group(0).column(column) for column in range(len(LABELS))]
    ends = [4, *(column.data_page_offset + column.total_compressed_size for column in places)]
    assert [column.data_page_offset for column in places] == ends[:-1]
    assert ours.row_group(0).total_byte_size == sum(column.total_uncompressed_size for column in places)


@pytest.mark.parametrize(
    ("offsets", "dtype"), [([0, 1], "i4"), ([0, 1, 2, 3], "i4"), ([1, 1, 2], "i4"), ([0, 1, 1], "i4"), ([0, 3, 2], "i4"), ([0, 1, 2], "i8")]
)
def test_ids_that_do_not_fit_their_offsets_are_refused(offsets: list[int], dtype: str, tmp_path: Path) -> None:
    rows = table([("a", None, None, None, [1], [1]), ("b", None, None, None, [2], [2])]).select(LABELS.names[:4])
    good, bad = (np.array([1, 2], np.int32), np.array([0, 1, 2])), (np.array([1, 2], dtype), np.array(offsets))
    with LabelFile(tmp_path / "file") as file:
        file.write(rows, *good, *good)
        for lists in ((*good, *bad), (*bad, *good)):
            with pytest.raises(ValueError, match="offsets from"):
                file.write(rows, *lists)
    assert pq.read_table(tmp_path / "file")["key"].to_pylist() == ["a", "b"]


def test_a_null_key_is_refused(tmp_path: Path) -> None:
    rows = pa.table([["a", None], *[pa.nulls(2)] * 3], names=LABELS.names[:4])
    lists = np.array([1, 2], np.int32), np.array([0, 1, 2])
    with LabelFile(tmp_path / "file") as file, pytest.raises(ValueError, match="1 of 2 keys are null"):
        file.write(rows, *lists, *lists)


def test_a_file_that_was_given_up_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    rows = table([("a", "b", 1, 2, [1], [1])])
    with pytest.raises(AttributeError):
        write(path, [rows, None])  # type: ignore[list-item]  # as if the next batch could not be read
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table(path)


def decoded(data: bytes) -> list[int]:
    """DELTA_BINARY_PACKED read number by number, as parquet-format's Encodings.md tells."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def signed() -> int:
        value = varint()
        return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)

    block, minis, count = varint(), varint(), varint()
    assert block % 128 == 0 and block % minis == 0 and (block // minis) % 32 == 0
    numbers = [signed()]
    while len(numbers) < count:
        least = signed()
        widths, at = data[at : at + minis], at + minis
        for width in widths:
            if len(numbers) >= count:
                continue
            each = block // minis
            packed, at = int.from_bytes(data[at : at + each * width // 8], "little"), at + each * width // 8
            for _ in range(min(each, count - len(numbers))):
                numbers.append(numbers[-1] + least + (packed & ((1 << width) - 1)))
                packed >>= width
    assert at == len(data)
    return numbers[:count]


@pytest.mark.parametrize("bits", range(33))
@pytest.mark.parametrize("count", [0, 1, 2, 33, 128, 129, 130, 700])
def test_numbers_of_every_width(bits: int, count: int) -> None:
    draw = np.random.default_rng(bits)
    # Steps of up to `bits` bits between the least and the largest.
    numbers = draw.integers(0, 1 << max(0, bits - 1), count).astype(np.int32)
    if bits and count > 2:
        numbers[1], numbers[2] = 0, min((1 << max(0, bits - 1)), (1 << 31) - 1)
    for at_end in (True, False):
        out = guarded(np.zeros(room_for(0, count), np.uint8), at_end=at_end)
        end = put_numbers(guarded(numbers, at_end=at_end), out)
        assert decoded(out[:end].tobytes()) == numbers.tolist()


@settings(deadline=None)
@given(lists=st.lists(st.lists(_ids, max_size=300), min_size=1, max_size=40))
def test_lists_stay_within_their_room(lists: Lists) -> None:
    ids = np.array([number for row in lists for number in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    for at_end in (True, False):
        out = guarded(np.zeros(room_for(len(lists), len(ids)), np.uint8), at_end=at_end)
        empty, repeated, defined, end = put_lists(guarded(ids, at_end=at_end), guarded(offsets, at_end=at_end), out)
        assert empty == sum(not row for row in lists)
        assert repeated < defined < end
        assert decoded(out[defined:end].tobytes()) == ids.tolist()


@pytest.mark.parametrize(("length", "empty", "most"), [(12, 0, 4), (12, 1, 20), (12, 400, 2500), (1, 900, 1256)])
def test_definition_levels_take_few_bytes_where_few_lists_are_empty(length: int, empty: int, most: int) -> None:
    counts = np.full(10_000, length)
    counts[np.linspace(5, 9_990, empty).astype(int)] = 0
    repeated, defined = levels(counts)
    assert defined - repeated <= most


@pytest.mark.parametrize(("length", "most"), [(12, 15_010), (75, 50_000), (256, 60_000)])
def test_repetition_levels_are_runs_or_bits_whichever_is_shorter(length: int, most: int) -> None:
    repeated, _ = levels(np.full(10_000, length))
    assert repeated <= most


def levels(counts: np.ndarray) -> tuple[int, int]:
    """Where the two levels of lists of so many ids end."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = np.zeros(offsets[-1], np.int32)
    return put_lists(ids, offsets, np.empty(room_for(len(counts), len(ids)), np.uint8))[1:3]


def test_thrifts_compact_protocol() -> None:
    """Bytes worked out by hand from thrift-compact-protocol.md."""
    assert struct({1: i64(-1), 3: boolean(True), 4: boolean(False)}) == (12, bytes([0x16, 0x01, 0x21, 0x12, 0x00]))
    assert i64(300) == (6, bytes([0xD8, 0x04]))
    assert many([text("a"), text("")]) == (9, bytes([0x28, 0x01, 0x61, 0x00]))
    assert many([i64(0)] * 20) == (9, bytes([0xF6, 20]) + bytes(20))
    assert many([]) == (9, bytes([0x0C]))
    assert i32(-(1 << 31)) == (5, bytes([0xFF, 0xFF, 0xFF, 0xFF, 0x0F]))
    with pytest.raises(OverflowError, match="2147483648 does not fit"):
        i32(1 << 31)
