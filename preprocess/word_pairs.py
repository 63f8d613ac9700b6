"""Pairs of neighbouring whole words in rows of token ids, compiled: what preprocess/ngrams.py counts and looks up.

A border lies before a row's first token, behind its last, and between neighbours a, b where ends[a] or starts[b]. A token with a
border on both sides is a whole word.

Shapes: V token classes, P pairs, N captions, T ids in all. Ids must lie in 0 .. V - 1: nothing here checks it.
"""

from typing import Any

import numpy as np

from labels.native import njit

# Up to this many a caption's pairs are sorted by insertion, which makes no copy.
_INSERTED = 64


@njit(nogil=True, inline="always")
def _whole(ids: np.ndarray, begin: Any, end: Any, at: Any, starts: np.ndarray, ends: np.ndarray) -> Any:
    """Is ids[at] a whole word of the row ids[begin:end]?"""
    before = at == begin or ends[ids[at - 1]] or starts[ids[at]]
    behind = at == end - 1 or ends[ids[at]] or starts[ids[at + 1]]
    return before and behind


@njit(nogil=True, cache=True)
def count_words(ids: np.ndarray, offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray, frequency: np.ndarray) -> None:
    """Add to frequency, int64 [V], in how many rows each token is a whole word.

    Args:
        ids: int32 [T].
        offsets: int64 [N + 1].
        starts, ends: bool [V].
    """
    seen = np.full(len(frequency), -1, np.int64)
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        for at in range(begin, end):
            token = ids[at]
            if seen[token] != row and _whole(ids, begin, end, at, starts, ends):
                seen[token] = row
                frequency[token] += 1


@njit(nogil=True, cache=True)
def _sort_distinct(values: np.ndarray, begin: Any, end: Any) -> Any:
    """Sort values[begin:end] in place, each value once; where they end."""
    if end - begin > _INSERTED:
        values[begin:end] = np.sort(values[begin:end])
    else:
        for i in range(begin + 1, end):
            value, place = values[i], i
            while place > begin and values[place - 1] > value:
                values[place] = values[place - 1]
                place -= 1
            values[place] = value
    stop = begin
    for i in range(begin, end):
        if stop == begin or values[stop - 1] != values[i]:
            values[stop] = values[i]
            stop += 1
    return stop


@njit(nogil=True, cache=True)
def caption_pairs(ids: np.ndarray, offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The pairs of all rows as int64 first << 32 | second, each once a row.

    Args:
        ids: int32 [T].
        offsets: int64 [N + 1].
        starts, ends: bool [V].
    """
    pairs = np.empty(offsets[-1] - offsets[0], np.int64)
    stop = 0
    for row in range(len(offsets) - 1):
        begin, end, first = offsets[row], offsets[row + 1], stop
        for at in range(begin, end - 1):
            if _whole(ids, begin, end, at, starts, ends) and _whole(ids, begin, end, at + 1, starts, ends):
                pairs[stop] = (np.int64(ids[at]) << 32) | np.int64(ids[at + 1])
                stop += 1
        stop = _sort_distinct(pairs, first, stop)
    return pairs[:stop]


@njit(nogil=True, cache=True)
def _find(values: np.ndarray, begin: Any, end: Any, wanted: Any) -> Any:
    """Where `wanted` stands in the ascending values[begin:end], or -1."""
    stop = end
    while begin < stop:
        middle = (begin + stop) // 2
        if values[middle] < wanted:
            begin = middle + 1
        else:
            stop = middle
    return begin if begin < end and values[begin] == wanted else -1


@njit(nogil=True, cache=True)
def known_pairs(
    ids: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    begins: np.ndarray,
    seconds: np.ndarray,
    classes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The classes of the known pairs of every row, distinct and ascending.

    Args:
        ids: int32 [T].
        offsets: int64 [N + 1].
        starts, ends: bool [V].
        begins: int64 [V + 1]; the pairs that begin with token a are begins[a] .. begins[a + 1].
        seconds: int32 [P], their second tokens, ascending for each first one.
        classes: int32 [P], their classes.

    Returns:
        int32 [T'], and offsets int64 [N + 1].
    """
    found = np.empty(offsets[-1] - offsets[0], np.int32)
    rows = np.zeros(len(offsets), np.int64)
    stop = 0
    for row in range(len(offsets) - 1):
        begin, end, first = offsets[row], offsets[row + 1], stop
        for at in range(begin, end - 1):
            place = _find(seconds, begins[ids[at]], begins[ids[at] + 1], ids[at + 1])
            if place >= 0 and _whole(ids, begin, end, at, starts, ends) and _whole(ids, begin, end, at + 1, starts, ends):
                found[stop] = classes[place]
                stop += 1
        stop = _sort_distinct(found, first, stop)
        rows[row + 1] = stop
    return found[:stop].copy(), rows
