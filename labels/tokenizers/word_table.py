"""Captions to ids by a table of known words: what all compiled paths share, and the one for any tokenizer but CLIP's.

    captions -> blocks -> encode (compiled) -> missing pieces -> learn: the tokenizer itself, once a piece -> into the table -> encode again
                              | slow captions -> the tokenizer's own slow path --v
                              +----------------------------------------------> gather -> ids, offsets, label_ids, label_offsets

The table stays in the process: captions repeat their words, so that hardly any piece is new after the first shard. It
    is bounded, and
starts over when it is full, which changes no id. The kernels are imported at the first caption: numba takes longer than
    all else.

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

# An id stands for a byte or more of the caption, save where cleaning or normalising makes it longer; by at most this
# factor.
MAX_GROWTH = 8

_FIRST_SLOTS = 1 << 16
_BLOCK_ROWS = 4096
_BLOCK_IDS = 1 << 22
_MAX_MISSING = 1 << 16

Captions = pa.StringArray | pa.LargeStringArray | pa.ChunkedArray | Sequence[str]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Slow = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
# Pieces to the ids of each, or None for one whose captions have to be taken as a whole.
Learn = Callable[[list[str]], list[list[int] | None]]


class FastPath(ABC):
    """Captions to ids by a table of known words, the same ids as the slow path. For one thread at a time.

    Attributes:
        slow_captions: how many captions took the slow path so far.
        learnt_pieces: how many pieces Python had to look at so far.
    """

    def __init__(self, slow: Slow, max_words: int, fixed_words: int = 0) -> None:
        """
        Args:
            slow: captions and limit to ids and offsets, for captions that must be taken as a whole.
            max_words: the bound of the table; when it is reached, the table starts over.
            fixed_words: this many words always have room in it (those of `_start_table`).
        """
        self.slow_captions = 0
        self.learnt_pieces = 0
        self._slow = slow
        self._max_slots = max(4, 2 << (max(max_words, 2 * fixed_words, 1) - 1).bit_length())
        self._words = _empty_table(min(_FIRST_SLOTS, self._max_slots))
        self._missing = np.empty((_MAX_MISSING, 2), dtype=np.int64)
        self._rows = np.empty(0, dtype=np.int32)

    @abstractmethod
    def _encode(
        self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray
    ) -> int:
        """Fill rows int32 [R, L] and counts int64 [R] of the `pending` captions; the number of pieces put into
        self._missing.
        """

    @abstractmethod
    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        """Add the missing pieces, int64 [M, 2], to the table."""

    def _start_table(self) -> None:
        """Put into an empty table what must always be in it."""
        return

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets of N captions.

        Args:
            captions: N strings without nulls.
            limit: at most this many ids a caption.

        Returns:
            ids int32 [T], offsets int64 [N + 1], label_ids int32 [T'] (of each caption distinct, ascending),
            label_offsets int64 [N + 1].

        Raises:
            ValueError: a caption is null.
        """
        try:
            arrays = string_arrays(captions)
        except UnicodeEncodeError:
            # Lone surrogates have no UTF-8; the slow path replaces them, so they take it, with the others of the call.
            return self._all_slow([str(caption) for caption in captions], limit)
        parts = [self._block(block, limit) for array in arrays for block in _blocks(array, limit)]
        if len(parts) == 1:
            return parts[0]
        return *_join([part[:2] for part in parts]), *_join([part[2:] for part in parts])

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
            # Also those with a piece that is still missing, having found no room in the table.
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
        rows = [np.unique(ids[start:end]) for start, end in pairwise(offsets)]
        label_offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return ids, offsets, np.concatenate([np.empty(0, np.int32), *rows]), label_offsets

    def _make_room(self) -> None:
        """Once a word found no room: a larger table with the same words, or, at the bound, an empty one."""
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
    """Captions to ids by a table of pieces between spaces, the same ids as the slow path."""

    def __init__(self, learn: Learn, slow: Slow, max_words: int, flags: int) -> None:
        """
        Args:
            learn: pieces to their ids; a piece holds no space, save the first character of a JOINED one.
            slow: captions and limit to ids and offsets.
            max_words: the bound of the table; when it is reached, the table starts over.
            flags: of `kernels.pieces`.
        """
        super().__init__(slow, max_words)
        self._learn_pieces = learn
        self._flags = flags

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
        found = self._learn_pieces([piece.decode("utf8") for piece in pieces])
        # The rows have no room for more ids than MAX_GROWTH a byte.
        safe = [
            ids is not None and len(ids) <= MAX_GROWTH * len(piece) for piece, ids in zip(pieces, found, strict=True)
        ]
        kept = [ids if ids and good else [] for ids, good in zip(found, safe, strict=True)]
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
        raise ValueError(f"{array.null_count} of {len(array)} captions are null; leave them out before tokenizing")


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
    """Slices of an array of strings, of a bounded number of captions and ids."""
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


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of parts one after another."""
    counts = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
