"""Walking a tar: grouping by key, and every way in which a tar can be cut or damaged."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.readers.tar import Sample, walk
from shard_factory import Member, tar_bytes

BLOCK = tarfile.BLOCKSIZE
THREE: list[Member] = [
    (f"{key}.{suffix}", f"{key} {suffix} ".encode() * 200)
    for key in ("one", "two", "three")
    for suffix in ("jpg", "txt", "json")
]


def walked(data: bytes) -> tuple[dict[str, dict[str, bytes | None]], list[tuple[str, str]]]:
    """The samples with their members' bytes, and key and reason of the faults."""
    samples, faults = {}, []
    for found in walk(io.BytesIO(data), len(data)):
        if isinstance(found, Sample):
            samples[found.key] = {suffix: found.read(suffix) for suffix in found.members}
        else:
            faults.append((found.key, found.reason))
    return samples, faults


def infos(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


def test_members_of_a_key_make_a_sample() -> None:
    samples, faults = walked(tar_bytes(THREE))
    assert not faults
    assert samples == {
        key: {suffix: f"{key} {suffix} ".encode() * 200 for suffix in ("jpg", "txt", "json")}
        for key in ("one", "two", "three")
    }


def test_the_key_ends_at_the_first_dot_of_the_basename() -> None:
    names = ["a.b/one.jpg", "a.b/one.cls.txt", "c/one.JPG", "./two.png", "README", "._two.png", "c/.hidden"]
    samples, faults = walked(tar_bytes([(name, b"x") for name in names]))
    assert not faults
    assert {key: list(members) for key, members in samples.items()} == {
        "a.b/one": ["jpg", "cls.txt"],
        "c/one": ["jpg"],
        "./two": ["png"],
    }


def test_reading_in_part_and_a_missing_member() -> None:
    data = tar_bytes(THREE)
    first = next(walk(io.BytesIO(data), len(data)))
    assert isinstance(first, Sample)
    assert (first.read("txt", 5), first.read("png"), first.image_suffix) == (b"one t", None, "jpg")


def test_a_name_that_is_not_utf8_becomes_printable() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        archive.addfile(tarfile.TarInfo(b"caf\xe9.jpg".decode("utf8", "surrogateescape")))
    assert list(walked(buffer.getvalue())[0]) == ["caf\\xe9"]


def test_a_long_name_is_whole() -> None:
    name = "d" * 150 + "/" + "k" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            archive.addfile(tarfile.TarInfo(name + ".jpg"))
        assert list(walked(buffer.getvalue())[0]) == [name]


@pytest.mark.parametrize("between", [[], [("x.jpg", b"x")]], ids=["adjacent", "apart"])
def test_a_repeated_key_is_a_fault_and_the_first_one_stays(between: list[Member]) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"1"), *between, ("a.jpg", b"2"), ("a.txt", b"2"), ("b.jpg", b"3")]
    samples, faults = walked(tar_bytes(members))
    assert faults == [("a", "repeated key")]
    assert samples["a"] == {"jpg": b"1", "txt": b"1"} and samples["b"] == {"jpg": b"3"}


def test_an_empty_tar_has_no_sample() -> None:
    assert walked(tar_bytes([])) == ({}, [])


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"PK\x03\x04" + b"z" * 2000, tar_bytes(THREE)[:300]])
def test_a_file_that_is_no_tar_is_one_fault(data: bytes) -> None:
    assert walked(data) == ({}, [("", "not a tar")])


# Sizes: every member is 512 bytes of header and 1,600 to 2,400 of data, rounded up to blocks.
@pytest.mark.parametrize(
    ("cut", "whole", "lost"),
    [
        ("header border", ["one"], "two"),
        ("in a header", ["one"], "two"),
        ("in the data", ["one"], "two"),
        ("in the last padding", ["one", "two"], "three"),
        ("no end mark", ["one", "two"], "three"),
        ("half an end mark", ["one", "two"], "three"),
    ],
)
def test_a_cut_tar_keeps_what_is_whole(cut: str, whole: list[str], lost: str) -> None:
    data = tar_bytes(THREE)
    headers = [info.offset for info in infos(data)]
    last = infos(data)[-1]
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    length = {
        "header border": headers[4],
        "in a header": headers[4] + 100,
        "in the data": headers[4] + BLOCK + 100,
        "in the last padding": last.offset_data + last.size,
        "no end mark": end,
        "half an end mark": end + 100,
    }[cut]
    samples, faults = walked(data[:length])
    assert (list(samples), faults) == (whole, [(lost, "tar cut or damaged")])


def test_one_block_of_zeros_is_an_end_mark() -> None:
    data = tar_bytes(THREE)
    last = infos(data)[-1]
    assert not walked(data[: last.offset_data + -(-last.size // BLOCK) * BLOCK + BLOCK])[1]


def test_a_damaged_header_ends_the_tar_with_a_fault() -> None:
    data = bytearray(tar_bytes(THREE))
    at = infos(bytes(data))[3].offset
    data[at : at + BLOCK] = b"\x55" * BLOCK
    samples, faults = walked(bytes(data))
    assert not samples and faults == [("one", "tar cut or damaged")], (
        "the next key's header is gone: `one` may lack members"
    )


@pytest.mark.parametrize("name", ["evil.jpg", "README"])
def test_a_negative_size_does_not_loop(name: str) -> None:
    before = tar_bytes([("a.jpg", b"x" * BLOCK)])[: 2 * BLOCK]
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"-0000001000\0"  # one block back: to this very header
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    assert [reason for _, reason in walked(before + bytes(header) + b"\0" * 4 * BLOCK)[1]] == ["tar cut or damaged"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.binary(max_size=700), st.booleans())
def test_any_cut_or_scribble_ends_and_keeps_earlier_samples(at: int, scribble: bytes, cut: bool) -> None:
    data = tar_bytes(THREE)
    at %= len(data)
    spoilt = data[:at] if cut else data[:at] + scribble + data[at + len(scribble) :]
    samples, faults = walked(spoilt)
    headers = [info.offset for info in infos(data)]
    for number, key in enumerate(("one", "two")):
        if at > headers[3 * (number + 1)] + BLOCK:
            assert key in samples
    assert all(isinstance(reason, str) for _, reason in faults)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_a_pax_header_of_absurd_length_ends_the_tar(size: bytes) -> None:
    """Such a length once overflowed, or asked for that much memory."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = size, b"x"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = tar_bytes(THREE).rstrip(b"\0")
    samples, faults = walked(whole + bytes(-len(whole) % BLOCK) + bytes(header) + bytes(2 * BLOCK))
    assert list(samples) == ["one", "two"] and faults == [("three", "tar cut or damaged")]
