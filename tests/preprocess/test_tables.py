"""Tables as shards: rows and faults against a plain reference in Python, images, and the ways to spoil a table."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labels.storage import UserError
from preprocess.readers import table as tablefile
from preprocess.readers.base import ROWS, Fault, parse_caption_key
from preprocess.readers.images import table_images, without_images
from preprocess.readers.shards import Shard, find_shards
from preprocess.readers.table import read_table_rows
from shard_factory import jpeg

Read = tuple[list[dict[str, Any]], list[tuple[str, str]]]


def shard(path: Path | str) -> Shard:
    return find_shards([str(path)]).shards[0]


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Shard:
    pq.write_table(pa.table(columns), folder / "t.parquet", **options)
    return shard(folder / "t.parquet")


def text_file(folder: Path, content: str | bytes, name: str = "t.csv") -> Shard:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return shard(folder / name)


def faults_of(table: Shard, *keys: str, batch_rows: int = 1000) -> list[Fault]:
    return [
        fault
        for batch in read_table_rows(table, parse_caption_key(keys or ("auto",)), batch_rows)
        for fault in batch.faults
    ]


def read(table: Shard, *keys: str, batch_rows: int = 1000) -> Read:
    """All rows, and key and reason of all faults."""
    rows, faults = [], []
    for batch in read_table_rows(table, parse_caption_key(keys or ("auto",)), batch_rows):
        assert batch.table.schema.equals(ROWS) and len(batch.table) <= batch_rows
        batch.table.validate(full=True)
        assert not any(batch.table[name].null_count for name in ("key", "caption"))
        rows += batch.table.to_pylist()
        faults += [(fault.key, fault.reason) for fault in batch.faults]
    return rows, faults


def captions(table: Shard, *keys: str) -> list[str]:
    return [row["caption"] for row in read(table, *keys)[0]]


def refused(table: Shard, *keys: str) -> str:
    with pytest.raises(UserError) as error:
        read(table, *keys)
    return str(error.value)


def reference(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Read:
    """The same, row by row; the caption is the first of `columns` that is not None."""
    kept, faults, seen = [], [], set()
    for number, row in enumerate(rows):
        if str(row.get("status")).startswith("failed_to_"):
            continue
        key = next((str(row[name]) for name in ("key", "uid") if row.get(name) not in (None, "")), f"{number:012d}")
        found = [row[name] for name in columns if row.get(name) is not None]
        value = (
            "\n".join(text for text in found[0] if text is not None)
            if found and isinstance(found[0], list)
            else found[0]
            if found
            else None
        )
        if key in seen:
            faults.append((key, "repeated key"))
        elif value is None:
            faults.append((key, "no caption"))
        elif not value.strip():
            faults.append((key, "empty caption"))
        else:
            width, height = _size(row)
            kept.append({"key": key, "uid": row.get("uid") or None, "width": width, "height": height, "caption": value})
        seen.add(key)
    return kept, faults


def _size(row: dict[str, Any]) -> tuple[int | None, int | None]:
    for prefix in ("", "original_"):
        sides = [row.get(prefix + side) for side in ("width", "height")]
        if all(side is not None and math.isfinite(side) and side == int(side) and 0 < side < 2**31 for side in sides):
            return int(sides[0]), int(sides[1])  # type: ignore[arg-type]
    return None, None


_TEXT = st.one_of(
    st.none(), st.sampled_from(["", " \n", "\x1f\x1c", "\u3000", "\x85x", "a cat", "é", "\u00a0"]), st.text(max_size=8)
)
_KEY = st.one_of(st.none(), st.sampled_from(["", "a", "b", "000000000002", "ключ"]))
_SIDE = st.one_of(st.none(), st.sampled_from([0, -1, 1, 640, 2**31 - 1, 2**31, 2**62]))
_SIDES = dict.fromkeys(("width", "height", "original_width", "original_height"), _SIDE)
_ROW = st.fixed_dictionaries({"key": _KEY, "uid": _KEY, "caption": _TEXT, "text": _TEXT, **_SIDES})
_TYPES = {
    "key": pa.string(),
    "uid": pa.large_string(),
    "caption": pa.string(),
    "text": pa.string_view(),
    "status": pa.string(),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(_ROW, max_size=30), st.integers(1, 9), st.integers(1, 7), st.sampled_from([(), ("key",), ("key", "uid")])
)
def test_any_table_reads_as_the_reference(
    tmp_path: Path, rows: list[dict[str, Any]], batch_rows: int, group: int, without: tuple[str, ...]
) -> None:
    rows = [{name: value for name, value in row.items() if name not in without} for row in rows]
    names = [name for name in (*_TYPES, *_SIDES) if name in (rows[0] if rows else {"caption"})]
    columns = {name: pa.array([row[name] for row in rows], _TYPES.get(name, pa.int64())) for name in names}
    table = parquet(tmp_path, columns, row_group_size=group)
    assert read(table, batch_rows=batch_rows) == reference(rows, ["caption", "text"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["success", "failed_to_download", "failed_to_resize", None]),
            st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3),
        ),
        max_size=20,
    )
)
def test_lists_of_captions_and_failed_downloads(
    tmp_path: Path, rows: list[tuple[str | None, list[str | None] | None]]
) -> None:
    table = parquet(
        tmp_path,
        {
            "status": pa.array([status for status, _ in rows], pa.string()),
            "caption": pa.array([texts for _, texts in rows], pa.list_(pa.string())),
        },
    )
    plain = [
        {"status": status, "caption": texts if texts and any(text is not None for text in texts) else None}
        for status, texts in rows
    ]
    for batch_rows in (1, 3, 100):
        assert read(table, batch_rows=batch_rows) == reference(plain, ["caption"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "key": st.sampled_from(["a", "b", "c", "d"]),
                "title": st.text(st.characters(exclude_characters="\0\r\t", exclude_categories=["Cs"]), max_size=9),
            }
        ),
        max_size=20,
    )
)
def test_a_csv_that_python_writes_reads_as_the_reference(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for delimiter, name in ((",", "t.csv"), ("\t", "t.tsv"), ("\t", "tabs.csv")):
        content = io.StringIO()
        writer = csv.DictWriter(
            content,
            ["key", "title"],
            delimiter=delimiter,
            quoting=csv.QUOTE_ALL if delimiter == "," else csv.QUOTE_MINIMAL,
        )
        writer.writeheader()
        writer.writerows(rows)
        # Unquoted, an empty cell is a missing one.
        plain = rows if delimiter == "," else [row | {"title": row["title"] or None} for row in rows]
        assert read(text_file(tmp_path, content.getvalue(), name), batch_rows=3) == reference(plain, ["title"])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_form_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["a cat", None, "犬", "a cat"])
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    rows, faults = read(parquet(tmp_path, {"caption": values, "uid": values}))
    assert [(row["key"], row["uid"], row["caption"]) for row in rows] == [
        ("a cat", "a cat", "a cat"),
        ("犬", "犬", "犬"),
    ]
    assert faults == [("000000000001", "no caption"), ("a cat", "repeated key")]


def test_sizes_of_every_type(tmp_path: Path) -> None:
    for values in (
        np.array([640, 2**64 - 1], np.uint64),
        np.array([640.0, 0.5]),
        np.array([640, np.nan], np.float32),
        ["640", "6e2"],
        [b"640", b"\xff"],
    ):
        rows, _ = read(parquet(tmp_path, {"text": ["a", "b"], "width": values, "height": values}))
        assert [(row["width"], row["height"]) for row in rows] == [(640, 640), (None, None)]
    rows, _ = read(
        parquet(
            tmp_path, {"text": ["a"], "width": [True], "height": [[1]], "original_width": [3], "original_height": [4]}
        )
    )
    assert (rows[0]["width"], rows[0]["height"]) == (3, 4)
    assert read(text_file(tmp_path, "text,width,height\na,640,480\nb,,7\n"))[0][0]["width"] == 640


def test_captions_by_the_key_that_is_given(tmp_path: Path) -> None:
    table = parquet(tmp_path, {"caption": ["c0", None], "alt": ["a0", "a1"], "tags": [["x", "y"], []], "n": [1, 2]})
    assert captions(table) == ["c0"]
    assert captions(table, "parquet:caption", "parquet:alt") == ["c0", "a1"]
    assert captions(table, "txt", "parquet:missing+parquet:alt+parquet:caption", "csv:n") == ["a0\nc0", "a1"]
    assert captions(table, "parquet:tags", "parquet:alt") == ["x\ny", "a1"]
    assert faults_of(table, "parquet:tags+parquet:caption")[0].detail == "looked for: parquet:tags+parquet:caption"


def test_a_cell_that_is_not_utf8_rejects_its_row(tmp_path: Path) -> None:
    table = text_file(tmp_path, b"key,caption,title\nk0,a,b\nk1,caf\xe9,b\nk\xff2,c,d\nk3,,caf\xe9\nk4,,e\n")
    rows, faults = read(table)
    assert [(row["key"], row["caption"]) for row in rows] == [("k0", "a"), ("k\\xff2", "c"), ("k4", "e")]
    assert faults == [("k1", "caption is not UTF-8"), ("k3", "caption is not UTF-8")]
    assert "position 3" in faults_of(table)[0].detail
    raw = pa.array([[b"a", b"\xff"], [b"b", None]], pa.list_(pa.binary()))
    assert read(parquet(tmp_path, {"caption": raw, "text": ["x", "y"]})) == (
        [{"key": "000000000001", "uid": None, "width": None, "height": None, "caption": "b"}],
        [("000000000000", "caption is not UTF-8")],
    )


def test_repeated_keys_far_apart_and_without_a_caption(tmp_path: Path) -> None:
    keys = [f"k{number}" for number in range(1000)]
    keys[990], keys[500], keys[501] = "k7", "k0", "k0"
    texts: list[str | None] = ["a"] * 1000
    texts[0] = None
    rows, faults = read(parquet(tmp_path, {"key": keys, "text": texts}), batch_rows=64)
    assert faults == [("k0", "no caption"), ("k0", "repeated key"), ("k0", "repeated key"), ("k7", "repeated key")]
    assert len(rows) == 996


def test_numbers_may_be_keys(tmp_path: Path) -> None:
    assert [row["key"] for row in read(parquet(tmp_path, {"key": [7, None, 9], "text": ["a", "b", "c"]}))[0]] == [
        "7",
        "000000000001",
        "9",
    ]
    assert "the column 'uid' holds double" in refused(parquet(tmp_path, {"uid": [0.5], "text": ["a"]}))


def test_a_table_without_such_a_caption_is_refused(tmp_path: Path) -> None:
    message = refused(parquet(tmp_path, {"words": ["a"], "url": ["b"]}))
    assert "has no column that build.caption_key names (parquet:caption, txt" in message
    assert "allowed: its columns: 'words', 'url'\n" in message and "--caption-key parquet:COLUMN" in message
    assert "a CSV needs a header line" in refused(text_file(tmp_path, "a cat,x.jpg\na dog,y.jpg\n"))
    message = refused(parquet(tmp_path, {"caption": [1]}))
    assert (
        "the column 'caption' of build.caption_key holds int64" in message and "allowed: a column of strings" in message
    )
    assert "has the column 'caption' twice" in refused(text_file(tmp_path, "caption,caption\na,b\n"))


def test_a_header_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    table = text_file(tmp_path, b"\xef\xbb\xbf\xe9,t\xc3\xadtulo\n\xff,caf\xc3\xa9\n")
    assert captions(table, "csv:título") == ["café"]
    assert r"its columns: '\\xe9', 'título'" in refused(table)


def test_a_damaged_line_that_is_not_utf8_costs_itself(tmp_path: Path) -> None:
    rows, faults = read(
        text_file(tmp_path, b"key,text\n\xc3\xa9,\xc3\xa9\n\xff\nc\xff,\xff\nd,four\ne,\xc3\xa9t\xc3\xa9\n"),
        batch_rows=2,
    )
    assert [(row["key"], row["caption"]) for row in rows] == [("é", "é"), ("d", "four"), ("e", "été")]
    assert faults == [("c\\xff", "caption is not UTF-8"), ("", "row is damaged")]


def test_damaged_lines_of_a_csv_cost_themselves(tmp_path: Path) -> None:
    table = text_file(tmp_path, "key,text\na,one\nb\nc,two,three\nd,four\n")
    rows, faults = read(table, batch_rows=1)
    assert [row["key"] for row in rows] == ["a", "d"] and faults == [("", "row is damaged")] * 2
    assert [fault.detail for fault in faults_of(table)] == [
        "line 3: 1 fields, the header has 2",
        "line 4: 3 fields, the header has 2",
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"PK\x03\x04" * 100])
def test_a_file_that_is_no_table_is_one_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    assert read(shard(tmp_path / "t.parquet")) == ([], [("", "not a table")])
    if content != b"PK\x03\x04" * 100:  # to a CSV that is a header
        assert read(text_file(tmp_path, content)) == ([], [("", "not a table")])


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    for table in (
        parquet(tmp_path, {"text": pa.array([], pa.string())}),
        text_file(tmp_path, "text,path\n"),
        text_file(tmp_path, "key,text\n"),
    ):
        assert read(table) == ([], [])


def test_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    rows, faults = read(text_file(tmp_path, b'\xef\xbb\xbfkey,text\r\na,"one\r\ntwo"\r\nb,three\r\n'))
    assert [(row["key"], row["caption"]) for row in rows] == [("a", "one\r\ntwo"), ("b", "three")] and not faults


def test_a_csv_of_many_blocks_and_a_row_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tablefile, "_BLOCK_BYTES", 256)
    lines = [f'k{number},"a cat,\nnumber {number}"' for number in range(200)]
    rows, faults = read(text_file(tmp_path, "\n".join(["key,text", *lines])), batch_rows=7)
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(200)] and not faults
    rows, faults = read(text_file(tmp_path, "\n".join(["key,text", *lines[:50], "long," + "x" * 900, *lines[50:]])))
    assert faults == [("", "table cut or damaged")] and [row["key"] for row in rows] == [
        f"k{number}" for number in range(len(rows))
    ]


def test_a_damaged_page_ends_the_table_and_earlier_rows_stay(tmp_path: Path) -> None:
    columns = {"key": [f"k{number}" for number in range(400)], "text": [f"caption {number}" for number in range(400)]}
    table = parquet(tmp_path, columns, row_group_size=100, write_page_checksum=True)
    group = pq.ParquetFile(table.path).metadata.row_group(2).column(1)
    data = bytearray(Path(table.path).read_bytes())
    data[(group.dictionary_page_offset or group.data_page_offset) + group.total_compressed_size - 5] ^= 1
    Path(table.path).write_bytes(data)
    for batch_rows in (50, 100, 250, 1000):
        rows, faults = read(shard(table.path), batch_rows=batch_rows)
        assert [row["key"] for row in rows] == columns["key"][:200] and faults == [("", "table cut or damaged")]
    cut = text_file(tmp_path, bytes(data[:-100]), "cut.parquet")
    assert read(cut) == ([], [("", "not a table")]) and not without_images(cut), "reported where the captions are read"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_any_scribble_in_a_csv_ends_in_rows_or_faults_or_a_refusal(tmp_path: Path, at: int, scribble: bytes) -> None:
    data = ("key,text\n" + "".join(f'k{number},"caption {number}"\n' for number in range(40))).encode()
    at = 9 + at % (len(data) - 9)
    try:
        rows, faults = read(text_file(tmp_path, data[:at] + scribble + data[at + len(scribble) :]), batch_rows=5)
    except UserError:
        assert b'"' in scribble or data[at : at + len(scribble)].count(b'"')
        return
    assert all(isinstance(reason, str) for _, reason in faults)
    whole = data[:at].count(b"\n") - 1
    assert [row["key"] for row in rows[:whole]] == [f"k{number}" for number in range(whole)]


def test_a_remote_table_reads_the_same() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/test-tables/t.csv", b"path,title\nimages/a.jpg,a cat\n")
    memory.pipe_file("/test-tables/images/a.jpg", b"image a")
    try:
        table = shard("memory://test-tables/t.csv")
        assert captions(table) == ["a cat"]
        assert list(table_images(table, ["000000000000"])) == [(0, b"image a")]
    finally:
        memory.rm("/test-tables", recursive=True)


def images(table: Shard, keys: Sequence[str]) -> list[tuple[int, bytes | tuple[str, str]]]:
    return [
        (row, (data.key, data.reason) if isinstance(data, Fault) else data) for row, data in table_images(table, keys)
    ]


_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_FORMS: dict[str, Callable[[list[bytes | None]], Any]] = {
    "binary": lambda values: pa.array(values, pa.binary()),
    "large": lambda values: pa.array(values, pa.large_binary()),
    "struct": lambda values: pa.array([value and {"bytes": value, "path": None} for value in values], _STRUCT),
}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("name", ["image", "jpg", "picture"])
def test_images_of_a_parquet(tmp_path: Path, form: str, name: str) -> None:
    values = [jpeg(number) for number in range(4)]
    columns = {"text": ["a", "b", "c", "d"], "key": ["k0", "k1", "k2", "k3"], name: _FORMS[form]([*values[:3], None])}
    table = parquet(tmp_path, columns)
    assert not without_images(table)
    assert images(table, ["k0", "k2", "k2", "k3"]) == [
        (0, values[0]),
        (1, values[2]),
        (2, values[2]),
        (3, ("k3", "no image")),
    ]
    assert images(table, []) == []


def test_a_table_without_images(tmp_path: Path) -> None:
    assert without_images(parquet(tmp_path, {"uid": ["a"], "text": ["b"], "url": [b"http://x"]}))
    assert without_images(parquet(tmp_path, {"text": ["b"], "a": [b"1"], "b": [b"2"]})), "which of them?"
    assert not without_images(parquet(tmp_path, {"text": ["b"], "a": [b"1"], "img": [b"2"]}))
    assert without_images(text_file(tmp_path, "title,url\na,b\n"))
    assert not without_images(text_file(tmp_path, "title\tfilepath\na\tb\n"))


def test_images_next_to_a_csv(tmp_path: Path) -> None:
    (tmp_path / "im").mkdir()
    for name in ("a", "b é"):
        (tmp_path / "im" / f"{name}.jpg").write_bytes(name.encode() * 100)
    content = f"title,filepath\none,im/a.jpg\ntwo,im/none.jpg\nthree,{tmp_path}/im/b é.jpg\nfour,\nfive,file://{tmp_path}/im/a.jpg\nsix,im\n"
    table = text_file(tmp_path, content)
    keys = [row["key"] for row in read(table)[0]]
    missing = [(row, (keys[row], "no image")) for row in (1, 3, 5)]
    found = [(0, b"a" * 100), (2, "b é".encode() * 100), (4, b"a" * 100)]
    assert images(table, keys) == sorted([*found, *missing], key=lambda pair: pair[0])
    (fault,) = [data for row, data in table_images(table, keys) if row == 1]
    assert isinstance(fault, Fault) and fault.detail == "im/none.jpg: No such file or directory"


def test_a_struct_may_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"from the file")
    value = {"bytes": None, "path": "a.jpg"}
    table = parquet(tmp_path, {"text": ["a"], "image": pa.array([value], _STRUCT)})
    assert images(table, ["000000000000"]) == [(0, b"from the file")]


def test_a_failed_download_of_the_same_key_is_not_the_image(tmp_path: Path) -> None:
    table = parquet(
        tmp_path,
        {
            "key": ["k", "k"],
            "status": ["failed_to_download", "success"],
            "text": ["a", "b"],
            "jpg": [b"wrong", b"right"],
        },
    )
    assert captions(table) == ["b"] and images(table, ["k"]) == [(0, b"right")]


def test_a_table_that_changed_is_an_error(tmp_path: Path) -> None:
    table = parquet(tmp_path, {"key": ["a"], "text": ["b"], "jpg": [b"1"]})
    with pytest.raises(UserError, match="no longer holds the sample 'gone'"):
        images(table, ["a", "gone"])


def test_images_beyond_a_damaged_page_are_faults(tmp_path: Path) -> None:
    pictures = [jpeg(number) for number in range(90)]
    columns = {"text": ["a"] * 90, "jpg": pictures}
    table = parquet(
        tmp_path, columns, row_group_size=30, write_page_checksum=True, compression="none", use_dictionary=False
    )
    data = bytearray(Path(table.path).read_bytes())
    data[data.find(pictures[40]) + 50] ^= 1
    Path(table.path).write_bytes(data)
    keys = [row["key"] for row in read(table)[0]]
    found = images(table, keys)
    assert len(keys) == 90 and [row for row, _ in found] == list(range(90))
    assert [data for _, data in found] == [*pictures[:30], *((key, "table cut or damaged") for key in keys[30:])]


def test_batches_stream(tmp_path: Path) -> None:
    """The first batch comes although the rest is gone before it is read."""
    table = parquet(tmp_path, {"text": [f"a {row}" for row in range(5000)]}, row_group_size=1000)
    batches: Iterator[Any] = read_table_rows(table, parse_caption_key(["auto"]), 1000)
    assert len(next(batches).table) == 1000
    with open(table.path, "rb+") as file:
        file.write(bytes(table.bytes))
    assert [fault.reason for batch in batches for fault in batch.faults] == ["table cut or damaged"]


def test_small_row_groups_come_together(tmp_path: Path) -> None:
    table = parquet(tmp_path, {"text": [f"a {row}" for row in range(1050)]}, row_group_size=100)
    for batch_rows, sizes in ((1050, [1050]), (2000, [1050]), (350, [300, 300, 300, 150]), (60, [60, 40] * 10 + [50])):
        assert [len(batch.table) for batch in read_table_rows(table, parse_caption_key(["auto"]), batch_rows)] == sizes
    assert captions(table) == [f"a {row}" for row in range(1050)]
