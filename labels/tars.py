"""The members of a webdataset tar by their headers: `tar_members` -> TarMember, the span of each file in the tar.

    plain file (types 0, NUL, 7), hard link to an earlier one    its span
    sparse file whose map has no hole                            its span
    other sparse file, other link, device, FIFO, other types     a member with a `problem`: its bytes lie elsewhere
    directory (5, D), volume label (V), access list (A)          no member
    PAX (x, g, X) and GNU long names (K, L)                      applied to the members that they describe

Blocks of zeros end a tar; where a header follows, as in tars joined by `cat`, reading goes on, as with GNU tar's
--ignore-zeros. Other bytes there, and damage, raise TarFault.
"""

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from labels.storage import printable

NOT_A_TAR, COMPRESSED, CUT = "not a tar", "compressed tar", "tar cut or damaged"
AFTER_END = "bytes after the end of the tar"
TAR_REASONS = frozenset({NOT_A_TAR, COMPRESSED, CUT, AFTER_END})
"""Reasons of a TarFault that ends the tar; any other is one member's."""
ADJACENT = "the members of a sample next to each other"
SORT_FIX = "sort it: mkdir x && tar -xf IN.tar -C x && tar --sort=name --transform='s,^\\./,,' -C x -cf OUT.tar ."

_MAX_HEADER_BYTES = 1 << 24
_SCAN_BYTES = 1 << 20
# Also what tarfile lets through from numbers and lengths that no writer writes.
_DAMAGED = (tarfile.TarError, EOFError, OSError, ValueError, ArithmeticError, LookupError, RecursionError, TypeError)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NO_FILES = (tarfile.DIRTYPE, b"D", b"V", b"A")
_KINDS = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a FIFO"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gz", "gunzip"),
    b"BZh": ("bzip2", "bz2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zst", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4", "unlz4"),
}


class TarFault(Exception):
    """Why a tar, the rest of it, or one member cannot be read; `fix` may be empty."""

    def __init__(self, reason: str, detail: str, fix: str = "") -> None:
        super().__init__(f"{detail}; {fix}" if fix else detail)
        self.reason, self.detail, self.fix = reason, detail, fix


class TarMember(NamedTuple):
    """A file in a tar: bytes begin:end of the tar, unless there is a `problem`."""

    name: str  # fits UTF-8: bytes that do not are escapes
    begin: int
    end: int
    problem: TarFault | None = None


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`): key and suffix; the key is empty where the member belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem if stem and suffix else "", suffix.lower())


def tar_members(file: BinaryIO, size: int) -> Iterator[TarMember]:
    """Every member of a tar of `size` bytes, in order.

    Raises:
        TarFault: at the first damage; the bytes of the last member before it may be cut.
    """
    archive = _open(file)
    files: dict[str, tuple[int, int, TarFault | None]] = {}  # plain tuples: no work for the garbage collector
    resumed = -1  # where bytes follow blocks of zeros
    while True:
        try:
            file.seek(archive.offset)  # tarfile would read a byte more to get there
            header = archive.next()
        except _DAMAGED as error:
            raise TarFault(CUT, f"after byte {archive.offset}: {error}") from None
        if header is None:
            if archive.offset == resumed:
                detail = f"{size - resumed} bytes after the end mark, from byte {resumed} on, are no tar"
                raise TarFault(AFTER_END, detail, f"if no data is missing, cut them off: truncate -s {resumed} IN.tar")
            resumed = _skip_zeros(file, archive.offset, size)
            if resumed == archive.offset:
                raise TarFault(CUT, f"neither a header nor the end mark at byte {resumed}")
            if resumed >= size:
                return
            archive.offset = resumed
            continue
        begin, end = header.offset_data, header.offset_data + header.size
        if header.type in _FILES and not header.pax_headers:
            member = TarMember(_printable(header.name), begin, end)
        else:
            member = _member(archive, header, files)
            begin, end = member.begin, member.end
        if member.name:
            files[member.name] = begin, end, member.problem
            yield member
        if (
            end > size
            or archive.offset >= size + tarfile.BLOCKSIZE
            or archive.offset < header.offset_data
            or header.size < 0
        ):
            raise TarFault(CUT, f"{member.name} would end at byte {max(end, archive.offset)} of {size}")
        archive.members.clear()  # tarfile keeps every header it has seen


class _Headers:
    """A tar's bytes for tarfile, for headers alone: a damaged length makes no huge read and no huge buffer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(count if count < _MAX_HEADER_BYTES else _MAX_HEADER_BYTES)


def _open(file: BinaryIO) -> Any:
    try:
        headers: Any = _Headers(file)
        return tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape")  # closed by the caller
    except _DAMAGED as error:
        file.seek(0)
        head = file.read(8)
        for magic, (name, suffix, command) in _COMPRESSED.items():
            if head.startswith(magic):
                fix = f"unpack it: mv IN.tar IN.tar.{suffix} && {command} IN.tar.{suffix}"
                raise TarFault(COMPRESSED, f"it is {name}-compressed", fix) from None
        raise TarFault(NOT_A_TAR, str(error)) from None


def _skip_zeros(file: BinaryIO, offset: int, size: int) -> int:
    """Begin of the first block from `offset` on with a byte that is not zero; `size` if zeros end the file.

    `offset` itself where no whole block of zeros is.
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        return offset
    place = offset + tarfile.BLOCKSIZE
    while chunk := file.read(_SCAN_BYTES):
        if rest := chunk.lstrip(b"\0"):
            return (place + len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(chunk)
    return size


def _member(archive: Any, header: tarfile.TarInfo, files: dict[str, tuple[int, int, TarFault | None]]) -> TarMember:
    """A header's member, without a name if it is none. `files`: the members before it, by their names."""
    name, begin = _printable(header.name), header.offset_data
    if header.issparse() or any(record.startswith("GNU.sparse.") for record in header.pax_headers):
        return _sparse(archive, header)
    if header.type in _FILES:
        return TarMember(name, begin, begin + header.size)
    if header.type in _NO_FILES:
        return TarMember("", begin, begin)
    target = _printable(header.linkname)
    if header.islnk():
        if earlier := files.get(target):
            return TarMember(name, *earlier)
        problem = TarFault(
            "link",
            f"{name} is a hard link to {target}, which is not in the tar before it",
            "write the tar again with --hard-dereference",
        )
    elif header.issym():
        fix = "write the tar again with --dereference"
        problem = TarFault("link", f"{name} is a symbolic link to {target}", fix)
    elif header.type == b"M":
        detail = f"{name} is the rest of a member that began in another volume"
        problem = TarFault(
            "not a plain file", detail, "join the volumes: unpack with tar --multi-volume, and tar again"
        )
    else:
        kind = _KINDS.get(header.type) or f"of the unknown type {header.type!r}"
        problem = TarFault("not a plain file", f"{name} is {kind}")
    return TarMember(name, begin, begin, problem)


def _sparse(archive: Any, header: tarfile.TarInfo) -> TarMember:
    """A file without its holes: its stored bytes are not the file, unless it has none."""
    name, begin = _printable(header.pax_headers.get("GNU.sparse.name", header.name)), header.offset_data
    stored: list[tuple[int, int]] = [span for span in header.sparse or () if span[1]]  # type: ignore[attr-defined]
    if "size" in header.pax_headers and header.issparse():
        # tarfile then skips the size with holes, not the bytes that are there.
        count = sum(count for _, count in stored)
        archive.offset = begin + _whole_blocks(count)
    whole = header.issparse() and stored == ([(0, header.size)] if header.size else [])
    if whole and begin + header.size <= archive.offset:
        return TarMember(name, begin, begin + header.size)
    fix = "unpack the tar, and write it again without --sparse"
    return TarMember(name, begin, archive.offset, TarFault("sparse member", f"{name} is stored without its holes", fix))


def _whole_blocks(count: int) -> int:
    return -(-count // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _printable(name: str) -> str:
    return name if name.isascii() else printable(name)
