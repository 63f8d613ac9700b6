"""Captions to ids by a table of known words: `FastPath`, of all tokenizers, and `FastPieces`, of all but CLIP's.

    captions -> blocks -> _encode (compiled) -> missing pieces -> _learn: the tokenizer, once per piece -> _encode again
                             | slow captions -> the tokenizer's slow path --v
                             +-------------------------------------------> gather -> ids, offsets and label sets

The table stays in the process: hardly any piece is new after the first shard. It is bounded, and cleared when it is
full, which changes no id. The kernels are imported at the first caption, since numba takes long to import.

Shapes: N captions, T token ids, T' label ids, R rows of a block, L ids a caption at most, M missing pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from labels.tokenizers.kernels.table import Words

# An id stands for one byte of the caption or more, unless cleaning makes the text longer: at most by this factor.
MAX_GROWTH = 8

_FIRST_SLOTS = 1 << 16
_BLOCK_ROWS = 4096
_BLOCK_IDS = 1 << 22
_MAX_MISSING = 1 << 16

Captions = pa.StringArray | pa.LargeStringArray | pa.ChunkedArray | Sequence[str]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Slow = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
# Pieces -> the ids of each, None if its captions have to be encoded as a whole.
Learn = Callable[[list[str]], list[list[int] | None]]


class FastPath(ABC):
    """Captions to ids by a table of known words, the same ids as the slow path. For one thread at a time.

    `slow`: captions and limit -> ids and offsets, for captions that must be encoded as a whole; `max_words`: the bound
    of the table, which always has room for the `fixed_words` of `_start_table`.
    """

    def __init__(self, slow: Slow, max_words: int, fixed_words: int = 0) -> None:
        self.slow_captions = 0  # number of captions that took the slow path
        self.learnt_pieces = 0  # number of pieces that Python encoded
        self._slow = slow
        self._max_slots = max(4, 2 << (max(max_words, 2 * fixed_words, 1) - 1).bit_length())
        self._words = _empty_table(min(_FIRST_SLOTS, self._max_slots))
        self._missing = np.empty((_MAX_MISSING, 2), dtype=np.int64)
        self._rows = np.empty(0, dtype=np.int32)

    @abstractmethod
    def _encode(
        self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray
    ) -> int:
        """Fill rows int32 [R, L], counts int64 [R] of the `pending` captions; the number of pieces in self._missing."""

    @abstractmethod
    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        """Add the missing pieces, int64 [M, 2], to the table."""

    def _start_table(self) -> None:
        """Add the words that are always in the table."""
        return

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets of N captions: see `labels.tokenizers.tokenizer.Tokenizer.encode_rows`."""
        try:
            arrays = string_arrays(captions)
        except UnicodeEncodeError:
            # Lone surrogates are no UTF-8; the slow path, which replaces them, takes all captions of the call.
            return self._all_slow([str(caption) for caption in captions], limit)
        parts = [self._block(block, limit) for array in arrays for block in _blocks(array, limit)]
        if len(parts) == 1:
            return parts[0]
        return *join_rows([part[:2] for part in parts]), *join_rows([part[2:] for part in parts])

    def _block(self, captions: pa.Array, limit: int) -> Rows:
        from labels.tokenizers.kernels.table import WAITING

        text, offsets = _buffers(captions)
        width = _width(offsets, limit)
        if self._rows.size < len(captions) * width:
            self._rows = np.empty(len(captions) * width, dtype=np.int32)
        rows = self._rows[: len(captions) * width].reshape(len(captions), width)
        counts = np.empty(len(captions), dtype=np.int64)
        missed = self._encode(text, offsets, np.arange(len(captions), dtype=np.int64), rows, counts)
        self._make_room()
        if missed:
            self.learnt_pieces += missed
            self._learn(text, self._missing[:missed])
            self._encode(text, offsets, np.flatnonzero(counts == WAITING), rows, counts)
        slow = np.flatnonzero(counts < 0)
        if len(slow):
            # Also captions with a piece that found no room in the table.
            ids, ends = self._slow(captions.take(pa.array(slow)).to_pylist(), limit)
            longest = int(np.diff(ends).max())
            if longest > width:
                rows = np.pad(rows, [(0, 0), (0, longest - width)])
            for row, (start, end) in zip(slow, pairwise(ends), strict=True):
                counts[row] = end - start
                rows[row, : end - start] = ids[start:end]
            self.slow_captions += len(slow)
        return _gather(rows, counts)

    def _all_slow(self, captions: list[str], limit: int) -> Rows:
        ids, offsets = self._slow(captions, limit)
        self.slow_captions += len(captions)
        return ids, offsets, *flat_rows([np.unique(ids[start:end]).tolist() for start, end in pairwise(offsets)])

    def _make_room(self) -> None:
        """If a word found no room: a larger table with the same words, or at the bound an empty one."""
        from labels.tokenizers.kernels.table import rehash

        words = self._words
        if not words.fill[3]:
            return
        slots = len(words.slots) // 4
        if slots >= self._max_slots:
            words.slots[:] = 0
            words.fill[:] = 0
            self._start_table()
            return
        larger = _empty_table(min(slots * 4, self._max_slots))
        rehash(words.slots, larger.slots)
        larger.letters[: words.fill[1]] = words.letters[: words.fill[1]]
        larger.ids[: words.fill[2]] = words.ids[: words.fill[2]]
        larger.fill[:3] = words.fill[:3]
        self._words = larger


class FastPieces(FastPath):
    """Captions to ids by a table of pieces between spaces, the same ids as the slow path.

    A piece holds no space, except the first character of a JOINED one; `flags`: of `kernels.pieces`.
    """

    def __init__(self, learn: Learn, slow: Slow, max_words: int, flags: int) -> None:
        super().__init__(slow, max_words)
        self._learn_pieces, self._flags = learn, flags

    def _encode(
        self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray
    ) -> int:
        from labels.tokenizers.kernels.pieces import encode_pieces

        return encode_pieces(self._words, text, offsets, pending, self._flags, rows, counts, self._missing)

    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        from labels.tokenizers.kernels.pieces import add_known
        from labels.tokenizers.kernels.table import UNSAFE

        data = text.data
        pieces = list({bytes(data[begin:end]) for begin, end in missing.tolist()})
        rows = self._learn_pieces([piece.decode("utf8") for piece in pieces])
        room = [MAX_GROWTH * len(piece) for piece in pieces]  # that the rows have for the ids of a piece
        safe = [ids is not None and len(ids) <= most for ids, most in zip(rows, room, strict=True)]
        kept = [ids if ids and good else [] for ids, good in zip(rows, safe, strict=True)]
        add_known(
            self._words,
            np.frombuffer(b"".join(pieces), dtype=np.uint8),
            np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
            np.array([token for ids in kept for token in ids], dtype=np.int64),
            np.cumsum([len(ids) for ids in kept], dtype=np.int64),
            np.where(safe, 0, UNSAFE),
        )


def string_arrays(captions: Captions) -> list[pa.Array]:
    """The captions as one or more Arrow arrays; UnicodeEncodeError if one holds a lone surrogate."""
    if isinstance(captions, pa.Array):
        return [captions]
    if isinstance(captions, Sequence):
        return [pa.array(captions, pa.large_string())]
    return captions.chunks or [pa.array([], pa.large_string())]


def refuse_nulls(array: pa.Array) -> None:
    """ValueError if one of the captions is null."""
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} captions are null; remove them before tokenizing")


def _empty_table(slots: int) -> Words:
    from labels.tokenizers.kernels.table import Words

    # A slot of four numbers must not lie across two cache lines of eight.
    room = np.zeros(slots * 4 + 8, dtype=np.uint64)
    first = -room.ctypes.data % 64 // 8
    return Words(
        room[first : first + slots * 4],
        np.empty(slots * 4, dtype=np.uint8),
        np.empty(slots * 2, dtype=np.int32),
        np.zeros(4, dtype=np.int64),
    )


def _buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes uint8 [B] of an array of N strings, and where each begins, int64 [N + 1]."""
    wide = pa.types.is_large_string(array.type)
    _, offsets, data = array.buffers()
    if not len(array):
        return np.frombuffer(b"", np.uint8), np.zeros(1, np.int64)
    begins = np.frombuffer(offsets, np.int64 if wide else np.int32, len(array) + 1, array.offset * (8 if wide else 4))
    text = np.frombuffer(data or b"", np.uint8)
    # Read-only even where Arrow's buffer is not: one type, so the kernel is compiled once.
    text.flags.writeable = False
    return text, begins.astype(np.int64)


def _width(offsets: np.ndarray, limit: int) -> int:
    """Room for the ids of any of the captions, cut off at `limit`."""
    return max(0, min(limit, int(np.diff(offsets).max(initial=0)) * MAX_GROWTH))


def _blocks(array: pa.Array, limit: int) -> list[pa.Array]:
    """Slices of an array of strings with a bounded number of captions and ids."""
    refuse_nulls(array)
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    step = min(_BLOCK_ROWS, max(1, _BLOCK_IDS // max(1, _width(_buffers(array)[1], limit))))
    return [array.slice(start, step) for start in range(0, max(len(array), 1), step)]


def _gather(rows: np.ndarray, counts: np.ndarray) -> Rows:
    from labels.tokenizers.kernels.label_sets import gather

    total = int(counts.sum())
    ids, label_ids = np.empty(total, np.int32), np.empty(total, np.int32)
    offsets, label_offsets = np.zeros(len(counts) + 1, np.int64), np.zeros(len(counts) + 1, np.int64)
    gather(rows, counts, ids, offsets, label_ids, label_offsets)
    return ids, offsets, label_ids[: label_offsets[-1]], label_offsets


def flat_rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """N rows of ids -> ids int32 [T], offsets int64 [N + 1]."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1])), offsets


def join_rows(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of several `flat_rows` -> of all rows."""
    counts = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, offsets in parts)])
    ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in parts)])
    return ids, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
