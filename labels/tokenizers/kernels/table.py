"""The table of known words: open addressing over the words' own bytes, so that a look-up is exact and makes no object.

Shapes: B bytes of text, S slots, R captions (rows), L ids a caption at most.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from labels.tokenizers.kernels.wordjit import compiled, inlined

# A NumPy or Python number: they are the same to the compiler, but not to a type checker.
Scalar = Any

# In place of a number of ids: captions that wait for unknown pieces; captions, and pieces, that belong to the slow path.
WAITING, SLOW = -1, -2
UNSAFE = 0xFFFF

_C0, _C1, _C2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xFF51AFD7ED558CCD)
_BYTE, _HALF, _U16, _SHIFT = np.uint64(8), np.uint64(32), np.uint64(16), np.uint64(29)
_LOW16, _LOW32, _ZERO = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF), np.uint64(0)


class Words(NamedTuple):
    """Open-addressing table of words and pieces with their ids.

    Attributes:
        slots: uint64 [4 S], S a power of two, in fours: bytes 0-7; bytes 8-15 (of more than 16: hash of all from 8 on); length,
            number of ids (16 bits each) and place in `letters` (32 bits); up to two ids, or where they begin in `ids`.
            Length 0 is an empty slot.
        letters: uint8, the bytes of words of more than 16, so that two words with one hash are told apart.
        ids: int32, the ids of words of more than two.
        fill: int64 [4]: words, bytes of `letters`, items of `ids` in use; and 1 if a word found no room.
    """

    slots: np.ndarray
    letters: np.ndarray
    ids: np.ndarray
    fill: np.ndarray


@inlined
def append(first: Scalar, second: Scalar, place: int, byte: Scalar) -> tuple[Scalar, Scalar]:
    """The first two columns of a slot, with the byte at `place` of the word taken in."""
    if place < 8:
        return first | (np.uint64(byte) << (_BYTE * np.uint64(place))), second
    if place < 16:
        return first, second | (np.uint64(byte) << (_BYTE * np.uint64(place - 8)))
    return first, (second ^ (second >> _SHIFT) ^ np.uint64(byte)) * _C0


@inlined
def keys(text: np.ndarray, begin: Scalar, end: Scalar, fold: Scalar) -> tuple[Scalar, Scalar]:
    """The first two columns of a slot, for text[begin:end]."""
    first, second = _ZERO, _ZERO
    for i in range(begin, end):
        first, second = append(first, second, i - begin, text[i] | fold)
    return first, second


@inlined
def _home(first: Scalar, second: Scalar, length: Scalar) -> Scalar:
    mixed = (first * _C0) ^ (second * _C1) ^ length
    mixed = (mixed ^ (mixed >> _HALF)) * _C2
    return np.int64(mixed >> _SHIFT) * 4


@inlined
def find(
    slots: np.ndarray, letters: np.ndarray, text: np.ndarray, begin: Scalar, end: Scalar, fold: Scalar, first: Scalar, second: Scalar
) -> int:
    """Where the slot of text[begin:end] begins in `slots`, or -1 - the beginning of the free slot where it would be."""
    return find_from(slots, letters, text, begin, end, fold, first, second, home(slots, end - begin, first, second))


@inlined
def home(slots: np.ndarray, length: Scalar, first: Scalar, second: Scalar) -> Scalar:
    """Where a word's slot would begin if no other had come before."""
    return _home(first, second, np.uint64(length)) & (len(slots) - 1)


@inlined
def find_from(
    slots: np.ndarray,
    letters: np.ndarray,
    text: np.ndarray,
    begin: Scalar,
    end: Scalar,
    fold: Scalar,
    first: Scalar,
    second: Scalar,
    slot: Scalar,
) -> int:
    """The same from the word's `home` on."""
    mask = len(slots) - 1
    length = np.uint64(end - begin)
    while True:
        meta = slots[slot + 2]
        if slots[slot] == first and slots[slot + 1] == second and meta & _LOW16 == length:
            if end - begin <= 16 or _same(letters, np.int64(meta >> _HALF), text, begin, end, fold):
                return slot
        elif meta == _ZERO:
            return -1 - slot
        slot = (slot + 4) & mask


@compiled
def _same(letters: np.ndarray, place: Scalar, text: np.ndarray, begin: Scalar, end: Scalar, fold: Scalar) -> Scalar:
    for i in range(end - begin):  # noqa: SIM110 - numba compiles no generator
        if letters[place + i] != (text[begin + i] | fold):
            return False
    return True


@compiled
def insert(
    words: Words,
    text: np.ndarray,
    begin: Scalar,
    end: Scalar,
    fold: Scalar,
    slot: Scalar,
    first: Scalar,
    second: Scalar,
    ids: np.ndarray,
    count: int,
) -> None:
    """Put text[begin:end] with ids[:count] into the free `slot`, if there is room; else say so in `fill`."""
    length = end - begin
    letters = length if length > 16 else 0
    listed = count if 2 < count < UNSAFE else 0
    fill = words.fill
    if (fill[0] + 1) * 8 > len(words.slots) or fill[1] + letters > len(words.letters) or fill[2] + listed > len(words.ids):
        fill[3] = 1
        return
    for i in range(letters):
        words.letters[fill[1] + i] = text[begin + i] | fold
    payload = np.uint64(fill[2])
    if listed:
        for i in range(count):
            words.ids[fill[2] + i] = ids[i]
    elif count == 1:
        payload = np.uint64(ids[0])
    elif count == 2:
        payload = np.uint64(ids[0]) | (np.uint64(ids[1]) << _HALF)
    words.slots[slot] = first
    words.slots[slot + 1] = second
    words.slots[slot + 2] = np.uint64(length) | (np.uint64(count) << _U16) | (np.uint64(fill[1]) << _HALF)
    words.slots[slot + 3] = payload
    fill[0] += 1
    fill[1] += letters
    fill[2] += listed


@inlined
def copy_ids(slots: np.ndarray, listed: np.ndarray, slot: Scalar, rows: np.ndarray, row: int, count: int) -> Scalar:
    """Append a known word's ids to rows[row], as far as there is room; the new number of ids, or SLOW."""
    number = np.int64((slots[slot + 2] >> _U16) & _LOW16)
    payload = slots[slot + 3]
    limit = rows.shape[1]
    if number <= 2 and count + 2 <= limit:
        # Both are written, whether or not the second counts: that is cheaper than to ask.
        rows[row, count] = np.int32(payload & _LOW32)
        rows[row, count + 1] = np.int32(payload >> _HALF)
        return count + number
    if number == UNSAFE:
        return SLOW
    for i in range(min(number, limit - count)):
        if number > 2:
            rows[row, count + i] = listed[np.int64(payload) + i]
        else:
            rows[row, count + i] = np.int32((payload >> (_HALF * np.uint64(i))) & _LOW32)
    return min(count + number, limit)


@njit(nogil=True, cache=True)
def rehash(old: np.ndarray, new: np.ndarray) -> None:
    """Copy all slots of `old`, uint64 [4 S], into the empty slots of `new`, uint64 [4 S']."""
    mask = len(new) - 1
    for source in range(0, len(old), 4):
        if old[source + 2] != _ZERO:
            slot = _home(old[source], old[source + 1], old[source + 2] & _LOW16) & mask
            while new[slot + 2] != _ZERO:
                slot = (slot + 4) & mask
            for column in range(4):
                new[slot + column] = old[source + column]
