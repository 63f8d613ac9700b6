"""Tars written block by block: members of every type, and sparse files of every kind."""

import tarfile
from collections.abc import Sequence
from typing import Any

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
SPARSE_KINDS = ("gnu", "0.0", "0.1", "1.0")

Spans = Sequence[tuple[int, int]]  # offset and length of what is no hole


def padded(data: bytes) -> bytes:
    """Filled up with zeros to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def head(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, linkname: str = "", **fields: Any) -> bytes:
    """One header block."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = size
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\0" % size  # tobuf writes 0 where it expects no data
    return with_checksum(block)


def with_checksum(block: bytes | bytearray) -> bytes:
    """A header block with the checksum of its bytes."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Header and data."""
    return head(name, len(data), kind) + padded(data)


def big_number(name: str, data: bytes) -> bytes:
    """A member whose size is written in base 256, as for 8 GiB and more."""
    block = bytearray(head(name))
    block[124:136] = b"\x80" + len(data).to_bytes(11, "big")
    return with_checksum(block) + padded(data)


def records(*pairs: tuple[str, object], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A PAX header with these records, for the next member, or with XGLTYPE for all that follow."""
    data = b""
    for name, value in pairs:
        body = f" {name}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        data += str(length).encode() + body
    return member("PaxHeaders/x", data, kind)


def long_name(name: str, of_link: bool = False) -> bytes:
    """GNU's header for a name, or a link's target, of any length."""
    return member("././@LongLink", name.encode() + b"\0", b"K" if of_link else b"L")


def sparse(name: str, data: bytes, spans: Spans, kind: str) -> bytes:
    """A file that is stored without its holes: GNU tar's own type S, or PAX version 0.0, 0.1 or 1.0."""
    stored = b"".join(data[offset : offset + length] for offset, length in spans)
    if kind == "gnu":
        return _gnu_sparse(name, len(data), stored, spans)
    if kind == "0.0":
        pairs: list[tuple[str, object]] = [("GNU.sparse.size", len(data)), ("GNU.sparse.numblocks", len(spans))]
        for offset, length in spans:
            pairs += [("GNU.sparse.offset", offset), ("GNU.sparse.numbytes", length)]
        return records(*pairs) + member(name, stored)
    numbers = [str(number) for span in spans for number in span]
    if kind == "0.1":
        pairs = [("GNU.sparse.size", len(data)), ("GNU.sparse.numblocks", len(spans))]
        pairs += [("GNU.sparse.name", name), ("GNU.sparse.map", ",".join(numbers))]
        return records(*pairs) + member(f"GNUSparseFile.0/{name}"[:99], stored)
    pairs = [("GNU.sparse.major", 1), ("GNU.sparse.minor", 0), ("GNU.sparse.name", name)]
    table = padded("".join(f"{number}\n" for number in [len(spans), *numbers]).encode())
    return records(*pairs, ("GNU.sparse.realsize", len(data))) + member(f"GNUSparseFile.0/{name}"[:99], table + stored)


def _gnu_sparse(name: str, size: int, stored: bytes, spans: Spans) -> bytes:
    entries = [b"%011o\0%011o\0" % span for span in spans]
    block = bytearray(head(name, len(stored), b"S"))
    block[257:265], block[345:] = b"ustar  \0", bytes(BLOCK - 345)
    block[386:482] = b"".join(entries[:4]).ljust(96, b"\0")
    block[482], block[483:495] = len(entries) > 4, b"%011o\0" % size
    more = b""
    for first in range(4, len(entries), 21):
        table = b"".join(entries[first : first + 21]).ljust(504, b"\0")
        more += table + bytes([len(entries) > first + 21]) + bytes(7)
    return with_checksum(block) + more + padded(stored)
