"""Rows of ids to flat arrays and label sets, compiled."""

import numpy as np
from numba import njit

from preprocess.tokens.wordjit import compiled
from preprocess.tokens.wordtable import Scalar

# Up to this many ids of a caption are sorted by counting the smaller ones.
_RANKED = 128
_INT32_MAX = (1 << 31) - 1


@njit(nogil=True, cache=True)
def _sorted_distinct(row: np.ndarray, count: int, out: np.ndarray, at: int) -> Scalar:
    """Write the distinct ids of row[:count] to out from `at` on, ascending; where they end."""
    stop = at
    for token in np.sort(row[:count]):
        if stop == at or out[stop - 1] != token:
            out[stop] = token
            stop += 1
    return stop


@compiled
def _ranked_distinct(rows: np.ndarray, row: int, count: int, padded: np.ndarray, ordered: np.ndarray, out: np.ndarray, at: int) -> Scalar:
    """The same for up to _RANKED ids of rows[row].

    Each id goes to the place that is the number of smaller ones: count^2 comparisons, but eight at a time and none of them
    a branch. `padded` and `ordered` are int32 scratch of _RANKED + 16.
    """
    full = (count + 15) & ~15
    for i in range(count):
        padded[i] = rows[row, i]
        ordered[i] = -1
    for i in range(count, full):
        padded[i] = _INT32_MAX
    for i in range(count):
        token, smaller = padded[i], np.int32(0)
        for j in range(full):
            smaller += np.int32(padded[j] < token)
        ordered[smaller] = token
    stop = at
    for i in range(count):
        # An id that comes twice leaves a place empty, which the next one overwrites.
        out[stop] = ordered[i]
        stop += ordered[i] >= 0
    return stop


@njit(nogil=True, cache=True)
def gather(
    rows: np.ndarray, counts: np.ndarray, ids: np.ndarray, offsets: np.ndarray, label_ids: np.ndarray, label_offsets: np.ndarray
) -> None:
    """Close the gaps between rows int32 [R, L] of counts int64 [R] ids each, and make the label sets.

    Args:
        ids: int32 [T], filled.
        offsets: int64 [R + 1], filled from offsets[0] = 0 on.
        label_ids: int32 [T], filled from its beginning.
        label_offsets: int64 [R + 1], filled from label_offsets[0] = 0 on.
    """
    padded, ordered = np.empty(_RANKED + 16, np.int32), np.empty(_RANKED + 16, np.int32)
    at, stop = 0, 0
    for row in range(len(counts)):
        count = counts[row]
        for i in range(count):
            ids[at + i] = rows[row, i]
        at += count
        if count > _RANKED:
            stop = _sorted_distinct(rows[row], count, label_ids, stop)
        else:
            stop = _ranked_distinct(rows, row, count, padded, ordered, label_ids, stop)
        offsets[row + 1] = at
        label_offsets[row + 1] = stop
