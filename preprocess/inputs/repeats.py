"""Keys that occur more than once in a table: exact, in one reading as long as none does.

keys -> 64-bit hashes -> a set; the first hash that is there already -> all keys are read again: hashes that occur twice
     -> only keys with such a hash are compared as strings, in the table's order
"""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from labels.native import njit
from labels.tokenizers.kernels.table import Scalar, load, prefetch
from preprocess.readers.columns import offsets_and_bytes

_START, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(20)
_AHEAD = 16
_FIRST_SLOTS = 1 << 16


class Repeats:
    """Tells repeated keys, batch by batch, for 16 to 32 bytes of memory a row."""

    def __init__(self, reread: Callable[[], Iterable[pa.StringArray]]) -> None:
        """
        Args:
            reread: all keys of the table in its order, in batches; called only when a hash has come twice.
        """
        self._reread = reread
        self._hashes = np.zeros(_FIRST_SLOTS, np.uint64)
        self._rows = 0
        self._twice: _Twice | None = None

    def find(self, keys: pa.StringArray) -> list[int]:
        """Rows of the next batch whose key occurred before; batches have to come in the table's order."""
        if self._twice is None:
            while 2 * (self._rows + len(keys)) > len(self._hashes):
                larger = np.zeros(4 * len(self._hashes), np.uint64)
                _add_all(larger, self._hashes)
                self._hashes = larger
            if not _add_all(self._hashes, _hashes(keys)):
                self._rows += len(keys)
                return []
            self._twice = _Twice(self._reread(), self._reread(), self._rows)
        return self._twice.find(keys)


class _Twice:
    """The same once there may be repeats: `before` are the keys of which the first `rows` have been seen."""

    def __init__(self, keys: Iterable[pa.StringArray], before: Iterable[pa.StringArray], rows: int) -> None:
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *map(_hashes, keys)]))
        self._hashes = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        self._seen: set[str] = set()
        for part in before:
            self.find(part.slice(0, rows))
            rows -= min(rows, len(part))
            if not rows:
                break

    def find(self, keys: pa.StringArray) -> list[int]:
        """Rows of the next batch whose key occurred before."""
        found = []
        for row in np.flatnonzero(np.isin(_hashes(keys), self._hashes)):
            key = keys[row].as_py()
            if key in self._seen:
                found.append(int(row))
            self._seen.add(key)
        return found


@njit(nogil=True, cache=True)
def _add_all(slots: np.ndarray, hashes: np.ndarray) -> bool:
    """Add hashes, less the 0 that stands for nothing, to an open-addressing set; whether one was there already."""
    mask, found = len(slots) - 1, False
    for place in range(len(hashes)):
        ahead = hashes[min(place + _AHEAD, len(hashes) - 1)]
        prefetch(slots, np.int64(ahead >> _LOW) & mask)  # pyright: ignore[reportCallIssue] - numba gives the first argument itself
        value = hashes[place]
        if value == 0:
            continue
        slot = np.int64(value >> _LOW) & mask
        while slots[slot] != 0 and slots[slot] != value:
            slot = (slot + 1) & mask
        found |= slots[slot] == value
        slots[slot] = value
    return found


def _hashes(strings: pa.StringArray) -> np.ndarray:
    offsets, text = offsets_and_bytes(strings)
    return _hash_each(offsets, text)


@njit(nogil=True, cache=True)
def _hash_each(offsets: np.ndarray, text: np.ndarray) -> np.ndarray:
    """uint64 [N] of strings as int32 [N + 1] offsets into uint8 [B], eight bytes at a time."""
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(hashes)):
        at, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        value = _START ^ np.uint64(end - at)
        while at + 8 <= end:
            value = _mixed(value, load(text, at))  # pyright: ignore[reportCallIssue]
            at += 8
        rest = np.uint64(0)
        for i in range(at, end):
            rest = (rest << np.uint64(8)) | np.uint64(text[i])
        hashes[row] = _mixed(value, rest) | np.uint64(1)  # never 0
    return hashes


@njit(nogil=True, forceinline=True)
def _mixed(value: Scalar, more: Scalar) -> Scalar:
    value = (value ^ more) * _PRIME
    return value ^ (value >> np.uint64(32))
