"""The compiled part of the fast path: UTF-8 bytes of captions to token ids, without a Python object for a caption.

    bytes -> plain ASCII?  -> words by CLIP's pattern, case folded -> table of known words -> ids
                    |                                 a new word -> byte-pair merges, once -> into the table
                    no     -> pieces between white space: plain ones as above, the others whole from the table;
                              a piece that is not there is noted as missing, for `preprocess.tokens.fastwords` to clean and add

Shapes: B bytes of text, R captions (rows) of a block, L ids a caption at most.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from labels.files import fingerprint
from preprocess.tokens.wordmerge import MAX_WORD_BYTES, Merges, merge
from preprocess.tokens.wordsplit import is_space, next_word, survey
from preprocess.tokens.wordtable import SLOW, UNSAFE, WAITING, Scalar, Words, copy_ids, find, insert, keys

# A longer piece makes its caption slow: it hardly ever comes twice.
_MAX_PIECE_BYTES = 1024


@njit(nogil=True, forceinline=True)
def _encode_known(
    slots: np.ndarray,
    letters: np.ndarray,
    listed: np.ndarray,
    single: np.ndarray,
    text: np.ndarray,
    at: Scalar,
    end: Scalar,
    rows: np.ndarray,
    row: int,
    count: Scalar,
) -> tuple[Scalar, Scalar]:
    """Append the ids of plain ASCII (printable and white space) to rows[row], up to the first word that is not in the table.

    The inner loop of all: it takes bare arrays, since counting references to those of a tuple would cost as much again.

    Returns:
        where it stopped (`end`, an unknown word, or anywhere if the row is full), and the new number of ids.
    """
    while at < end and count < rows.shape[1]:
        if text[at] <= 0x20:
            at += 1
            continue
        stop, fold, first, second = next_word(text, at, end)
        if stop == at + 1:
            token = single[text[at] | fold]
            rows[row, count] = token
            count += token >= 0
        else:
            slot = find(slots, letters, text, at, stop, fold, first, second)
            if slot < 0:
                break
            count = copy_ids(slots, listed, slot, rows, row, count)
        at = stop
    return at, count


@njit(nogil=True)
def _encode_plain(
    words: Words, merges: Merges, text: np.ndarray, at: Scalar, end: Scalar, rows: np.ndarray, row: int, count: int
) -> Scalar:
    """Append the ids of plain ASCII to rows[row], learning unknown words; the new number of ids, or SLOW."""
    slots, letters = words.slots, words.letters
    while True:
        at, count = _encode_known(slots, letters, words.ids, merges.single, text, at, end, rows, row, count)
        if at == end or count == rows.shape[1]:
            return count
        stop, fold, first, second = next_word(text, at, end)
        if stop - at > MAX_WORD_BYTES:
            return SLOW
        slot = -1 - find(slots, letters, text, at, stop, fold, first, second)
        number = merge(merges, text, at, stop, fold)
        insert(words, text, at, stop, fold, slot, first, second, merges.scratch[0], number)
        for i in range(min(number, rows.shape[1] - count)):
            rows[row, count + i] = merges.scratch[0, i]
        count = min(count + number, rows.shape[1])
        at = stop


@njit(nogil=True)
def _encode_mixed(
    words: Words, merges: Merges, text: np.ndarray, begin: Scalar, end: Scalar, rows: np.ndarray, row: int, missing: np.ndarray, missed: int
) -> tuple[Scalar, Scalar]:
    """A caption beyond plain ASCII, piece by piece.

    Every piece is looked at, even past the limit: one unsafe piece changes how ftfy reads the whole caption.
    Missing pieces are appended to missing int64 [M, 2] (begin, end).

    Returns:
        the number of ids, WAITING or SLOW; and the new number of missing pieces.
    """
    slots, letters = words.slots, words.letters
    count, waiting, at = 0, False, begin
    while at < end:
        odd = at
        while odd < end and text[odd] < 0x80 and text[odd] != 0x26:
            odd += 1
        start = odd
        if odd < end:
            while start > at and not is_space(text[start - 1]):
                start -= 1
        if start > at:
            # All plain pieces up to the odd one together: most of such a caption is plain.
            count = _encode_plain(words, merges, text, at, start, rows, row, count)
            if count == SLOW or odd == end:
                return (WAITING if waiting and count != SLOW else count), missed
        stop = odd
        while stop < end and not is_space(text[stop]):
            stop += 1
        if stop - start > _MAX_PIECE_BYTES:
            return SLOW, missed
        first, second = keys(text, start, stop, np.uint8(0))
        slot = find(slots, letters, text, start, stop, np.uint8(0), first, second)
        if slot >= 0:
            count = copy_ids(slots, words.ids, slot, rows, row, count)
            if count == SLOW:
                return SLOW, missed
        elif missed == len(missing):
            return SLOW, missed
        else:
            missing[missed, 0], missing[missed, 1] = start, stop
            missed += 1
            waiting = True
        at = stop
    return (WAITING if waiting else count), missed


@njit(nogil=True)
def _encode_block(
    words: Words,
    merges: Merges,
    text: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    counts: np.ndarray,
    missing: np.ndarray,
) -> Scalar:
    """Encode some captions of a block.

    Args:
        words: table, extended on the way.
        merges: byte-pair merges.
        text: uint8 [B].
        offsets: int64 [R + 1], the captions of the block in `text`.
        rows: int64, which of them to encode.
        out: int32 [R, L], where the ids of a caption go.
        counts: int64 [R], the number of ids of a caption, WAITING or SLOW.
        missing: int64 [M, 2], room for the begin and end of pieces that are not in the table.

    Returns:
        the number of missing pieces.
    """
    slots, letters, listed, single = words.slots, words.letters, words.ids, merges.single
    missed = 0
    for row in rows:
        begin, end = offsets[row], offsets[row + 1]
        kind = survey(text, begin, end)
        if kind == 0:
            at, count = _encode_known(slots, letters, listed, single, text, begin, end, out, row, 0)
            if at < end and count < out.shape[1]:
                count = _encode_plain(words, merges, text, at, end, out, row, count)
            counts[row] = count
        elif kind == 1:
            counts[row], missed = _encode_mixed(words, merges, text, begin, end, out, row, missing, missed)
        else:
            counts[row] = SLOW
    return missed


@njit(nogil=True)
def _add_pieces(
    words: Words, merges: Merges, text: np.ndarray, pieces: np.ndarray, first_word: np.ndarray, word_ends: np.ndarray, safe: np.ndarray
) -> None:
    """Add pieces with the ids of the words they clean to.

    Args:
        text: uint8 [B]: for each piece its own bytes, then those of its words.
        pieces: int64 [P, 2], begin and end of the pieces in `text`.
        first_word: int64 [P + 1], the words of a piece within `word_ends`.
        word_ends: int64 [W], the end of each word in `text`; it begins where the one before, or the piece, ends.
        safe: bool [P]; captions with an unsafe piece belong to the slow path.
    """
    ids = np.empty(UNSAFE, np.int64)
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
    """The entry points, kept as machine code in __pycache__ for later processes.

    numba takes kept code for valid while the text of *this* file is the same, and knows nothing of the files it calls into. What a
    function encloses is part of the key, so the entry points enclose a fingerprint of all.
    """

    @njit(nogil=True, cache=True)
    def encode_block(words, merges, text, offsets, rows, out, counts, missing):  # noqa: ANN202 - numba infers it
        _ = sources
        return _encode_block(words, merges, text, offsets, rows, out, counts, missing)

    @njit(nogil=True, cache=True)
    def add_pieces(words, merges, text, pieces, first_word, word_ends, safe):  # noqa: ANN202
        _ = sources
        _add_pieces(words, merges, text, pieces, first_word, word_ends, safe)

    return encode_block, add_pieces


_FILES = ("wordbits.py", "wordkernel.py", "wordmerge.py", "wordsplit.py", "wordtable.py")
encode_block, add_pieces = _compiled_once(fingerprint([Path(__file__).with_name(name).read_text("utf8") for name in _FILES]))
