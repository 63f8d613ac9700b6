"""Columns of label rows as bytes of Parquet pages, compiled: numbers as DELTA_BINARY_PACKED, lists with their levels.

Written as parquet-format's Encodings.md tells, in blocks of 128 numbers as pyarrow does, and levels of one bit.

Shapes: N rows, T ids, B bytes of room.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from labels.files import fingerprint_of_sources
from labels.tokenizers.kernels.table import Scalar, bit_width, compiled, inlined, store

_BLOCK, _MINI = 128, 32
_MINIS = _BLOCK // _MINI
_INT32_MAX = np.int32((1 << 31) - 1)
_ZERO, _THREE, _SEVEN, _PAIRED = np.uint64(0), np.uint64(3), np.uint64(7), np.uint64(28)
_MORE = np.uint64(0x80)
# Of numbers below 2^35; a run of 0 and one of 1, with a byte for the level.
_MOST_VARINT = 5
_MOST_RUN_BYTES = 2 * (_MOST_VARINT + 1)


def room_for(rows: int, ids: int) -> int:
    """Bytes B that `put_lists` may need for `rows` lists of `ids` numbers together, and `put_numbers` for 0 rows."""
    # Either level bit by bit, and the run that was one too many; the numbers' header; of each block the least step, the widths and the
    # steps; what `store` writes behind the last.
    levels = 2 * ((rows + ids) // 8 + 1 + _MOST_RUN_BYTES)
    return levels + 4 * _MOST_VARINT + (ids // _BLOCK + 1) * (_MOST_VARINT + _MINIS + _BLOCK * 4) + 8


@inlined
def _put_varint(out: np.ndarray, at: Scalar, value: Scalar) -> Scalar:
    """Seven bits a byte, the lowest first; where it ends."""
    while value >= _MORE:
        out[at] = np.uint8(value) | np.uint8(_MORE)
        value >>= _SEVEN
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@inlined
def _zigzag(value: Scalar) -> Scalar:
    """Small numbers of either sign as small numbers: 0 -1 1 -2 as 0 1 2 3."""
    return np.uint64((value << 1) ^ (value >> 63))


@inlined
def _put_packed(numbers: np.ndarray, first: Scalar, width: Scalar, out: np.ndarray, at: Scalar) -> Scalar:
    """_MINI numbers of `width` bits each, the first one lowest; where they end. Up to seven bytes behind that are overwritten."""
    # Whole bytes are written as they fill up; the bits of the last one are carried. Two at a time where they and seven bits fit into 64.
    carried, place = _ZERO, _ZERO
    paired = width <= _PAIRED
    for i in range(_MINI // 2 if paired else _MINI):
        if paired:
            number, taken = np.uint64(numbers[first + 2 * i]) | np.uint64(numbers[first + 2 * i + 1]) << width, width + width
        else:
            number, taken = np.uint64(numbers[first + i]), width
        carried |= number << (place & _SEVEN)
        byte = place >> _THREE
        store(out, at + np.int64(byte), carried)  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
        place += taken
        carried >>= ((place >> _THREE) - byte) << _THREE
    return at + np.int64(width) * (_MINI // 8)


@compiled
def _put_numbers(values: np.ndarray, out: np.ndarray, at: Scalar, steps: np.ndarray, rest: np.ndarray) -> Scalar:
    """int32 [T] from 0 on as DELTA_BINARY_PACKED; where it ends. `steps` int32 [_BLOCK] and `rest` uint32 [_BLOCK] are scratch."""
    at = _put_varint(out, at, np.uint64(_BLOCK))
    at = _put_varint(out, at, np.uint64(_MINIS))
    at = _put_varint(out, at, np.uint64(len(values)))
    at = _put_varint(out, at, _zigzag(np.int64(values[0]) if len(values) else np.int64(0)))
    for start in range(1, len(values), _BLOCK):
        # Slices: an index that may not be negative keeps LLVM from taking 16 numbers at once.
        count = min(_BLOCK, len(values) - start)
        here, before = values[start : start + count], values[start - 1 : start - 1 + count]
        least = _INT32_MAX
        for i in range(count):
            step = np.int32(here[i] - before[i])
            steps[i] = step
            least = min(least, step)
        for i in range(count):
            rest[i] = np.uint32(steps[i] - least)
        for i in range(count, _BLOCK):
            rest[i] = 0
        at = _put_varint(out, at, _zigzag(np.int64(least)))
        widths = at
        at += _MINIS
        for mini in range(_MINIS):
            used = np.uint32(0)
            for number in rest[mini * _MINI : (mini + 1) * _MINI]:
                used |= number
            width = bit_width(np.uint64(used))  # pyright: ignore[reportCallIssue]
            out[widths + mini] = width
            if width:
                at = _put_packed(rest, mini * _MINI, width, out, at)
    return at


@inlined
def _put_run(out: np.ndarray, at: Scalar, count: Scalar, level: Scalar) -> Scalar:
    """A run of `count` equal levels of one bit; where it ends."""
    at = _put_varint(out, at, np.uint64(count << 1))
    out[at] = level
    return at + 1


@compiled
def _put_as_runs(offsets: np.ndarray, count: Scalar, of_each: Scalar, out: np.ndarray, at: Scalar, longest: Scalar) -> Scalar:
    """`_put_levels` as runs; where they end, or -1 if they would take more than `longest` bytes."""
    begin, done, zeros, entry = at, 0, 0, 0  # `zeros` of the levels from `done` on are 0 and still to be written
    for row in range(len(offsets) - 1):
        size = offsets[row + 1] - offsets[row]
        if of_each or size == 0:
            if entry > done + zeros:
                if zeros:
                    at = _put_run(out, at, zeros, 0)
                at = _put_run(out, at, entry - done - zeros, 1)
                done, zeros = entry, 0
                if at - begin > longest:
                    return -1
            zeros += 1
        entry += max(size, 1)
    if zeros:
        at = _put_run(out, at, zeros, 0)
    if count > done + zeros:
        at = _put_run(out, at, count - done - zeros, 1)
    return at if at - begin <= longest else -1


@compiled
def _put_levels(offsets: np.ndarray, count: Scalar, of_each: Scalar, out: np.ndarray, at: Scalar) -> Scalar:
    """Levels of one bit of the `count` entries of N lists int64 [N + 1], an empty one being one entry; where they end.

    They are 0 where a list begins (`of_each`) or where it is empty, else 1. Written as runs or bit by bit, whichever is shorter.
    """
    size = (count + 7) // 8
    end = _put_as_runs(offsets, count, of_each, out, at, size)
    if end >= 0:
        return end
    begin = _put_varint(out, at, np.uint64(size << 1 | 1))
    for i in range(begin, begin + size):
        out[i] = 0xFF
    entry = 0
    for row in range(len(offsets) - 1):
        length = offsets[row + 1] - offsets[row]
        if of_each or length == 0:
            out[begin + (entry >> 3)] &= np.uint8(~(1 << (entry & 7)))
        entry += max(length, 1)
    return begin + size


def _compiled_once(sources: str) -> tuple[Callable[..., int], Callable[..., tuple[int, int, int, int]]]:
    """The entry points, kept as machine code in __pycache__ for later processes; why they enclose `sources`, labels/files.py says."""

    @njit(nogil=True, cache=True)
    def put_numbers(values, out):  # noqa: ANN202 - numba infers it
        """int32 [T] from 0 on into uint8 [B]; the bytes written."""
        _ = sources
        return _put_numbers(values, out, 0, np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.uint32))

    @njit(nogil=True, cache=True)
    def put_lists(ids, offsets, out):  # noqa: ANN202
        """ids int32 [T] from 0 on in N >= 1 lists, offsets int64 [N + 1] from 0 to T, into uint8 [B].

        Returns:
            the number of empty lists, and where the repetition levels, the definition levels and the ids end.
        """
        _ = sources
        empty = 0
        for row in range(len(offsets) - 1):
            empty += offsets[row] == offsets[row + 1]
        repeated = _put_levels(offsets, len(ids) + empty, True, out, 0)
        defined = _put_levels(offsets, len(ids) + empty, False, out, repeated)
        end = _put_numbers(ids, out, defined, np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.uint32))
        return empty, repeated, defined, end

    return put_numbers, put_lists


FILES = ("../labels/tokenizers/kernels/table.py",)
put_numbers, put_lists = _compiled_once(fingerprint_of_sources(__file__, FILES))
