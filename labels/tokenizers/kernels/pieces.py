"""Compiled fast path of all tokenizers but CLIP's: whole pieces between spaces, looked up in the table.

Shapes: B bytes of text, R captions (rows) of a block, L ids a caption at most, P pieces.
"""

import numpy as np

from labels.native import njit
from labels.tokenizers.kernels.table import (
    KEEP,
    PIECE,
    QUEUED_WORDS,
    SLOW,
    WAITING,
    Array,
    Scalar,
    Words,
    append,
    compiled,
    enqueue,
    find,
    insert,
    keys,
    new_queue,
    resolve_known,
)

# Flags of a block. JOINED: a piece is looked up with the space before it, if there is one. STRICT: a caption with a
# space at its beginning, its end or next to another is slow. RUNS: it is not, but surplus spaces are a piece: all at
# the end of a caption, all but the last one elsewhere. MARKUP: a caption with both `&` and `<`, or longer than ftfy
# processes at once, is slow.
JOINED, STRICT, RUNS, MARKUP = 1, 2, 4, 8
# A longer piece makes its caption slow: it hardly ever repeats.
MAX_PIECE_BYTES = 256

_MAX_CLEANED_BYTES = 1_000_000
_SPACE, _NONE = np.uint64(0x20), np.uint64(0)


@compiled
def _marked_up(text: Array, begin: Scalar, end: Scalar) -> Scalar:
    entity, tag = False, False
    for i in range(begin, end):
        entity |= text[i] == 0x26
        tag |= text[i] == 0x3C
    return (entity and tag) or end - begin > _MAX_CLEANED_BYTES


@compiled
def _queue_pieces(
    slots: Array, text: Array, begin: Scalar, at: Scalar, end: Scalar, flags: Scalar, queue: Array
) -> tuple[Scalar, Scalar]:
    """Queue the pieces of the caption text[begin:end] from `at` on; -> where the queue was full, or SLOW; its size."""
    size = 0
    while at < end and size < QUEUED_WORDS:
        after = at
        while after < end and text[after] == 0x20:
            after += 1
        run = at
        if after - at > (at > begin) or after == end:
            if flags & RUNS:
                run = end if after == end else after - 1
            elif flags & STRICT:
                return SLOW, size
            elif after == end:
                return end, size
        first, second = _NONE, _NONE
        if run > at:
            start, stop = at, run
            first, second = keys(text, start, stop, KEEP)
        else:
            start = after
            if flags & JOINED and after > at:
                first, start = _SPACE, after - 1
            stop = after
            while stop < end and text[stop] != 0x20:
                first, second = append(first, second, stop - start, text[stop])
                stop += 1
        if stop - start > MAX_PIECE_BYTES:
            return SLOW, size
        size = enqueue(slots, queue, size, start, stop, PIECE, first, second)
        at = stop
    return at, size


@compiled
def _encode_caption(
    words: Words,
    text: Array,
    begin: Scalar,
    end: Scalar,
    flags: Scalar,
    queue: Array,
    rows: Array,
    row: Scalar,
    missing: Array,
    missed: Scalar,
) -> tuple[Scalar, Scalar]:
    """One caption; -> the number of ids, WAITING or SLOW; the new number of missing pieces."""
    count, at, before = 0, begin, missed
    while at < end:
        at, size = _queue_pieces(words.slots, text, begin, at, end, flags, queue)
        if at == SLOW:
            return SLOW, missed
        _, count, missed = resolve_known(
            words.slots, words.letters, words.ids, text, queue, 0, size, rows, row, count, missing, missed
        )
        if count == SLOW:
            return SLOW, missed
    return (WAITING if missed > before else count), missed


@njit(nogil=True, cache=True)
def encode_pieces(
    words: Words, text: Array, offsets: Array, pending: Array, flags: int, out: Array, counts: Array, missing: Array
) -> int:
    """Encode the captions `pending` of a block into out int32 [R, L], counts int64 [R]; -> number of missing pieces."""
    missed, queue = 0, new_queue(1)
    for row in pending:
        begin, end = offsets[row], offsets[row + 1]
        if flags & MARKUP and _marked_up(text, begin, end):
            counts[row] = SLOW
        else:
            counts[row], missed = _encode_caption(words, text, begin, end, flags, queue, out, row, missing, missed)
    return missed


@njit(nogil=True, cache=True)
def add_known(words: Words, text: Array, ends: Array, ids: Array, id_ends: Array, unsafe: Array) -> None:
    """Add P pieces: text uint8 [B], ends int64 [P]; ids int64, id_ends int64 [P]; unsafe int64 [P], 0 or UNSAFE."""
    begin, first_id = 0, 0
    for piece in range(len(ends)):
        end, last_id = ends[piece], id_ends[piece]
        first, second = keys(text, begin, end, KEEP)
        slot = find(words.slots, words.letters, text, begin, end, KEEP, first, second)
        if slot < 0:
            number = max(last_id - first_id, unsafe[piece])
            insert(words, text, begin, end, KEEP, -1 - slot, first, second, ids[first_id:last_id], number)
        begin, first_id = end, last_id
