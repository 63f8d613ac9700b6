"""A webdataset tar as samples: everything before the first dot of the basename is the key, members of a key adjacent.

shard.tar -> walk() -> Sample(key, members) ... | Fault(key, reason)

As in webdataset, members without a key or without a suffix (README, ._x.jpg of another system) belong to no sample.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from preprocess.readers.base import IMAGE_SUFFIXES, Fault

_MAX_HEADER_BYTES = 1 << 24
# Also what tarfile lets through from numbers and lengths that no writer writes.
_DAMAGED = (tarfile.TarError, EOFError, OSError, ValueError, ArithmeticError, LookupError, RecursionError, TypeError)

REPEATED = "repeated key"
"""The reason of a Fault that is one sample's; any other of `walk` ends the tar."""


@dataclass(frozen=True)
class Sample:
    """The members of one key; bytes are read on demand while the tar is open."""

    key: str
    members: dict[str, tarfile.TarInfo]
    file: BinaryIO

    def read(self, suffix: str, limit: int | None = None) -> bytes | None:
        """The first `limit` bytes (None: all) of the member with this suffix; None if there is no such member."""
        member = self.members.get(suffix)
        if member is None:
            return None
        self.file.seek(member.offset_data)
        return self.file.read(member.size if limit is None else min(limit, member.size))

    def size(self, suffix: str) -> int:
        """Bytes of the member with this suffix, 0 if there is none."""
        return self.members[suffix].size if suffix in self.members else 0

    @property
    def suffixes(self) -> list[str]:
        """All suffixes, in the tar's order."""
        return list(self.members)

    @property
    def image_suffix(self) -> str | None:
        """Suffix of the member that holds the image, if there is one."""
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


def walk(file: BinaryIO, size: int) -> Iterator[Sample | Fault]:
    """All samples of a tar in order, by walking its headers; a cut or damaged tar ends with a Fault.

    Args:
        file: the tar, binary and seekable.
        size: its length in bytes; a member that ends beyond it was cut off.
    """
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    seen: set[str] = set()

    def finished() -> Sample | Fault:
        return Fault(key, REPEATED, "the key occurred before in this tar") if key in seen else Sample(key, members, file)

    for member in _headers(file, size):
        if isinstance(member, Fault):
            # The key at hand may lack members: it is lost with the rest of the tar.
            yield replace(member, key=key)
            return
        next_key, suffix = _key_and_suffix(member)
        if not next_key:
            continue
        if next_key != key or suffix in members:
            if key:
                yield finished()
                seen.add(key)
            key, members = next_key, {}
        members[suffix] = member
    if key:
        yield finished()


class _Headers:
    """A tar's bytes as tarfile wants them, for headers alone: a damaged length makes no huge read, and so no huge buffer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, _MAX_HEADER_BYTES))


def _headers(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | Fault]:
    """Every member's header; at the first thing wrong a Fault without a key, and no more."""
    try:
        archive = tarfile.open(fileobj=_Headers(file), mode="r:", errors="surrogateescape")  # type: ignore[arg-type]  # noqa: SIM115  (the caller closes the file)
    except _DAMAGED as error:
        yield Fault("", "not a tar", str(error))
        return
    while True:
        try:
            member = archive.next()
        except _DAMAGED as error:
            yield Fault("", "tar cut or damaged", f"after byte {archive.offset}: {error}")
            return
        if member is None:
            # tarfile ends silently at a damaged header and where the end mark is missing.
            if not _is_end_mark(file, archive.offset):
                yield Fault("", "tar cut or damaged", f"neither a header nor the end mark at byte {archive.offset}")
            return
        yield member
        end = member.offset_data + member.size
        if not member.offset_data <= end <= size:
            yield Fault("", "tar cut or damaged", f"{_printable(member.name)} would end at byte {end} of {size}")
            return
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  (tarfile keeps every header it has seen)


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key (with the folder) and lower-case suffix; the key is empty where the member belongs to no sample."""
    folder, slash, base = _printable(member.name).rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem if member.isreg() and stem and suffix else "", suffix.lower())


def _printable(name: str) -> str:
    """A member name that can stand in a UTF-8 table: undecodable bytes become escapes."""
    return name.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")


def _is_end_mark(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
