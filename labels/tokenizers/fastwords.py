"""CLIP's fast path: captions into the compiled kernel; pieces beyond plain ASCII cleaned, split into words and learnt.

captions -> encode_block -> missing pieces -> clean_piece, split, add_pieces -> encode_block again
"""

from collections.abc import Callable, Iterable

import numpy as np

from labels.tokenizers.fastclean import clean_piece
from labels.tokenizers.kernels.wordmerge import MAX_WORD_BYTES, Merges, add_pairs
from labels.tokenizers.kernels.words import add_pieces, encode_block
from labels.tokenizers.word_table import FastPath, Slow


class FastWords(FastPath):
    """Captions to ids by a table of CLIP's words, the same ids as the slow path."""

    def __init__(self, merges: Merges, split: Callable[[str], list[str]], slow: Slow, max_words: int, dropped: Iterable[str] = ()) -> None:
        """
        Args:
            merges: the byte-pair merges, see `byte_pairs`.
            split: a cleaned text to the words that count.
            slow: captions and limit to ids and offsets, for captions whose cleaning depends on all of them.
            max_words: the bound of the table; when it is reached, the table starts over.
            dropped: words of two ASCII characters or more that have no ids; those of one are for `byte_pairs`.
        """
        self._dropped = sorted(dropped)
        super().__init__(slow, max_words, len(self._dropped))
        self._merges = merges
        self._split = split
        self._start_table()

    def _start_table(self) -> None:
        self._add([(word.encode("ascii"), True, []) for word in self._dropped])

    def _encode(self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> int:
        return encode_block(self._words, self._merges, text, offsets, pending, rows, counts, self._missing)

    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        data = text.data
        found = []
        for raw in {bytes(data[begin:end]) for begin, end in missing.tolist()}:
            cleaned = clean_piece(raw.decode("utf8"))
            found.append((raw, cleaned is not None, self._split(cleaned or "")))
        self._add(found)

    def _add(self, found: list[tuple[bytes, bool, list[str]]]) -> None:
        """Add pieces to the table: their bytes, whether they may be taken alone, and the words they clean to."""
        buffer = bytearray()
        pieces, first_word, word_ends = [], [0], []
        for raw, _, words in found:
            pieces.append((len(buffer), len(buffer) + len(raw)))
            buffer += raw
            for word in words:
                buffer += word.encode("utf8")
                word_ends.append(len(buffer))
            first_word.append(len(word_ends))
        add_pieces(
            self._words,
            self._merges,
            np.frombuffer(bytes(buffer), dtype=np.uint8),
            np.array(pieces, dtype=np.int64).reshape(-1, 2),
            np.array(first_word, dtype=np.int64),
            np.array(word_ends, dtype=np.int64),
            np.array([safe for _, safe, _ in found], dtype=np.bool_),
        )


def byte_pairs(inner: list[int], last: list[int], merges: list[tuple[int, int, int]], dropped: Iterable[int] = ()) -> Merges:
    """Byte-pair merges for the kernel.

    Args:
        inner: 256 ids, of each byte inside a word.
        last: 256 ids, of each byte at the end of a word.
        merges: left id, right id, id of both together; the first is merged first.
        dropped: bytes that have no id where they are a word by themselves.
    """
    slots = 1 << (4 * len(merges) - 1).bit_length()
    single = np.array(last, dtype=np.int32)
    single[list(dropped)] = -1
    table = Merges(
        np.array(inner, dtype=np.int32),
        np.array(last, dtype=np.int32),
        single,
        np.zeros(slots, dtype=np.uint64),
        np.zeros(slots, dtype=np.int64),
        np.empty((2, MAX_WORD_BYTES), dtype=np.int64),
    )
    left, right, merged = np.array(merges, dtype=np.int64).T.copy()
    add_pairs(table, left, right, (np.arange(len(merges)) << 32) | merged)
    return table
