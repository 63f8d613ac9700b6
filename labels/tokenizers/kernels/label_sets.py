"""Compiled: rows of ids int32 [R, L] -> flat ids, and each row's distinct ids in ascending order (its label set)."""

from collections.abc import Callable

import numpy as np

from labels.native import njit
from labels.tokenizers.kernels.table import Array, Scalar, compiled, equal_16, inlined, less_16, ones

# Up to this many ids of a caption are sorted by counting the smaller ones.
_RANKED = 128
_WORD = 64
_ONE = np.uint64(1)
_ZERO = np.uint64(0)


@njit(nogil=True)
def _sorted_distinct(row: Array, out: Array, at: int) -> Scalar:
    """Write the distinct ids of `row`, ascending, to out[at:]; return their end."""
    stop = at
    for token in np.sort(row):
        if stop == at or out[stop - 1] != token:
            out[stop] = token
            stop += 1
    return stop


def _in_lanes(compare_16: Callable[..., Scalar]) -> Callable[..., Scalar]:
    """A comparison of 16 ids with one, extended to 16, 32 or 64."""

    @inlined
    def compare(ids: Array, at: Scalar, lanes: int, token: Scalar) -> Scalar:
        """One bit for each of ids[at : at + lanes], the first lowest; `lanes` is a constant of the compiler."""
        bits = compare_16(ids, at, token)
        for lane in range(16, lanes, 16):
            bits |= compare_16(ids, at + lane, token) << np.uint64(lane)
        return bits

    return compare


_equal, _less = _in_lanes(equal_16), _in_lanes(less_16)


@inlined
def _few_distinct(ids: Array, begin: Scalar, count: Scalar, lanes: int, out: Array, at: Scalar) -> Scalar:
    """Write the distinct ids of ids[begin : begin + count], ascending, to out[at:]; return their end.

    An id's rank is the number of distinct smaller ones; no branch depends on the ids. `lanes` >= count ids are read.
    """
    firsts = ~_ZERO >> np.uint64(_WORD - count)
    for i in range(count):
        before = _equal(ids, begin, lanes, ids[begin + i]) & ((_ONE << np.uint64(i)) - _ONE)
        firsts &= ~(np.uint64(before != _ZERO) << np.uint64(i))
    for i in range(count):
        token = ids[begin + i]
        out[at + np.int64(ones(_less(ids, begin, lanes, token) & firsts))] = token  # pyright: ignore[reportCallIssue]
    return at + np.int64(ones(firsts))  # pyright: ignore[reportCallIssue]


@compiled
def _many_distinct(ids: Array, begin: Scalar, count: Scalar, out: Array, at: Scalar) -> Scalar:
    """`_few_distinct` for 65 to 128 ids; 128 are read."""
    low, high = ~_ZERO, ~_ZERO >> np.uint64(2 * _WORD - count)
    for i in range(count):
        token = ids[begin + i]
        before = _equal(ids, begin, _WORD, token)
        if i < _WORD:
            before &= (_ONE << np.uint64(i)) - _ONE
            low &= ~(np.uint64(before != _ZERO) << np.uint64(i))
        else:
            before |= _equal(ids, begin + _WORD, _WORD, token) & ((_ONE << np.uint64(i - _WORD)) - _ONE)
            high &= ~(np.uint64(before != _ZERO) << np.uint64(i - _WORD))
    for i in range(count):
        token = ids[begin + i]
        smaller = ones(_less(ids, begin, _WORD, token) & low)  # pyright: ignore[reportCallIssue]
        smaller += ones(_less(ids, begin + _WORD, _WORD, token) & high)  # pyright: ignore[reportCallIssue]
        out[at + np.int64(smaller)] = token
    return at + np.int64(ones(low) + ones(high))  # pyright: ignore[reportCallIssue]


@compiled
def _ranked_distinct(ids: Array, begin: Scalar, count: Scalar, out: Array, at: Scalar) -> Scalar:
    """`_few_distinct` for 0 to _RANKED ids; up to ids[begin + _RANKED] is read."""
    if count == 0:
        return at
    if count <= 16:
        return _few_distinct(ids, begin, count, 16, out, at)
    if count <= 32:
        return _few_distinct(ids, begin, count, 32, out, at)
    if count <= _WORD:
        return _few_distinct(ids, begin, count, _WORD, out, at)
    return _many_distinct(ids, begin, count, out, at)


@njit(nogil=True, cache=True)
def gather(rows: Array, counts: Array, ids: Array, offsets: Array, label_ids: Array, label_offsets: Array) -> None:
    """Concatenate the first counts int64 [R] ids of rows int32 [R, L] in ids int32 [T], and their label sets in
    label_ids int32 [T]; fill offsets and label_offsets, int64 [R + 1], behind their first 0.
    """
    flat, width = rows.reshape(-1), rows.shape[1]
    at, stop = 0, 0
    for row in range(len(counts)):
        count = counts[row]
        for i in range(count):
            ids[at + i] = rows[row, i]
        at += count
        if count > _RANKED or row * width + _RANKED > len(flat):  # the latter: the last rows
            stop = _sorted_distinct(rows[row, :count], label_ids, stop)
        else:
            stop = _ranked_distinct(flat, row * width, count, label_ids, stop)
        offsets[row + 1] = at
        label_offsets[row + 1] = stop
