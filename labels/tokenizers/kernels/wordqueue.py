"""Look-ups in two steps, compiled, so that the table's cache misses overlap: the words of several captions are queued, and their slots
fetched from memory; then the queue is resolved, in order.

Shapes: Q queued words, M missing pieces, R captions (rows), L ids a caption at most.
"""

import numpy as np
from numba import njit

from labels.tokenizers.kernels.table import SLOW, Scalar, copy_ids, find_from, home
from labels.tokenizers.kernels.wordbits import prefetch
from labels.tokenizers.kernels.wordjit import inlined

# Of a queued word: how its case is folded, or that it is a whole piece, which Python has to learn.
KEEP, FOLD, PIECE = np.uint8(0), np.uint8(0x20), np.uint8(1)
# Words of one caption that are queued at once.
QUEUED_WORDS = 32
# Numbers of a queued word: first and second column of its slot, begin, end, kind, home.
_FIELDS = 6


@njit(nogil=True)
def new_queue(captions: int) -> np.ndarray:
    """Room for QUEUED_WORDS of each of some captions: uint64 [_FIELDS Q]."""
    return np.empty(captions * QUEUED_WORDS * _FIELDS, np.uint64)


@inlined
def enqueue(
    slots: np.ndarray, queue: np.ndarray, size: Scalar, begin: Scalar, end: Scalar, kind: Scalar, first: Scalar, second: Scalar
) -> Scalar:
    """Queue text[begin:end] behind `size` words, for which there has to be room; the new size."""
    slot = home(slots, end - begin, first, second)
    prefetch(slots, slot)  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
    place = size * _FIELDS
    queue[place] = first
    queue[place + 1] = second
    queue[place + 2] = np.uint64(begin)
    queue[place + 3] = np.uint64(end)
    queue[place + 4] = np.uint64(kind)
    queue[place + 5] = np.uint64(slot)
    return size + 1


@inlined
def queued(queue: np.ndarray, item: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar, Scalar, Scalar]:
    """Begin, end, kind, first and second column, and home of a queued word."""
    place = item * _FIELDS
    begin, end, kind = np.int64(queue[place + 2]), np.int64(queue[place + 3]), np.uint8(queue[place + 4])
    return begin, end, kind, queue[place], queue[place + 1], np.int64(queue[place + 5])


@inlined
def resolve_known(
    slots: np.ndarray,
    letters: np.ndarray,
    listed: np.ndarray,
    text: np.ndarray,
    queue: np.ndarray,
    item: Scalar,
    last: Scalar,
    rows: np.ndarray,
    row: Scalar,
    count: Scalar,
    missing: np.ndarray,
    missed: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """Append the ids of queue[item:last], words of one caption, to rows[row], up to the first word that is not in the table.

    Pieces that are not in it are appended to missing int64 [M, 2] (begin, end). All of them are looked at, even past the limit, since one
    unsafe piece may change how the whole caption is read.

    Returns:
        where it stopped (`last`, or an unknown word); the new number of ids, or SLOW; the new number of missing pieces.
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
