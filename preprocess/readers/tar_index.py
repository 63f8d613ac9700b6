"""The members of a healthy tar from its headers alone, compiled: local tar -> TarIndex, the spans of all members.

Only healthy tars are read: anything out of the ordinary (long or non-ASCII names, links, sparse files, damaged headers,
repeated keys, no end mark, bytes after it that are no tar) gives None, and `preprocess.readers.tar.walk` reads the tar
instead. So the text of every fault comes from one function, the reference; tests/helpers/fuzz.py compares both on
mutated tars.

Shapes: M members, S samples, W wanted suffixes.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.native import njit
from preprocess.readers.base import map_file

_BLOCK = 512
_FIRST_ROOM = 1 << 16
_ODD, _FULL = -1, -2
_FIELDS = 6
_NAME, _NAME_END, _DATA, _SIZE, _KEY_END, _SAMPLE = range(_FIELDS)
# Names that a PAX header must not change: those headers are for walk().
_PAX_NAMES = np.frombuffer(b"path=size=GNU.hdrc", np.uint8)
_PAX_ENDS = np.array([5, 10, 14, 18])


@dataclass(frozen=True)
class TarIndex:
    """Where every member of one tar is."""

    data: np.ndarray  # uint8 [bytes of the tar], memory-mapped
    keys: pa.StringArray  # [S]
    spans: np.ndarray  # int64 [S, W, 2], begin and end of the member with each wanted suffix; begin -1: none
    members: np.ndarray  # int64 [M, 6], see `_index`
    first_member: np.ndarray  # int64 [S + 1]: members first_member[s]:first_member[s + 1] are sample s

    def sample_members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Lower-case suffix -> begin and end of all members of a sample, in the tar's order."""
        members = {}
        for row in self.members[self.first_member[sample] : self.first_member[sample + 1]].tolist():
            suffix = self.data[row[_KEY_END] + 1 : row[_NAME_END]].tobytes().decode("ascii").lower()
            members[suffix] = row[_DATA], row[_DATA] + row[_SIZE]
        return members


def index_tar(path: Path, size: int, wanted: tuple[str, ...]) -> TarIndex | None:
    """The samples of a local tar, or None if `walk` has to read it; `wanted`: W lower-case suffixes.

    `size` is the length in bytes that the tar had when it was listed; another length gives None.
    """
    return None if path.stat().st_size != size else index_data(map_file(path), wanted)


def index_data(data: np.ndarray, wanted: tuple[str, ...]) -> TarIndex | None:
    """`index_tar` for a tar that is mapped already, uint8 [bytes]."""
    if len(data) < _BLOCK:
        return None
    room = _FIRST_ROOM
    while True:
        members = np.empty((room, _FIELDS), np.int64)
        count, samples = _index(data, members)
        if count != _FULL:
            break
        room *= 4
    if count == _ODD:
        return None
    members = members[:count]
    suffixes = np.frombuffer("".join(wanted).encode("ascii"), np.uint8)
    ends = np.cumsum([len(suffix) for suffix in wanted], dtype=np.int64)
    spans = np.full((samples, len(wanted), 2), -1, np.int64)
    first_member = np.empty(samples + 1, np.int64)
    _fill_spans(data, members, suffixes, ends, spans, first_member)
    keys = gather_strings(data, members[first_member[:-1]][:, [_NAME, _KEY_END]]).cast(pa.string())
    if len(pc.unique(keys)) != samples:
        return None
    return TarIndex(data, keys, spans, members, first_member)


@njit(nogil=True, cache=True)
def _index(data: np.ndarray, members: np.ndarray) -> tuple[int, int]:
    """Fill members int64 [room, 6]: begin and end of the name, begin of the data, its size, end of the key, number of
    the sample. Returns how many members belong to samples, or _ODD or _FULL; and how many samples there are.
    """
    size = len(data)
    count, sample, start, offset, described = 0, -1, 0, 0, False
    while True:
        if offset + 512 > size:
            return _ODD, 0
        if data[offset] == 0:
            offset = _skip_zeros(data, offset)
            if described or offset < 0:  # the member that the PAX records are about is missing, or it is no end mark
                return _ODD, 0
            if offset == size:
                return count, sample + 1
            continue  # another tar, as after `cat`
        kind = data[offset + 156]
        length = _octal(data, offset + 124, offset + 136)
        if length < 0 or not _checksum_fits(data, offset) or not _plain_numbers(data, offset):
            return _ODD, 0
        body = offset + 512
        if kind == 0x78 or kind == 0x67:  # x, g: PAX records for the next member, or for all
            if body + length > size or not _plain_pax(data, body, body + length):
                return _ODD, 0
            described = True
            offset = body + (length + 511) // 512 * 512
            continue
        described = False
        if kind == 0x35:  # a directory
            offset = body
            continue
        if kind != 0x30 and kind != 0:
            return _ODD, 0
        # A prefix (POSIX), or what GNU tar keeps there, makes a longer name.
        if data[offset + 345] != 0 or body + length > size:
            return _ODD, 0
        end, dot = _name(data, offset)
        if end == _ODD:
            return _ODD, 0
        if dot < end - 1:
            if count == len(members):
                return _FULL, 0
            if sample < 0 or not _same(data, offset, dot, data, members[start, 0], members[start, 4], False):
                sample += 1
                start = count
            for row in range(start, count):
                if _same(data, dot + 1, end, data, members[row, 4] + 1, members[row, 1], True):
                    return _ODD, 0
            members[count, 0], members[count, 1], members[count, 2] = offset, end, body
            members[count, 3], members[count, 4], members[count, 5] = length, dot, sample
            count += 1
        offset = body + (length + 511) // 512 * 512


@njit(nogil=True, cache=True)
def _skip_zeros(data: np.ndarray, offset: int) -> int:
    """Begin of the first block after `offset` that does not begin with a zero, or the length of the tar; _ODD: other
    bytes are in between.
    """
    while offset < len(data) and data[offset] == 0:
        end = min(offset + 512, len(data))
        for i in range(offset, end):
            if data[i] != 0:
                return _ODD
        offset = end
    return offset


@njit(nogil=True, cache=True)
def _fill_spans(
    data: np.ndarray, members: np.ndarray, suffixes: np.ndarray, ends: np.ndarray, spans: np.ndarray, first: np.ndarray
) -> None:
    """Fill spans int64 [S, W, 2] and first int64 [S + 1]: each sample's first member."""
    last = -1
    for row in range(len(members)):
        sample = members[row, 5]
        if sample != last:
            first[sample] = row
            last = sample
        for wanted in range(len(ends)):
            begin = ends[wanted - 1] if wanted else 0
            if _same(data, members[row, 4] + 1, members[row, 1], suffixes, begin, ends[wanted], True):
                spans[sample, wanted, 0] = members[row, 2]
                spans[sample, wanted, 1] = members[row, 2] + members[row, 3]
    first[len(first) - 1] = len(members)


@njit(nogil=True, cache=True)
def _octal(data: np.ndarray, begin: int, end: int) -> int:
    """A number field of a header, -1 if it is written in any unusual way."""
    value, digits, offset = 0, 0, begin
    while offset < end and data[offset] == 0x20:
        offset += 1
    while offset < end and 0x30 <= data[offset] <= 0x37:
        value = value * 8 + data[offset] - 0x30
        offset += 1
        digits += 1
    while offset < end:
        if data[offset] != 0x20 and data[offset] != 0:
            return -1
        offset += 1
    return value if digits else -1


@njit(nogil=True, cache=True)
def _plain_numbers(data: np.ndarray, offset: int) -> bool:
    """Whether mode, owner, group, time and device are written as usual, or empty: else walk() ends there."""
    for first, last in ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345)):
        for i in range(offset + first, offset + last):
            if data[i] != 0 and data[i] != 0x20:
                if _octal(data, offset + first, offset + last) < 0:
                    return False
                break
    return True


@njit(nogil=True, cache=True)
def _checksum_fits(data: np.ndarray, offset: int) -> bool:
    total = 0
    for i in range(offset, offset + 512):
        total += data[i]
    for i in range(offset + 148, offset + 156):
        total += 0x20 - data[i]
    return total == _octal(data, offset + 148, offset + 156)


@njit(nogil=True, cache=True)
def _plain_pax(data: np.ndarray, begin: int, end: int) -> bool:
    """Well-formed PAX records, none of which renames or resizes a member."""
    offset = begin
    while offset < end and data[offset] != 0:
        length, digits = 0, 0
        start = offset
        while offset < end and 0x30 <= data[offset] <= 0x39 and digits < 9:
            length = length * 10 + data[offset] - 0x30
            offset += 1
            digits += 1
        stop = start + length
        if (
            digits == 0
            or offset >= end
            or data[offset] != 0x20
            or stop > end
            or stop < offset + 4
            or data[stop - 1] != 0x0A
        ):
            return False
        equals = offset + 2
        while equals < stop and data[equals] != 0x3D:
            equals += 1
        if equals >= stop - 1:
            return False
        offset = stop
    for name in range(len(_PAX_ENDS)):
        first = _PAX_ENDS[name - 1] if name else 0
        length = _PAX_ENDS[name] - first
        for start in range(begin, end - length):
            if _same(data, start, start + length, _PAX_NAMES, first, first + length, False):
                return False
    return True


@njit(nogil=True, cache=True)
def _same(first: Any, begin: int, end: int, second: Any, second_begin: int, second_end: int, ignore_case: bool) -> bool:
    """Whether two byte ranges, of one or of two arrays, are equal."""
    if end - begin != second_end - second_begin:
        return False
    for i in range(end - begin):
        left, right = first[begin + i], second[second_begin + i]
        if left != right and not (ignore_case and _lower(left) == _lower(right)):
            return False
    return True


@njit(nogil=True, cache=True)
def _lower(byte: Any) -> Any:
    return byte + 0x20 if 0x41 <= byte <= 0x5A else byte


@njit(nogil=True, cache=True)
def _name(data: np.ndarray, offset: int) -> tuple[int, int]:
    """End of a member's name, and the first dot of its last part (the end where it has no key); _ODD: unusual name."""
    end = base = offset
    while end < offset + 100 and data[end] != 0:
        if data[end] >= 0x7F or data[end] < 0x20 or data[end] == 0x5C:
            return _ODD, 0
        if data[end] == 0x2F:
            base = end + 1
        end += 1
    if end == offset or end == offset + 100 or data[end - 1] == 0x2F:
        return _ODD, 0
    dot = base
    while dot < end and data[dot] != 0x2E:
        dot += 1
    return end, end if dot == base else dot


def gather_strings(data: np.ndarray, spans: np.ndarray) -> pa.LargeBinaryArray:
    """Spans of `data`, uint8 [B], as an Arrow array; int64 [N, 2] begin and end, begin -1 is null."""
    offsets = np.zeros(len(spans) + 1, np.int64)
    np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
    text = np.empty(offsets[-1], np.uint8)
    _gather(data, np.ascontiguousarray(spans), offsets, text)
    missing = spans[:, 0] < 0
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(text)]
    strings: Any = pa.Array.from_buffers(pa.large_binary(), len(spans), buffers, int(missing.sum()))
    return strings


@njit(nogil=True, cache=True)
def _gather(data: np.ndarray, spans: np.ndarray, offsets: np.ndarray, text: np.ndarray) -> None:
    for row in range(len(spans)):
        begin, start = spans[row, 0], offsets[row]
        for i in range(offsets[row + 1] - start):
            text[start + i] = data[begin + i]
