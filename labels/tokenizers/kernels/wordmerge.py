"""Byte-pair merges of one word, compiled: what a word that is not in the table costs, about a microsecond."""

from typing import NamedTuple

import numpy as np
from numba import njit

from labels.tokenizers.kernels.table import Scalar
from labels.tokenizers.kernels.wordjit import compiled

# A longer word is left to the slow path: merging takes quadratic time, and such words hardly ever come twice.
MAX_WORD_BYTES = 128

_MIX, _HALF, _SHIFT, _ZERO = np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(29), np.uint64(0)


class Merges(NamedTuple):
    """Byte-pair merges.

    Attributes:
        inner: int32 [256], id of a byte inside a word.
        last: int32 [256], id of a byte at the end of a word.
        single: int32 [256], id of a byte that is a whole word; -1 for a word that is dropped.
        pairs: uint64, open-addressing keys (left id + 1) << 32 | right id; 0 is an empty slot.
        ranks: int64, beside `pairs`: rank << 32 | id of the merged symbol.
        scratch: int64 [2, MAX_WORD_BYTES], symbols of a word and what each makes with the next.
    """

    inner: np.ndarray
    last: np.ndarray
    single: np.ndarray
    pairs: np.ndarray
    ranks: np.ndarray
    scratch: np.ndarray


@njit(nogil=True, cache=True)
def add_pairs(merges: Merges, left: np.ndarray, right: np.ndarray, values: np.ndarray) -> None:
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
def merge(merges: Merges, text: np.ndarray, begin: Scalar, end: Scalar, fold: Scalar) -> Scalar:
    """Byte-pair encoding of text[begin:end] into merges.scratch[0]; the number of ids."""
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
