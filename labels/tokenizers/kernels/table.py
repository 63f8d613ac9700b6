"""The table of known words of all compiled paths, the queue of look-ups, and their intrinsics.

    a word's bytes -> `keys`: two columns of 64 bits -> `home`: its first slot -> `enqueue`: prefetch of that slot
    -> `resolve_known`: compare the bytes -> append the word's ids to the row, or report the word as missing

The table is open addressing over the words' own bytes, so that a look-up is exact and makes no object. The words of
several captions are queued before the first is resolved, so that the cache misses overlap.

Shapes: B bytes of text, S slots, Q queued words, M missing pieces, R captions (rows), L ids a caption at most.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from labels.native import njit

# A NumPy or Python number: they are the same to the compiler, but not to a type checker.
Scalar = Any
Array = np.ndarray

# numba updates an atomic reference count for every array argument, inlined or not: 80% of the time of a look-up.
# These functions make and return no arrays, so they do without (numba/core/options.py has this underscored option since
# numba has a runtime).
_BORROWING: dict[str, Any] = {"nogil": True, "_nrt": False}
compiled = njit(**_BORROWING)
inlined = njit(forceinline=True, **_BORROWING)

# Instead of a number of ids: captions that wait for unknown pieces; captions, and pieces, for the slow path.
WAITING, SLOW = -1, -2
UNSAFE = 0xFFFF

_C0, _C1, _C2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xFF51AFD7ED558CCD)
_BYTE, _HALF, _U16, _SHIFT = np.uint64(8), np.uint64(32), np.uint64(16), np.uint64(29)
_LOW16, _LOW32, _ZERO = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF), np.uint64(0)
# Kind of a queued word: how its case is folded, or a whole piece, which Python encodes if it is missing.
KEEP, FOLD, PIECE = np.uint8(0), np.uint8(0x20), np.uint8(1)
QUEUED_WORDS = 32  # of one caption at once
_FIELDS = 6  # of a queued word: first and second column of its slot, begin, end, kind, home

_ONES, _HIGH = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_CASE = np.uint64(0x2020202020202020)
# Added to a byte below 0x80, these set its high bit from `a` on, and beyond `z`.
_FROM_A, _BEYOND_Z = np.uint64(0x80 - ord("a")) * _ONES, np.uint64(0x80 - ord("z") - 1) * _ONES
_EIGHT, _FULL, _THREE = np.uint64(8), np.uint64(64), np.uint64(3)


@intrinsic
def load(typingctx: Any, text: Any, at: Any) -> Any:
    """text[at : at + 8] as one number, the first byte lowest; without a check of bounds."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = cgutils.pointer_add(builder, array.data, arguments[1])
        number = builder.load(builder.bitcast(address, ir.IntType(64).as_pointer()))
        number.align = 1
        return number

    return types.uint64(text, types.int64), emit


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Prefetch the cache line of array[at]; without a check of bounds."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def _trailing_zeros(typingctx: Any, value: Any) -> Any:
    """Number of zero bits below the lowest that is set; 64 of 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), emit


@intrinsic
def ones(typingctx: Any, value: Any) -> Any:
    """Number of bits that are set."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), emit


def _comparing(relation: str) -> Any:
    vector = ir.VectorType(ir.IntType(32), 16)

    @intrinsic
    def compare(typingctx: Any, numbers: Any, at: Any, number: Any) -> Any:
        """One bit for each of int32 numbers[at : at + 16] that is equal to (less than) `number`, the first lowest."""

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            address = builder.gep(array.data, [arguments[1]])
            loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
            loaded.align = 4
            nothing = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(nothing, arguments[2], ir.Constant(ir.IntType(32), 0))
            same = builder.shuffle_vector(first, nothing, ir.Constant(vector, [0] * 16))
            bits = builder.bitcast(builder.icmp_signed(relation, loaded, same), ir.IntType(16))
            return builder.zext(bits, ir.IntType(64))

        return types.uint64(numbers, types.int64, types.int32), emit

    return compare


equal_16, less_16 = _comparing("=="), _comparing("<")


@inlined
def lowest_bytes(value: Scalar, count: Scalar) -> Scalar:
    """The lowest 0 to 7 bytes of a number."""
    return value & ((np.uint64(1) << (_EIGHT * np.uint64(count))) - np.uint64(1))


@inlined
def leading_letters(text: Array, at: Scalar) -> tuple[Scalar, Scalar]:
    """The number of ASCII letters at the beginning of text[at : at + 8], and these in lower case as one number."""
    # A byte from 0x80 on is no letter; its carry only changes bytes behind it.
    folded = load(text, np.int64(at)) | _CASE  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
    letters = (folded + _FROM_A) & ~(folded + _BEYOND_Z) & _HIGH
    bits = _trailing_zeros(letters ^ _HIGH) & ~(_EIGHT - np.uint64(1))
    kept = folded if bits == _FULL else folded & ((np.uint64(1) << bits) - np.uint64(1))
    return np.int64(bits >> _THREE), kept


class Words(NamedTuple):
    """Open-addressing table of words and pieces with their ids."""

    # uint64 [4 S], S a power of two. Columns of a slot: bytes 0-7; bytes 8-15 (of longer words: hash of all from 8 on);
    # length, number of ids (16 bits each) and offset in `letters` (32 bits); up to two ids, or their offset in `ids`.
    # Length 0 is an empty slot.
    slots: Array
    letters: Array  # uint8, the bytes of words of more than 16, so that words with equal hashes differ
    ids: Array  # int32, the ids of words with more than two
    fill: Array  # int64 [4]: words, bytes of `letters`, items of `ids` in use; and 1 if a word found no room


@inlined
def append(first: Scalar, second: Scalar, position: int, byte: Scalar) -> tuple[Scalar, Scalar]:
    """The first two columns of a slot, with the byte at `position` of the word added."""
    if position < 8:
        return first | (np.uint64(byte) << (_BYTE * np.uint64(position))), second
    if position < 16:
        return first, second | (np.uint64(byte) << (_BYTE * np.uint64(position - 8)))
    return first, (second ^ (second >> _SHIFT) ^ np.uint64(byte)) * _C0


@inlined
def keys(text: Array, begin: Scalar, end: Scalar, fold: Scalar) -> tuple[Scalar, Scalar]:
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
    slots: Array, letters: Array, text: Array, begin: Scalar, end: Scalar, fold: Scalar, first: Scalar, second: Scalar
) -> int:
    """The offset of the slot of text[begin:end] in `slots`; if missing, -1 - the offset of the free slot for it."""
    return find_from(slots, letters, text, begin, end, fold, first, second, home(slots, end - begin, first, second))


@inlined
def home(slots: Array, length: Scalar, first: Scalar, second: Scalar) -> Scalar:
    """The offset of the slot where the search for a word begins."""
    return _home(first, second, np.uint64(length)) & (len(slots) - 1)


@inlined
def find_from(
    slots: Array,
    letters: Array,
    text: Array,
    begin: Scalar,
    end: Scalar,
    fold: Scalar,
    first: Scalar,
    second: Scalar,
    slot: Scalar,
) -> int:
    """`find` from the word's `home` on."""
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
def _same(letters: Array, offset: Scalar, text: Array, begin: Scalar, end: Scalar, fold: Scalar) -> Scalar:
    for i in range(end - begin):  # noqa: SIM110 - numba compiles no generator
        if letters[offset + i] != (text[begin + i] | fold):
            return False
    return True


@compiled
def insert(
    words: Words,
    text: Array,
    begin: Scalar,
    end: Scalar,
    fold: Scalar,
    slot: Scalar,
    first: Scalar,
    second: Scalar,
    ids: Array,
    count: int,
) -> None:
    """Put text[begin:end] with ids[:count] into the free `slot`; if there is no room, set fill[3]."""
    length = end - begin
    letters = length if length > 16 else 0
    listed = count if 2 < count < UNSAFE else 0
    fill = words.fill
    crowded = (fill[0] + 1) * 8 > len(words.slots)
    if crowded or fill[1] + letters > len(words.letters) or fill[2] + listed > len(words.ids):
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
def copy_ids(slots: Array, listed: Array, slot: Scalar, rows: Array, row: int, count: int) -> Scalar:
    """Append a known word's ids to rows[row], as far as there is room; -> the new number of ids, or SLOW."""
    number = np.int64((slots[slot + 2] >> _U16) & _LOW16)
    payload = slots[slot + 3]
    limit = rows.shape[1]
    if number <= 2 and count + 2 <= limit:
        # Both are written, valid or not: cheaper than a branch.
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
def rehash(old: Array, new: Array) -> None:
    """Copy all slots of `old`, uint64 [4 S], into the empty slots of `new`, uint64 [4 S']."""
    mask = len(new) - 1
    for source in range(0, len(old), 4):
        if old[source + 2] != _ZERO:
            slot = _home(old[source], old[source + 1], old[source + 2] & _LOW16) & mask
            while new[slot + 2] != _ZERO:
                slot = (slot + 4) & mask
            for column in range(4):
                new[slot + column] = old[source + column]


@njit(nogil=True)
def new_queue(captions: int) -> Array:
    """Room for QUEUED_WORDS of each caption: uint64 [_FIELDS Q]."""
    return np.empty(captions * QUEUED_WORDS * _FIELDS, np.uint64)


@inlined
def enqueue(
    slots: Array, queue: Array, size: Scalar, begin: Scalar, end: Scalar, kind: Scalar, first: Scalar, second: Scalar
) -> Scalar:
    """Append text[begin:end] to a queue of `size` words, which must have room; -> the new size."""
    slot = home(slots, end - begin, first, second)
    prefetch(slots, slot)  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
    base = size * _FIELDS
    queue[base], queue[base + 1] = first, second
    queue[base + 2], queue[base + 3] = np.uint64(begin), np.uint64(end)
    queue[base + 4], queue[base + 5] = np.uint64(kind), np.uint64(slot)
    return size + 1


@inlined
def queued(queue: Array, item: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar, Scalar, Scalar]:
    """Begin, end, kind, first and second column, and home of a queued word."""
    base = item * _FIELDS
    begin, end, kind = np.int64(queue[base + 2]), np.int64(queue[base + 3]), np.uint8(queue[base + 4])
    return begin, end, kind, queue[base], queue[base + 1], np.int64(queue[base + 5])


@inlined
def resolve_known(
    slots: Array,
    letters: Array,
    listed: Array,
    text: Array,
    queue: Array,
    item: Scalar,
    last: Scalar,
    rows: Array,
    row: Scalar,
    count: Scalar,
    missing: Array,
    missed: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """Append the ids of queue[item:last], words of one caption, to rows[row], up to the first unknown word.

    Unknown pieces are appended to missing int64 [M, 2] (begin, end). All pieces are looked up, even past the limit:
    one unsafe piece makes the whole caption slow. -> The item where it stopped (`last`, or an unknown word); the new
    number of ids, or SLOW; the new number of missing pieces.
    """
    while item < last:
        begin, end, kind, first, second, slot = queued(queue, item)
        if count < rows.shape[1] or kind == PIECE:
            slot = find_from(slots, letters, text, begin, end, kind & FOLD, first, second, slot)
            if slot >= 0:
                count = copy_ids(slots, listed, slot, rows, row, count)
                if count == SLOW:
                    break
            elif kind != PIECE:
                break
            elif missed == len(missing):
                return item, SLOW, missed
            else:
                missing[missed, 0], missing[missed, 1] = begin, end
                missed += 1
        item += 1
    return item, count, missed
