"""CLIP's compiled fast path: UTF-8 bytes of captions to token ids, without a Python object per caption.

    plain ASCII -> words by CLIP's pattern, case folded -> table of known words -> ids
                                     a new word -> byte-pair merges, once -> into the table
    other text  -> pieces between white space: plain ones as above, the others whole from the table;
                   a missing piece is reported, and `kinds.clip.FastWords` cleans, splits and adds it

Shapes: B bytes of text, R captions (rows) of a block, L ids a caption at most.
"""

from typing import NamedTuple

import numpy as np

from labels.native import njit
from labels.tokenizers.kernels.table import (
    FOLD,
    KEEP,
    PIECE,
    QUEUED_WORDS,
    SLOW,
    UNSAFE,
    WAITING,
    Array,
    Scalar,
    Words,
    append,
    compiled,
    enqueue,
    find,
    find_from,
    inlined,
    insert,
    keys,
    leading_letters,
    lowest_bytes,
    new_queue,
    queued,
    resolve_known,
)

# ftfy splits longer text into segments of a million characters, at any character.
_MAX_CAPTION_BYTES = 1_000_000
_CASE, _A, _LETTERS = np.uint32(0x20), np.uint32(ord("a")), np.uint32(26)
# A longer word or piece makes its caption slow: merging takes quadratic time, and it hardly ever repeats.
MAX_WORD_BYTES = 128
_MAX_PIECE_BYTES = 1024
_GROUP = 8  # captions that are queued together
_MIX, _HALF, _SHIFT, _ZERO = np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(29), np.uint64(0)


@inlined
def is_letter(byte: Scalar) -> Scalar:
    return np.uint8((byte | 0x20) - 97) < 26


@inlined
def is_digit(byte: Scalar) -> Scalar:
    return np.uint8(byte - 48) < 10


@inlined
def is_space(byte: Scalar) -> Scalar:
    """White space that ftfy keeps; it deletes other control characters."""
    return byte == 0x20 or byte == 0x0A or byte == 0x0D or byte == 0x09 or byte == 0x0C


@compiled
def contraction(text: Array, begin: Scalar, end: Scalar) -> int:
    """Length of 's 't 're 've 'm 'll 'd at `begin`, in any case; 0 if there is none."""
    if text[begin] != 0x27 or begin + 1 == end:
        return 0
    first = text[begin + 1] | 0x20
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return 2
    if begin + 2 == end:
        return 0
    second = text[begin + 2] | 0x20
    pair = ((first == ord("r") or first == ord("v")) and second == ord("e")) or (
        first == ord("l") and second == ord("l")
    )
    return 3 if pair else 0


@inlined
def scan_letters(text: Array, begin: Scalar, end: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The end of the ASCII letters from `begin` on, and the first two columns of a slot for them."""
    if begin + 16 > len(text):
        return _scan_each(text, begin, begin, end, _ZERO, _ZERO)
    count, first = leading_letters(text, begin)
    second = _ZERO
    if count == 8:
        more, second = leading_letters(text, begin + 8)
        count += more
    if begin + count > end:
        # The next caption begins with letters.
        if end - begin < 8:
            return end, lowest_bytes(first, end - begin), _ZERO
        return end, first, lowest_bytes(second, end - begin - 8)
    if count == 16:
        return _scan_each(text, begin, begin + 16, end, first, second)
    return begin + count, first, second


@compiled
def _scan_each(
    text: Array, begin: Scalar, at: Scalar, end: Scalar, first: Scalar, second: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """`scan_letters` byte by byte from `at` on: at the end of the text or the caption, and in long words."""
    while at < end:
        byte = np.uint32(text[at]) | _CASE
        if np.uint32(byte - _A) >= _LETTERS:
            break
        first, second = append(first, second, at - begin, byte)
        at += 1
    return at, first, second


@inlined
def next_word(text: Array, at: Scalar, end: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The end of the word that begins at `at`, the bit to fold its case with, and its keys."""
    stop, first, second = scan_letters(text, at, end)
    if stop > at:
        return stop, FOLD, first, second
    stop, first = at + 1, np.uint64(text[at])
    if is_digit(text[at]):
        return stop, KEEP, first, second
    short = contraction(text, at, end)
    if short:
        # An apostrophe has bit 0x20, so folding keeps it.
        first, second = keys(text, at, at + short, FOLD)
        return at + short, FOLD, first, second
    while stop < end and text[stop] > 0x20 and not is_letter(text[stop]) and not is_digit(text[stop]):
        first, second = append(first, second, stop - at, text[stop])
        stop += 1
    return stop, KEEP, first, second


@inlined
def survey(text: Array, begin: Scalar, end: Scalar) -> int:
    """0: plain ASCII; 1: to be encoded piece by piece; SLOW: control characters, or both `&` and `<`."""
    control, beyond, entity, tag = False, False, False, False
    for i in range(begin, end):
        byte = text[i]
        control |= (byte < 0x20) & (byte != 0x0A) & (byte != 0x0D) & (byte != 0x09) & (byte != 0x0C)
        control |= byte == 0x7F
        beyond |= byte >= 0x80
        entity |= byte == 0x26
        tag |= byte == 0x3C
    # ftfy takes text with a `<` for HTML, and then skips its entities.
    if control or (entity and tag) or end - begin > _MAX_CAPTION_BYTES:
        return SLOW
    return 1 if beyond or entity else 0


class Merges(NamedTuple):
    """Byte-pair merges."""

    inner: Array  # int32 [256], id of a byte inside a word
    last: Array  # int32 [256], id of a byte at the end of a word
    single: Array  # int32 [256], id of a byte that is a whole word; -1 for a word that is dropped
    pairs: Array  # uint64, open-addressing keys (left id + 1) << 32 | right id; 0 is an empty slot
    ranks: Array  # int64, one for each of `pairs`: rank << 32 | id of the merged symbol
    scratch: Array  # int64 [2, MAX_WORD_BYTES], symbols of a word, and the `_rank` of each with the next


@njit(nogil=True, cache=True)
def add_pairs(merges: Merges, left: Array, right: Array, values: Array) -> None:
    """Fill the table of merges from int64 [M] arrays: left id, right id, rank << 32 | merged id."""
    mask = len(merges.pairs) - 1
    for position in range(len(left)):
        key = (np.uint64(left[position] + 1) << _HALF) | np.uint64(right[position])
        slot = np.int64((key * _MIX) >> _SHIFT) & mask
        while merges.pairs[slot] != _ZERO:
            slot = (slot + 1) & mask
        merges.pairs[slot] = key
        merges.ranks[slot] = values[position]


@compiled
def _rank(merges: Merges, left: int, right: int) -> Scalar:
    """rank << 32 | merged id, or a number above all of these."""
    mask = len(merges.pairs) - 1
    key = (np.uint64(left + 1) << _HALF) | np.uint64(right)
    slot = np.int64((key * _MIX) >> _SHIFT) & mask
    while merges.pairs[slot] != _ZERO:
        if merges.pairs[slot] == key:
            return merges.ranks[slot]
        slot = (slot + 1) & mask
    return np.int64(1) << 62


@compiled
def merge(merges: Merges, text: Array, begin: Scalar, end: Scalar, fold: Scalar) -> Scalar:
    """Byte-pair encoding of text[begin:end] into merges.scratch[0]; -> the number of ids."""
    count = end - begin
    symbols, ranks = merges.scratch[0], merges.scratch[1]
    for i in range(count):
        symbols[i] = merges.inner[text[begin + i] | fold]
    symbols[count - 1] = merges.last[text[end - 1] | fold]
    for i in range(count - 1):
        ranks[i] = _rank(merges, symbols[i], symbols[i + 1])
    while count > 1:
        best = 0
        for i in range(1, count - 1):
            if ranks[i] < ranks[best]:
                best = i
        if ranks[best] >> 62:
            break
        symbols[best] = ranks[best] & 0xFFFFFFFF
        count -= 1
        for i in range(best + 1, count):
            symbols[i] = symbols[i + 1]
        for i in range(best, count - 1):
            ranks[i] = ranks[i + 1]
        if best > 0:
            ranks[best - 1] = _rank(merges, symbols[best - 1], symbols[best])
        if best < count - 1:
            ranks[best] = _rank(merges, symbols[best], symbols[best + 1])
    return count


@inlined
def _queue_plain(
    slots: Array, text: Array, at: Scalar, end: Scalar, queue: Array, size: Scalar, room: Scalar
) -> tuple[Scalar, Scalar]:
    """Queue the words of plain ASCII; -> where it stopped (`end`, or the queue is full); the new size."""
    while at < end and size < room:
        if text[at] <= 0x20:
            at += 1
            continue
        stop, fold, first, second = next_word(text, at, end)
        size = enqueue(slots, queue, size, at, stop, fold, first, second)
        at = stop
    return at, size


@compiled
def _queue_mixed(
    slots: Array, text: Array, at: Scalar, end: Scalar, queue: Array, size: Scalar, room: Scalar
) -> tuple[Scalar, Scalar]:
    """`_queue_plain` for other text, whose odd pieces are queued whole; SLOW instead of a position: one is too long."""
    while at < end and size < room:
        odd = at
        while odd < end and text[odd] < 0x80 and text[odd] != 0x26:
            odd += 1
        start = odd
        if odd < end:
            while start > at and not is_space(text[start - 1]):
                start -= 1
        if start > at:
            # All plain pieces before the odd one together: most of such a caption is plain.
            at, size = _queue_plain(slots, text, at, start, queue, size, room)
            continue
        stop = odd
        while stop < end and not is_space(text[stop]):
            stop += 1
        if stop - start > _MAX_PIECE_BYTES:
            return SLOW, size
        first, second = keys(text, start, stop, KEEP)
        size = enqueue(slots, queue, size, start, stop, PIECE, first, second)
        at = stop
        while at < end and is_space(text[at]):
            at += 1
    return at, size


@compiled
def _resolve(
    words: Words,
    merges: Merges,
    text: Array,
    queue: Array,
    item: Scalar,
    last: Scalar,
    rows: Array,
    row: Scalar,
    count: Scalar,
    missing: Array,
    missed: Scalar,
) -> tuple[Scalar, Scalar]:
    """Append the ids of queue[item:last] to rows[row] and unknown words to the table; -> ids, or SLOW; `missed`."""
    slots, letters, listed, limit = words.slots, words.letters, words.ids, rows.shape[1]
    while True:
        item, count, missed = resolve_known(
            slots, letters, listed, text, queue, item, last, rows, row, count, missing, missed
        )
        if count == SLOW or item == last:
            return count, missed
        begin, end, fold, first, second, start = queued(queue, item)
        if end - begin > MAX_WORD_BYTES:
            return SLOW, missed
        slot = -1 - find_from(slots, letters, text, begin, end, fold, first, second, start)
        number = merge(merges, text, begin, end, fold)
        if end - begin == 1:
            merges.scratch[0, 0] = merges.single[text[begin] | fold]
            number = np.int64(merges.scratch[0, 0] >= 0)
        insert(words, text, begin, end, fold, slot, first, second, merges.scratch[0], number)  # pyright: ignore[reportArgumentType]
        for i in range(min(number, limit - count)):
            rows[row, count + i] = merges.scratch[0, i]
        count = min(count + number, limit)
        item += 1


@compiled
def _encode_block(
    words: Words,
    merges: Merges,
    text: Array,
    offsets: Array,
    pending: Array,
    out: Array,
    counts: Array,
    missing: Array,
    queue: Array,
    group: Array,
) -> Scalar:
    """Encode the captions `pending` of a block: text uint8 [B], offsets int64 [R + 1]; extend the table `words`.

    Fills out int32 [R, L] with ids, counts int64 [R] with their numbers, WAITING or SLOW, and missing int64 [M, 2] with
    begin and end of unknown pieces; -> their number. `queue`: of _GROUP + 1 captions; `group`: int64 [3, _GROUP].
    """
    slots, missed = words.slots, 0
    # Of each caption of a group: its `survey`, the position where queueing stopped, the end of its words in the queue.
    kinds, stops, ends = group[0], group[1], group[2]
    for start in range(0, len(pending), _GROUP):
        captions, size = min(_GROUP, len(pending) - start), 0
        for number in range(captions):
            row = pending[start + number]
            at, end = offsets[row], offsets[row + 1]
            kinds[number] = survey(text, at, end)
            if kinds[number] == 0:
                stops[number], size = _queue_plain(slots, text, at, end, queue, size, size + QUEUED_WORDS)
            elif kinds[number] == 1:
                stops[number], size = _queue_mixed(slots, text, at, end, queue, size, size + QUEUED_WORDS)
            ends[number] = size
        item = 0
        for number in range(captions):
            row = pending[start + number]
            at, end, before, count = stops[number], offsets[row + 1], missed, 0
            if kinds[number] != SLOW:
                count, missed = _resolve(words, merges, text, queue, item, ends[number], out, row, 0, missing, missed)
            item = ends[number]
            # The rest of long captions.
            while (
                kinds[number] != SLOW
                and at != SLOW
                and at < end
                and count != SLOW
                and (kinds[number] == 1 or count < out.shape[1])
            ):
                if kinds[number] == 0:
                    at, last = _queue_plain(slots, text, at, end, queue, size, size + QUEUED_WORDS)
                else:
                    at, last = _queue_mixed(slots, text, at, end, queue, size, size + QUEUED_WORDS)
                count, missed = _resolve(words, merges, text, queue, size, last, out, row, count, missing, missed)
            if kinds[number] == SLOW or at == SLOW or count == SLOW:
                counts[row] = SLOW
            else:
                counts[row] = WAITING if missed > before else count
    return missed


@compiled
def _add_pieces(
    words: Words,
    merges: Merges,
    text: Array,
    pieces: Array,
    first_word: Array,
    word_ends: Array,
    safe: Array,
    ids: Array,
) -> None:
    """Add pieces with the ids of their words after cleaning.

    text uint8 [B]: of each piece its bytes, pieces int64 [P, 2], then its words: numbers from first_word int64 [P + 1],
    ends in word_ends int64 [W]. safe bool [P]: captions with an unsafe piece are slow. ids: int64 [UNSAFE], scratch.
    """
    for piece in range(len(pieces)):
        begin, end = pieces[piece, 0], pieces[piece, 1]
        number = 0 if safe[piece] else UNSAFE
        at = end
        for word in range(first_word[piece], first_word[piece + 1]):
            length = word_ends[word] - at
            if length > MAX_WORD_BYTES or number + length >= UNSAFE:
                number = UNSAFE
                break
            count = merge(merges, text, at, word_ends[word], KEEP)
            for i in range(count):
                ids[number + i] = merges.scratch[0, i]
            number += count
            at = word_ends[word]
        first, second = keys(text, begin, end, KEEP)
        slot = find(words.slots, words.letters, text, begin, end, KEEP, first, second)
        if slot < 0:
            insert(words, text, begin, end, KEEP, -1 - slot, first, second, ids, number)


@njit(nogil=True, cache=True)
def encode_block(
    words: Words, merges: Merges, text: Array, offsets: Array, pending: Array, out: Array, counts: Array, missing: Array
) -> int:
    """`_encode_block` with a queue; this and the next function are the entry points, which may make arrays."""
    queue, group = new_queue(_GROUP + 1), np.empty((3, _GROUP), np.int64)
    return _encode_block(words, merges, text, offsets, pending, out, counts, missing, queue, group)


@njit(nogil=True, cache=True)
def add_pieces(
    words: Words, merges: Merges, text: Array, pieces: Array, first_word: Array, word_ends: Array, safe: Array
) -> None:
    """`_add_pieces` with room for the ids of a piece."""
    _add_pieces(words, merges, text, pieces, first_word, word_ends, safe, np.empty(UNSAFE, np.int64))
