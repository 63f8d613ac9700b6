"""A webdataset tar as samples: everything before the first dot of the basename is the key, members of a key adjacent.

shard.tar -> walk() -> Sample(key, members) ... | Fault(key, reason)
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Fault:
    """A sample, or the rest of a tar, that cannot be read. `key` is empty where no key is known."""

    key: str
    reason: str
    detail: str


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
    key: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    seen: set[str] = set()
    try:
        archive = tarfile.open(fileobj=file, mode="r:", errors="surrogateescape")  # noqa: SIM115  (the caller closes the file)
    except (tarfile.TarError, EOFError) as error:
        yield Fault("", "not a tar", str(error))
        return
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            yield Fault(key or "", "tar cut or damaged", f"after byte {archive.offset}: {error}")
            return
        if member is not None and not member.isreg():
            continue
        name = _printable(member.name) if member is not None else ""
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        next_key = folder + slash + stem if member is not None else None
        if member is None and not _is_end_mark(file, archive.offset):
            # tarfile ends silently at a damaged header or a missing end: the last key may lack members.
            yield Fault(key or "", "tar cut or damaged", f"neither a header nor the end mark at byte {archive.offset}")
            return
        if next_key != key:
            if key is not None:
                yield Fault(key, "repeated key", "the key occurred before in this tar") if key in seen else Sample(key, members, file)
                seen.add(key)
            key, members = next_key, {}
        if member is None:
            return
        if member.offset_data + member.size > size:
            yield Fault(key or "", "tar cut or damaged", f"{name} ends {member.offset_data + member.size - size} bytes beyond the tar")
            return
        members[suffix.lower()] = member
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  ( tarfile keeps every header it has seen


def _printable(name: str) -> str:
    """A member name that can stand in a UTF-8 table: undecodable bytes become escapes."""
    return name.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")


def _is_end_mark(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
