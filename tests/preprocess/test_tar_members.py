"""Every type of member, sparse files of every kind, and tars behind the end mark of another: read as tarfile reads
them, or rejected by name.
"""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest
from pyarrow import parquet as pq

from labels.tars import tar_members
from preprocess.readers.base import Fault, parse_caption_key
from preprocess.readers.images import find_images
from preprocess.readers.shards import Shard
from preprocess.readers.tar import Sample, local_index, read_tar_rows, walk
from shard_factory import build, healthy, jpeg, preprocess, quarantined, refused, rows, sample, tar_bytes, write_tar
from tar_parts import BLOCK, END, SPARSE_KINDS, big_number, head, long_name, member, records, sparse

AUTO = parse_caption_key(["auto"])
LENIENT = ("--set", "build.max_bad_fraction=0.9")
JPEG, TEXT = jpeg(1), b"a red cat"
HOLED = b"\xff\xd8" + bytes(3 * BLOCK) + b"jpeg" * 256
HOLED_SPANS = [(0, BLOCK), (3 * BLOCK, len(HOLED) - 3 * BLOCK)]
AFTER = member("last.jpg", JPEG) + member("last.txt", TEXT)


def walked(data: bytes) -> tuple[dict[str, dict[str, bytes | None]], list[Fault]]:
    samples, faults = {}, []
    for entry in walk(io.BytesIO(data), len(data)):
        if isinstance(entry, Sample):
            samples[entry.key] = {suffix: entry.read(suffix) for suffix in entry.members}
        else:
            faults.append(entry)
    return samples, faults


def by_tarfile(data: bytes) -> dict[str, dict[str, bytes]]:
    """Another reader's samples: tarfile with ignore_zeros."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
        for info in archive:
            key, _, suffix = info.name.removeprefix("./").partition(".")
            file = archive.extractfile(info) if info.isreg() or info.islnk() else None
            if file is not None and suffix:
                samples.setdefault(key, {})[suffix] = file.read()
    return samples


READ = {
    "NUL, of old tars": member("k.jpg", JPEG, tarfile.AREGTYPE) + member("k.txt", TEXT, tarfile.AREGTYPE),
    "contiguous": member("k.jpg", JPEG, tarfile.CONTTYPE) + member("k.txt", TEXT),
    "hard link": member("first", JPEG) + head("k.jpg", 0, tarfile.LNKTYPE, "first") + member("k.txt", TEXT),
    "hard link to a link": member("./a", JPEG)
    + head("./b", 0, tarfile.LNKTYPE, "./a")
    + head("k.jpg", 0, tarfile.LNKTYPE, "./b")
    + member("k.txt", TEXT),
    "GNU long name": long_name("k" * 300 + ".jpg") + member("k" * 99, JPEG),
    "GNU long link": long_name("f" * 200)
    + member("f" * 99, JPEG)
    + long_name("f" * 200, of_link=True)
    + head("k.jpg", 0, tarfile.LNKTYPE, "f" * 99),
    "PAX name": records(("path", "k.jpg")) + member("other", JPEG) + member("k.txt", TEXT),
    "PAX size": records(("size", len(JPEG))) + head("k.jpg", 0) + member("", JPEG)[BLOCK:] + member("k.txt", TEXT),
    "PAX for all members": records(("comment", "0" * 40), kind=tarfile.XGLTYPE) + member("k.jpg", JPEG),
    "size in base 256": big_number("k.jpg", JPEG) + member("k.txt", TEXT),
    "empty sparse file": sparse("k.jpg", b"", [(0, 0)], "gnu") + member("k.txt", TEXT),
    "directories and labels": head("k.jpg", 0, tarfile.DIRTYPE)
    + member("d.jpg/", b"Yk.jpg\0\0", b"D")
    + head("v.jpg", 0, b"V")
    + member("k.jpg", b"user::rw-", b"A")
    + member("k.jpg", JPEG),
}


@pytest.mark.parametrize("case", READ)
def test_a_file_of_any_form_is_read(case: str) -> None:
    data = READ[case] + AFTER + END
    expected = {key: fields for key, fields in by_tarfile(data).items() if fields}
    assert walked(data) == (expected, []) and len(expected) == 2


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_a_sparse_file_without_holes_is_read(kind: str) -> None:
    data = sparse("k.jpg", JPEG, [(0, len(JPEG)), (len(JPEG), 0)], kind) + AFTER + END
    samples, faults = walked(data)
    assert samples["k"] == {"jpg": JPEG} and list(samples) == ["k", "last"] and not faults


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("spans", [1, 2, 4, 5, 30])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_a_sparse_file_is_rejected_by_name_and_the_rest_is_read(kind: str, spans: int, last: bool) -> None:
    content = bytearray(BLOCK * 2 * spans)
    places = [(2 * BLOCK * number + BLOCK, BLOCK) for number in range(spans)]
    for offset, length in places:
        content[offset : offset + length] = b"x" * length
    odd = sparse("k.jpg", bytes(content), places, kind) + member("k.txt", TEXT)
    data = (AFTER + odd if last else odd + AFTER) + END
    assert by_tarfile(data)["k"]["jpg"] == content, "the file of the test is what it should be"
    samples, faults = walked(data)
    assert samples == {"last": {"jpg": JPEG, "txt": TEXT}}
    assert [(fault.key, fault.reason) for fault in faults] == [("k", "sparse member")]
    assert "k.jpg is stored without its holes" in faults[0].detail and "without --sparse" in faults[0].detail


def test_a_sparse_file_with_a_pax_size_and_one_of_an_unknown_version() -> None:
    """`size` is of the stored bytes (GNU tar writes it from 8 GiB on); tarfile takes it for that of the whole file."""
    stored = HOLED[:BLOCK] + HOLED[3 * BLOCK :]
    big = records(
        ("GNU.sparse.map", f"0,{BLOCK},{3 * BLOCK},{len(HOLED) - 3 * BLOCK}"),
        ("size", len(stored)),
        ("GNU.sparse.size", len(HOLED)),
    )
    unknown = records(("GNU.sparse.major", 2), ("GNU.sparse.minor", 0), ("GNU.sparse.realsize", 9999))
    data = big + member("k.jpg", stored) + unknown + member("u.jpg", b"x" * 700) + AFTER + END
    samples, faults = walked(data)
    assert list(samples) == ["last"]
    assert [(fault.key, fault.reason) for fault in faults] == [("k", "sparse member"), ("u", "sparse member")]


OTHERS = {
    "symbolic link": (head("k.jpg", 0, tarfile.SYMTYPE, "first.jpg"), "link", "symbolic link to first.jpg"),
    "hard link to nothing": (head("k.jpg", 0, tarfile.LNKTYPE, "gone.jpg"), "link", "hard link to gone.jpg, which is"),
    "hard link to a later one": (head("k.jpg", 0, tarfile.LNKTYPE, "last.jpg"), "link", "not in the tar before it"),
    "hard link to a sparse file": (
        sparse("s", HOLED, HOLED_SPANS, "1.0") + head("k.jpg", 0, tarfile.LNKTYPE, "s"),
        "sparse member",
        "s is stored without its holes",
    ),
    "FIFO": (head("k.jpg", 0, tarfile.FIFOTYPE), "not a plain file", "k.jpg is a FIFO"),
    "device": (head("k.jpg", 0, tarfile.CHRTYPE), "not a plain file", "k.jpg is a device"),
    "second volume": (member("k.jpg", b"x" * 700, b"M"), "not a plain file", "began in another volume"),
    "unknown type": (member("k.jpg", b"x" * 700, b"Z"), "not a plain file", "unknown type b'Z'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_member_that_is_no_file_in_the_tar_rejects_its_sample(tmp_path: Path, case: str) -> None:
    odd, reason, detail = OTHERS[case]
    data = member("first.jpg", JPEG) + member("first.txt", TEXT) + odd + member("k.txt", TEXT) + AFTER + END
    samples, faults = walked(data)
    assert list(samples) == ["first", "last"] and [(fault.key, fault.reason) for fault in faults] == [("k", reason)]
    assert detail in faults[0].detail
    (tmp_path / "0.tar").write_bytes(data)
    assert local_index(Shard("0", str(tmp_path / "0.tar"), len(data), ""), AUTO) is None


# -- behind the end mark


def cat(*tars: bytes) -> bytes:
    return b"".join(tars)


A, B, C = (tar_bytes(healthy(2, first)) for first in (0, 2, 4))
SHORT = A.rstrip(b"\0")
SHORT += bytes(-len(SHORT) % BLOCK)
JOINED = {
    "two": (cat(A, B), 4),
    "three": (cat(A, B, C), 6),
    "one block of zeros": (cat(SHORT, bytes(BLOCK), B), 4),
    "blocking factor 1": (cat(SHORT, END, SHORT, END), 2),
    "record of 1 MiB": (cat(SHORT, bytes(1 << 20), B, bytes(1 << 20)), 4),
    "empty tars": (cat(bytes(10_240), A, bytes(10_240), B), 4),
    "PAX": (cat(A, records(("mtime", 1.5)) + AFTER + END), 3),
    "odd name": (cat(A, member("x\u00fc.jpg", JPEG) + member("x\u00fc.txt", TEXT) + END), 3),
    "a sample in two tars": (cat(A, member("k.jpg", JPEG) + END, member("k.txt", TEXT) + END), 3),
    "zeros to no whole block": (A + bytes(100), 2),
}


@pytest.mark.parametrize("case", JOINED)
def test_joined_tars_are_read_to_the_end(tmp_path: Path, case: str) -> None:
    data, count = JOINED[case]
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    shard = Shard("0", str(path), len(data), "")
    batches = list(read_tar_rows(shard, AUTO))
    table, faults = batches[-1].table, [fault for batch in batches for fault in batch.faults]
    assert set(table["key"].to_pylist()) == set(by_tarfile(data)) and len(table) == count
    assert [fault.reason for fault in faults] == (["repeated key"] * 2 if case == "blocking factor 1" else [])
    if case in ("two", "three", "one block of zeros", "empty tars", "zeros to no whole block"):
        assert local_index(shard, AUTO) is not None, "joined tars are read at full speed"


@pytest.mark.parametrize(
    "rest",
    [
        b"x",
        b"\n",
        b"not a header" * 100,
        bytes(700) + b"late",
        b"\x1f\x8b" + bytes(600),
        B[100:1100],
        b"\0" * 511 + b"x",
    ],
)
def test_other_bytes_after_the_end_are_reported_and_no_sample_is_lost(tmp_path: Path, rest: bytes) -> None:
    samples, faults = walked(A + rest)
    assert list(samples) == ["000000000", "000000001"]
    assert [(fault.key, fault.reason) for fault in faults] == [("", "bytes after the end of the tar")]
    start = len(A) + (BLOCK if rest.startswith(bytes(600)) else 0)
    assert f"{len(A + rest) - start} bytes after the end mark, from byte {start} on" in faults[0].detail
    path = tmp_path / "0.tar"
    path.write_bytes((A + rest)[:start])  # the fix that it names
    assert walked(path.read_bytes())[1] == []


def test_an_append_that_was_interrupted_keeps_what_is_whole() -> None:
    """`tar -r` writes over the end mark."""
    more = B.rstrip(b"\0")
    for end in range(1, len(more), 97):
        samples, faults = walked(SHORT + more[:end])
        assert {"000000000"} <= set(samples) and [fault.reason for fault in faults] == ["tar cut or damaged"]
        samples, faults = walked(A + more[:end])  # a writer that leaves the end mark
        assert {"000000000", "000000001"} <= set(samples) or faults[0].key == "000000001"
        assert len(faults) == 1


# -- whole builds


def test_sparse_images_are_in_no_image_index(tmp_path: Path) -> None:
    data = tmp_path / "data" / "0.tar"
    data.parent.mkdir()
    odd = sparse("odd.jpg", HOLED, HOLED_SPANS, "1.0") + member("odd.txt", TEXT)
    link = head("twin.jpg", 0, tarfile.LNKTYPE, "last.jpg") + member("twin.txt", TEXT)
    data.write_bytes(SHORT + odd + AFTER + link + END)
    for options in ([], ["--no-images"]):
        out = tmp_path / f"out{len(options)}"
        build(data.parent, out, *LENIENT, *options)
        assert [row["key"] for row in rows(out)] == ["000000000", "000000001", "last", "twin"]
        assert quarantined(out) == [("0", "odd", "labels", "sparse member")]
        assert preprocess("verify", out).code == 0
    shard = Shard("0", str(data), data.stat().st_size, "")
    batch = next(iter(read_tar_rows(shard, AUTO)))
    images = find_images(shard, batch.table["key"].combine_chunks(), AUTO, None)
    assert images.data[slice(*images.spans[3])].tobytes() == JPEG


@pytest.mark.parametrize(
    ("name", "command", "compress"),
    [
        ("gzip", "gunzip", gzip.compress),
        ("bzip2", "bunzip2", bz2.compress),
        ("xz", "unxz", lzma.compress),
        ("zstd", "unzstd", lambda data: b"\x28\xb5\x2f\xfd" + data),
        ("lz4", "unlz4", lambda data: b"\x04\x22\x4d\x18" + data),
    ],
)
def test_a_compressed_tar_is_named(tmp_path: Path, name: str, command: str, compress: object) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar").write_bytes(compress(tar_bytes(healthy(2))))  # type: ignore[operator]
    found = refused(tmp_path / "data", tmp_path / "out")
    assert "1 x compressed tar" in found and f"it is {name}-compressed" in found and f"&& {command} IN.tar." in found


def test_members_of_samples_apart_are_one_reason_each(tmp_path: Path) -> None:
    members = healthy(3)
    apart = [*members[::3], *members[1::3], *members[2::3], *sample("good", "a cat")]
    write_tar(tmp_path / "data" / "0.tar", apart)
    found = refused(tmp_path / "data", tmp_path / "out")
    assert "3 of 4 samples are bad (75.0%): 3 x members not adjacent" in found
    assert "members of a sample next to each other" in found and "tar --sort=name" in found
    assert [key for _, key, *_ in quarantined(tmp_path / "out")] == [f"{number:09d}" for number in range(3)]
    # The first members are a sample of their own here: it stays, and what comes later is reported.
    write_tar(tmp_path / "late" / "0.tar", [*sample("a", "a cat"), *sample("b", "a dog"), ("a.json", b"{}")])
    build(tmp_path / "late", tmp_path / "out2", *LENIENT)
    assert [row["key"] for row in rows(tmp_path / "out2")] == ["a", "b"]
    assert quarantined(tmp_path / "out2") == [("0", "a", "labels", "members not adjacent")]
    details = pq.read_table(tmp_path / "out2" / "quarantine.parquet")["detail"].to_pylist()
    assert details[0].startswith("json after other samples")


@pytest.mark.skipif(
    b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True).stdout, reason="needs GNU tar"
)
def test_the_named_command_sorts_a_tar(tmp_path: Path) -> None:
    members = healthy(3)
    unsorted = write_tar(tmp_path / "IN.tar", [*members[::3], *members[1::3], *members[2::3]])
    faults = [fault for fault in walked(unsorted.read_bytes())[1] if fault.reason == "members not adjacent"]
    subprocess.run(faults[0].detail.partition("sort it: ")[2], shell=True, cwd=tmp_path, check=True)
    samples, faults = walked((tmp_path / "OUT.tar").read_bytes())
    assert not faults and list(samples) == [f"{number:09d}" for number in range(3)]


def test_spans_are_of_the_tars_own_bytes() -> None:
    members = list(tar_members(io.BytesIO(A), len(A)))
    with tarfile.open(fileobj=io.BytesIO(A)) as archive:
        infos = archive.getmembers()
    assert [(m.name, m.begin, m.end - m.begin) for m in members] == [(i.name, i.offset_data, i.size) for i in infos]
