"""The compiled part of the fast path: UTF-8 bytes of captions to token ids, without a Python object for a caption.

    bytes -> plain ASCII?  -> words by CLIP's pattern, case folded -> table of known words -> ids
                    |                                 a new word -> byte-pair merges, once -> into the table
                    no     -> pieces between white space: plain ones as above, the others whole from the table;
                              a piece that is not there is noted as missing, for `labels.tokenizers.fastwords` to clean and add

Shapes: B bytes of text, R captions (rows) of a block, L ids a caption at most.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from labels.files import fingerprint_of_sources
from labels.tokenizers.kernels.table import SLOW, UNSAFE, WAITING, Scalar, Words, find, find_from, insert, keys
from labels.tokenizers.kernels.wordjit import compiled, inlined
from labels.tokenizers.kernels.wordmerge import MAX_WORD_BYTES, Merges, merge
from labels.tokenizers.kernels.wordqueue import KEEP, PIECE, QUEUED_WORDS, enqueue, new_queue, queued, resolve_known
from labels.tokenizers.kernels.wordsplit import is_space, next_word, survey

# A longer piece makes its caption slow: it hardly ever comes twice.
_MAX_PIECE_BYTES = 1024
# Captions that are queued together.
_GROUP = 8


@inlined
def _queue_plain(
    slots: np.ndarray, text: np.ndarray, at: Scalar, end: Scalar, queue: np.ndarray, size: Scalar, room: Scalar
) -> tuple[Scalar, Scalar]:
    """Queue the words of plain ASCII (printable and white space); where it stopped (`end`, or there was no room), and the new size."""
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
    slots: np.ndarray, text: np.ndarray, at: Scalar, end: Scalar, queue: np.ndarray, size: Scalar, room: Scalar
) -> tuple[Scalar, Scalar]:
    """The same for a caption beyond plain ASCII: of each piece that is, the whole; SLOW instead of a place if one is too long."""
    while at < end and size < room:
        odd = at
        while odd < end and text[odd] < 0x80 and text[odd] != 0x26:
            odd += 1
        start = odd
        if odd < end:
            while start > at and not is_space(text[start - 1]):
                start -= 1
        if start > at:
            # All plain pieces up to the odd one together: most of such a caption is plain.
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
    text: np.ndarray,
    queue: np.ndarray,
    item: Scalar,
    last: Scalar,
    rows: np.ndarray,
    row: Scalar,
    count: Scalar,
    missing: np.ndarray,
    missed: Scalar,
) -> tuple[Scalar, Scalar]:
    """Append the ids of queue[item:last] to rows[row], learning unknown words; the number of ids, or SLOW, and of missing pieces."""
    slots, letters, listed, limit = words.slots, words.letters, words.ids, rows.shape[1]
    while True:
        item, count, missed = resolve_known(slots, letters, listed, text, queue, item, last, rows, row, count, missing, missed)
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
    words: Words, merges: Merges, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, out: np.ndarray, counts: np.ndarray,
    missing: np.ndarray, queue: np.ndarray, group: np.ndarray,
) -> Scalar:  # fmt: skip
    """Encode some captions of a block.

    Args:
        words: table, extended on the way.
        merges: byte-pair merges.
        text: uint8 [B].
        offsets: int64 [R + 1], the captions of the block in `text`.
        pending: int64, which of them to encode.
        out: int32 [R, L], where the ids of a caption go.
        counts: int64 [R], the number of ids of a caption, WAITING or SLOW.
        missing: int64 [M, 2], room for the begin and end of pieces that are not in the table.
        queue: of _GROUP + 1 captions.
        group: int64 [3, _GROUP], scratch.

    Returns:
        the number of missing pieces.
    """
    slots, missed = words.slots, 0
    # Of each caption of a group: whether it is plain, how far it is queued, where its words end in the queue.
    kinds, places, ends = group[0], group[1], group[2]
    for start in range(0, len(pending), _GROUP):
        captions, size = min(_GROUP, len(pending) - start), 0
        for number in range(captions):
            row = pending[start + number]
            at, end = offsets[row], offsets[row + 1]
            kinds[number] = survey(text, at, end)
            if kinds[number] == 0:
                places[number], size = _queue_plain(slots, text, at, end, queue, size, size + QUEUED_WORDS)
            elif kinds[number] == 1:
                places[number], size = _queue_mixed(slots, text, at, end, queue, size, size + QUEUED_WORDS)
            ends[number] = size
        item = 0
        for number in range(captions):
            row = pending[start + number]
            at, end, before, count = places[number], offsets[row + 1], missed, 0
            if kinds[number] != SLOW:
                count, missed = _resolve(words, merges, text, queue, item, ends[number], out, row, 0, missing, missed)
            item = ends[number]
            # What the queue had no room for: long captions.
            while kinds[number] != SLOW and at != SLOW and at < end and count != SLOW and (kinds[number] == 1 or count < out.shape[1]):
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
    text: np.ndarray,
    pieces: np.ndarray,
    first_word: np.ndarray,
    word_ends: np.ndarray,
    safe: np.ndarray,
    ids: np.ndarray,
) -> None:
    """Add pieces with the ids of the words they clean to.

    Args:
        text: uint8 [B]: for each piece its own bytes, then those of its words.
        pieces: int64 [P, 2], begin and end of the pieces in `text`.
        first_word: int64 [P + 1], the words of a piece within `word_ends`.
        word_ends: int64 [W], the end of each word in `text`; it begins where the one before, or the piece, ends.
        safe: bool [P]; captions with an unsafe piece belong to the slow path.
        ids: int64 [UNSAFE], scratch.
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
            count = merge(merges, text, at, word_ends[word], np.uint8(0))
            for i in range(count):
                ids[number + i] = merges.scratch[0, i]
            number += count
            at = word_ends[word]
        first, second = keys(text, begin, end, np.uint8(0))
        slot = find(words.slots, words.letters, text, begin, end, np.uint8(0), first, second)
        if slot < 0:
            insert(words, text, begin, end, np.uint8(0), -1 - slot, first, second, ids, number)


def _compiled_once(sources: str) -> tuple[Callable[..., int], Callable[..., None]]:
    """The entry points, kept as machine code in __pycache__ for later processes; why they enclose `sources`, labels/files.py says."""

    @njit(nogil=True, cache=True)
    def encode_block(words, merges, text, offsets, rows, out, counts, missing):  # noqa: ANN202 - numba infers it
        _ = sources
        queue, group = new_queue(_GROUP + 1), np.empty((3, _GROUP), np.int64)
        return _encode_block(words, merges, text, offsets, rows, out, counts, missing, queue, group)

    @njit(nogil=True, cache=True)
    def add_pieces(words, merges, text, pieces, first_word, word_ends, safe):  # noqa: ANN202
        _ = sources
        _add_pieces(words, merges, text, pieces, first_word, word_ends, safe, np.empty(UNSAFE, np.int64))

    return encode_block, add_pieces


FILES = ("wordbits.py", "wordjit.py", "words.py", "wordmerge.py", "wordqueue.py", "wordsplit.py", "table.py")
encode_block, add_pieces = _compiled_once(fingerprint_of_sources(__file__, FILES))
