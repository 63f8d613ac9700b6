"""The members of a healthy tar from its headers alone, compiled: local tar -> where each sample's members lie.

Anything out of the ordinary (long or non-ASCII names, links, damaged headers, repeated keys, no end mark) gives None,
and `preprocess.readers.tar.walk` reads the tar instead: it is the reference, and the one that words the faults.

Shapes: M members, S samples, W wanted suffixes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.native import njit
from preprocess.readers.scratch import map_path

# ---- stretches: Stretches of mapped bytes as an Arrow array, compiled. B bytes, N stretches.


def gather_strings(data: np.ndarray, spans: np.ndarray) -> pa.LargeBinaryArray:
    """Stretches of `data`, uint8 [B], as an Arrow array; spans int64 [N, 2] are begin and end, begin -1 is null."""
    offsets = np.zeros(len(spans) + 1, np.int64)
    np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
    text = np.empty(offsets[-1], np.uint8)
    _gather(data, np.ascontiguousarray(spans), offsets, text)
    missing = spans[:, 0] < 0
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.large_binary(), len(spans), buffers, int(missing.sum()))  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def _gather(data: np.ndarray, spans: np.ndarray, offsets: np.ndarray, text: np.ndarray) -> None:
    for row in range(len(spans)):
        begin, at = spans[row, 0], offsets[row]
        for i in range(offsets[row + 1] - at):
            text[at + i] = data[begin + i]


# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)


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
    """Where everything lies in one tar.

    Attributes:
        data: uint8 [bytes of the tar], memory-mapped.
        keys: S strings.
        spans: int64 [S, W, 2], begin and end of the member with each wanted suffix; begin -1 where there is none.
        members: int64 [M, 6], see `_index`; `first_member` int64 [S + 1] says which are a sample's.
    """

    data: np.ndarray
    keys: pa.StringArray
    spans: np.ndarray
    members: np.ndarray
    first_member: np.ndarray

    def suffixes(self, sample: int) -> list[str]:
        """All suffixes of a sample, lower case, in the tar's order."""
        rows = self.members[self.first_member[sample] : self.first_member[sample + 1]]
        return [bytes(self.data[row[_KEY_END] + 1 : row[_NAME_END]]).decode("ascii").lower() for row in rows]


def index_tar(path: Path, size: int, wanted: tuple[str, ...]) -> TarIndex | None:
    """The samples of a local tar, or None if `walk` has to read it.

    Args:
        path: the tar.
        size: its length in bytes, as it was found; another length gives None.
        wanted: W lower-case suffixes without the leading dot.
    """
    return None if path.stat().st_size != size else index_data(map_path(path), wanted)


def index_data(data: np.ndarray, wanted: tuple[str, ...]) -> TarIndex | None:
    """The same of a tar that is mapped already, uint8 [bytes]."""
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
def _octal(data: np.ndarray, begin: int, end: int) -> int:
    """A number field of a header, -1 if it is written in any unusual way."""
    value, digits, at = 0, 0, begin
    while at < end and data[at] == 0x20:
        at += 1
    while at < end and 0x30 <= data[at] <= 0x37:
        value = value * 8 + data[at] - 0x30
        at += 1
        digits += 1
    while at < end:
        if data[at] != 0x20 and data[at] != 0:
            return -1
        at += 1
    return value if digits else -1


@njit(nogil=True, cache=True)
def _plain_numbers(data: np.ndarray, at: int) -> bool:
    """Whether mode, owner, group, time and device are written as usual, or empty: else walk() ends there, though they
    mean nothing here.
    """
    for first, last in ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345)):
        for i in range(at + first, at + last):
            if data[i] != 0 and data[i] != 0x20:
                if _octal(data, at + first, at + last) < 0:
                    return False
                break
    return True


@njit(nogil=True, cache=True)
def _checksum_fits(data: np.ndarray, at: int) -> bool:
    total = 0
    for i in range(at, at + 512):
        total += data[i]
    for i in range(at + 148, at + 156):
        total += 0x20 - data[i]
    return total == _octal(data, at + 148, at + 156)


@njit(nogil=True, cache=True)
def _plain_pax(data: np.ndarray, begin: int, end: int) -> bool:
    """Well-formed PAX records, none of which renames or resizes a member."""
    at = begin
    while at < end and data[at] != 0:
        length, digits = 0, 0
        start = at
        while at < end and 0x30 <= data[at] <= 0x39 and digits < 9:
            length = length * 10 + data[at] - 0x30
            at += 1
            digits += 1
        stop = start + length
        if digits == 0 or at >= end or data[at] != 0x20 or stop > end or stop < at + 4 or data[stop - 1] != 0x0A:
            return False
        equals = at + 2
        while equals < stop and data[equals] != 0x3D:
            equals += 1
        if equals >= stop - 1:
            return False
        at = stop
    for name in range(len(_PAX_ENDS)):
        first = _PAX_ENDS[name - 1] if name else 0
        length = _PAX_ENDS[name] - first
        for place in range(begin, end - length):
            same = True
            for i in range(length):
                if data[place + i] != _PAX_NAMES[first + i]:
                    same = False
                    break
            if same:
                return False
    return True


@njit(nogil=True, cache=True)
def _same_bytes(data: np.ndarray, first: int, second: int, length: int) -> bool:
    for i in range(length):  # noqa: SIM110 - numba compiles no generator
        if data[first + i] != data[second + i]:
            return False
    return True


@njit(nogil=True, cache=True)
def _lower(byte: Any) -> Any:
    return byte + 0x20 if 0x41 <= byte <= 0x5A else byte


@njit(nogil=True, cache=True)
def _same_suffix(data: np.ndarray, first: int, first_end: int, second: int, second_end: int) -> bool:
    if first_end - first != second_end - second:
        return False
    for i in range(first_end - first):  # noqa: SIM110
        if _lower(data[first + i]) != _lower(data[second + i]):
            return False
    return True


@njit(nogil=True, cache=True)
def _name(data: np.ndarray, at: int) -> tuple[int, int]:
    """Where the name of a member ends, and the first dot of its last part; the end again where it has no key; _ODD for
    an unusual name.
    """
    end = base = at
    while end < at + 100 and data[end] != 0:
        if data[end] >= 0x7F or data[end] < 0x20 or data[end] == 0x5C:
            return _ODD, 0
        if data[end] == 0x2F:
            base = end + 1
        end += 1
    if end == at or end == at + 100 or data[end - 1] == 0x2F:
        return _ODD, 0
    dot = base
    while dot < end and data[dot] != 0x2E:
        dot += 1
    return end, end if dot == base else dot


@njit(nogil=True, cache=True)
def _index(data: np.ndarray, members: np.ndarray) -> tuple[int, int]:
    """Fill members int64 [room, 6]: begin and end of the name, begin of the data, its size, end of the key, number of
    the sample.

    Returns:
        members that belong to samples, and samples; or _ODD or _FULL instead of the former.
    """
    size = len(data)
    count, sample, start, at, described = 0, -1, 0, 0, False
    while True:
        if at + 512 > size:
            return _ODD, 0
        if data[at] == 0:
            if described:  # the member that the PAX records are about is missing
                return _ODD, 0
            for i in range(at, at + 512):
                if data[i] != 0:
                    return _ODD, 0
            return count, sample + 1
        kind = data[at + 156]
        length = _octal(data, at + 124, at + 136)
        if length < 0 or not _checksum_fits(data, at) or not _plain_numbers(data, at):
            return _ODD, 0
        body = at + 512
        if kind == 0x78 or kind == 0x67:  # x, g: PAX records for the next member, or for all
            if body + length > size or not _plain_pax(data, body, body + length):
                return _ODD, 0
            described = True
            at = body + (length + 511) // 512 * 512
            continue
        described = False
        if kind == 0x35:  # a directory
            at = body
            continue
        if kind != 0x30 and kind != 0:
            return _ODD, 0
        # A prefix (POSIX), or what GNU tar keeps there, makes a longer name.
        if data[at + 345] != 0 or body + length > size:
            return _ODD, 0
        end, dot = _name(data, at)
        if end == _ODD:
            return _ODD, 0
        if dot < end - 1:
            if count == len(members):
                return _FULL, 0
            new = (
                sample < 0
                or dot - at != members[start, 4] - members[start, 0]
                or not _same_bytes(data, at, members[start, 0], dot - at)
            )
            if not new:
                for other in range(start, count):
                    if _same_suffix(data, dot + 1, end, members[other, 4] + 1, members[other, 1]):
                        return _ODD, 0
            if new:
                sample += 1
                start = count
            members[count, 0], members[count, 1], members[count, 2] = at, end, body
            members[count, 3], members[count, 4], members[count, 5] = length, dot, sample
            count += 1
        at = body + (length + 511) // 512 * 512


@njit(nogil=True, cache=True)
def _fill_spans(
    data: np.ndarray,
    members: np.ndarray,
    suffixes: np.ndarray,
    ends: np.ndarray,
    spans: np.ndarray,
    first_member: np.ndarray,
) -> None:
    """Fill spans int64 [S, W, 2] and first_member int64 [S + 1]."""
    last = -1
    for member in range(len(members)):
        sample = members[member, 5]
        if sample != last:
            first_member[sample] = member
            last = sample
        begin, end = members[member, 4] + 1, members[member, 1]
        for wanted in range(len(ends)):
            first = ends[wanted - 1] if wanted else 0
            if ends[wanted] - first != end - begin:
                continue
            same = True
            for i in range(end - begin):
                if _lower(data[begin + i]) != suffixes[first + i]:
                    same = False
                    break
            if same:
                spans[sample, wanted, 0] = members[member, 2]
                spans[sample, wanted, 1] = members[member, 2] + members[member, 3]
    first_member[len(first_member) - 1] = len(members)
