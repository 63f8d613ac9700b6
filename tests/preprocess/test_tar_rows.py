"""The compiled reading of tars gives the rows and faults of the reference walk: healthy tars, odd ones, and mutated
bytes.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.readers import tar
from preprocess.readers.base import Fault, parse_caption_key
from preprocess.readers.shards import Shard
from preprocess.readers.tar import local_index, read_tar_rows
from preprocess.readers.tar_index import index_tar
from shard_factory import Member, healthy, jpeg, sample, tar_bytes

AUTO = parse_caption_key(["auto"])
PLAIN_JSON = {"uid": "0" * 32, "width": 32, "height": 24, "caption": "from json"}


def shard_of(path: Path, data: bytes) -> Shard:
    path.write_bytes(data)
    return Shard("s", str(path), len(data), "")


def read(shard: Shard, keys: list[str]) -> tuple[list[dict[str, Any]], list[Fault]]:
    batches = list(read_tar_rows(shard, parse_caption_key(keys)))
    return [row for batch in batches for row in batch.table.to_pylist()], [
        fault for batch in batches for fault in batch.faults
    ]


def assert_ways_agree(
    path: Path, data: bytes, keys: tuple[str, ...] = ("auto",)
) -> tuple[list[dict[str, Any]], list[Fault]]:
    """Rows and faults, after comparing the compiled way with the reference."""
    shard = shard_of(path, data)
    fast = read(shard, list(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "local_index", lambda *_: None)
        slow = read(shard, list(keys))
    assert fast == slow
    return fast


def pax_tar(members: list[Member]) -> bytes:
    """As webdataset's writer makes them: a fractional time, so that every member has a PAX header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000.25  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("make", [tar_bytes, pax_tar])
def test_healthy_tars_are_indexed(tmp_path: Path, make: Any) -> None:
    data = make(healthy(300))
    assert local_index(shard_of(tmp_path / "a.tar", data), AUTO) is not None
    rows, faults = assert_ways_agree(tmp_path / "a.tar", data)
    assert len(rows) == 300 and not faults and rows[3]["key"] == "000000003" and rows[3]["width"] == 32


def test_rows_and_faults_keep_the_tars_order_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "BATCH_ROWS", 7)
    members = []
    for number in range(40):
        key = f"{number:05d}"
        members += (
            sample(key, [f"caption {number}", b"\xff", " \n", None][number % 4], **PLAIN_JSON)
            if number % 3
            else sample(key, "no json")
        )
    rows, faults = assert_ways_agree(tmp_path / "a.tar", tar_bytes(members))
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert {fault.reason for fault in faults} == {"caption is not UTF-8", "empty caption"}


ODD_JSON = [
    b"",
    b"{}",
    b" {\n}\r\n",
    b"[]",
    b"null",
    b"{}{}",
    b"{} {}",
    b'{"uid": 5, "width": 3, "height": 4}',
    b'{"uid": null, "width": 3.0, "height": 4}',
    b'{"uid": "a", "width": -3, "height": 4}',
    b'{"uid": "a", "width": 99999999999, "height": 4}',
    b'{"uid": "a", "width": true, "height": "4"}',
    b'{"uid": "a", "uid": "b", "width": 3, "height": 4}',
    b'{"uid": "\\ud800", "width": 3, "height": 4}',
    b'{"exif": "\\ud800", "width": 3, "height": 4}',
    b'{"exif": "\xff", "width": 3, "height": 4}',
    b'{"a": NaN, "width": 3, "height": 4}',
    b'{"a": 1e999, "width": 3, "height": 4}',
    b'{"a": "x\ny", "width": 3, "height": 4}',
    b'{"a": 1,}',
    b'{"a": {"b": [1, {"c": "}{"}]}, "width": 3, "height": 4}',
    '{"width": 3, "height": 4}'.encode("utf-16-le"),
    b'\xef\xbb\xbf{"width": 3, "height": 4}',
    b'{"width": 3, "height": 4}\0',
    b'{"caption": 7, "width": 3, "height": 4}',
    b'{"caption": ["two", "captions"], "width": 3, "height": 4}',
    b'{"caption": " ", "width": 3, "height": 4}',
    b'{"width": 0x10, "height": 4}',
    b'{"width": 1e1, "height": 4}',
    b'{"width": ' + b"9" * 5000 + b', "height": 4}',
]


@pytest.mark.parametrize(
    "keys", [("auto",), ("json:caption",), ("json:alt", "txt"), ("txt+json:caption",), ("json:uid",)]
)
@pytest.mark.parametrize("text", ["a cat", None])
def test_odd_json(tmp_path: Path, keys: tuple[str, ...], text: str | None) -> None:
    def members(number: int, raw: bytes) -> list[Member]:
        return [*sample(f"{number:04d}", text), (f"{number:04d}.json", raw)]

    good = json.dumps(PLAIN_JSON).encode()
    for number, raw in enumerate(ODD_JSON):
        assert_ways_agree(
            tmp_path / "one.tar", tar_bytes([*members(1, good), *members(2, raw), *members(3, good)]), keys
        )
        for other in ODD_JSON[number % 5 :: 5]:
            assert_ways_agree(tmp_path / "two.tar", tar_bytes([*members(1, raw), *members(2, other)]), keys)


def with_header(name: str, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fields.pop("format", tarfile.USTAR_FORMAT)) as archive:
        for member, data in healthy(2):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        info.size = 3 if info.isreg() else 0
        archive.addfile(info, io.BytesIO(b"abc") if info.isreg() else None)
        archive.addfile(tarfile.TarInfo("after.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 10_240,
        b"no tar at all" * 100,
        tar_bytes([]),
        tar_bytes(healthy(3))[:-700],
        tar_bytes(healthy(3)).rstrip(b"\0"),
        with_header("x" * 96 + ".jpg"),
        with_header("d/" * 60 + "long.jpg"),
        with_header("long" * 40 + ".jpg", format=tarfile.GNU_FORMAT),
        with_header("ümlaut.jpg", format=tarfile.PAX_FORMAT),
        with_header("a link", type=tarfile.SYMTYPE, linkname="000000000.jpg"),
        with_header("folder", type=tarfile.DIRTYPE),
        with_header("fifo.txt", type=tarfile.FIFOTYPE),
        with_header("000000001.JPG"),
        with_header("000000000.txt"),
        with_header("README"),
        with_header(".hidden.txt"),
        with_header("back\\slash.txt"),
        with_header("key.with.dots.txt"),
        with_header("dot."),
        with_header("a.txt", pax_headers={"path": "other.txt"}, format=tarfile.PAX_FORMAT),
        with_header("a.txt", pax_headers={"comment": "size=12"}, format=tarfile.PAX_FORMAT),
        tar_bytes([*healthy(2), *healthy(1)]),
        tar_bytes([*sample("a"), ("A.txt", b"other key"), ("a.TXT", b"again")]),
        tar_bytes([("a.txt", b"no image"), ("b.png", b"x"), ("b.cls", b"3")]),
    ],
)
def test_odd_tars(tmp_path: Path, data: bytes) -> None:
    assert_ways_agree(tmp_path / "odd.tar", data)


def with_field(data: bytes, first: int, value: bytes) -> bytes:
    """The second header of a tar with other bytes in one of its fields, and a checksum that fits."""
    out = bytearray(data)
    start = 512 + -(-int(data[124:135], 8) // 512) * 512
    out[start + first : start + first + len(value)] = value
    out[start + 148 : start + 156] = b" " * 8
    out[start + 148 : start + 156] = b"%06o\0 " % sum(out[start : start + 512])
    return bytes(out)


@pytest.mark.parametrize("first", [100, 108, 116, 136, 329, 337])
def test_a_number_that_cannot_be_read_ends_the_tar(tmp_path: Path, first: int) -> None:
    _, faults = assert_ways_agree(tmp_path / "a.tar", with_field(tar_bytes(healthy(3)), first, b"not octa"))
    assert [fault.reason for fault in faults] == ["tar cut or damaged"]


def test_records_about_a_member_that_never_comes_end_the_tar(tmp_path: Path) -> None:
    whole = pax_tar(healthy(2)).rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + pax_tar(healthy(1))[:1024] + bytes(1024)
    _, faults = assert_ways_agree(tmp_path / "a.tar", whole)
    assert [fault.reason for fault in faults] == ["tar cut or damaged"]


BASE = (
    pax_tar(healthy(2))[:-9_000],
    tar_bytes([*healthy(3, side=8), *sample("x/y", None, jpeg(width=8), caption="é", width=1, height=2)])[:-9_000],
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 1),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 511), st.integers(0, 255)), max_size=4),
    st.integers(0, 2000),
)
def test_mutated_tars(tmp_path: Path, base: int, changes: list[tuple[int, int, int]], cut: int) -> None:
    """Bytes changed mostly within headers, checksums fixed half of the time, ends cut."""
    data = np.frombuffer(BASE[base], np.uint8).copy()
    for block, place, value in changes:
        start = block % (len(data) // 512) * 512
        data[start + place] = value
        if value % 2:
            header = data[start : start + 512]
            header[148:156] = 0x20
            header[148:156] = np.frombuffer(b"%06o\0 " % int(header.sum()), np.uint8)
    assert_ways_agree(tmp_path / "mutated.tar", data[: len(data) - cut * (cut % 3 == 0)].tobytes())


def test_a_tar_that_changed_its_size_is_read_by_the_walk(tmp_path: Path) -> None:
    data = tar_bytes(healthy(2))
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert index_tar(path, len(data), ("txt",)) is not None
    assert index_tar(path, len(data) + 512, ("txt",)) is None
