"""The fast path of any tokenizer whose ids of a caption are those of its pieces between spaces, one after another.

captions -> encode_pieces -> missing pieces -> the tokenizer itself, once -> into the table -> encode_pieces again
"""

from collections.abc import Callable

import numpy as np

from labels.tokenizers.kernels.pieces import add_known, encode_pieces
from labels.tokenizers.kernels.table import UNSAFE
from labels.tokenizers.word_table import MAX_GROWTH, FastPath, Slow

# Pieces to the ids of each, or None for one whose captions have to be taken as a whole.
Learn = Callable[[list[str]], list[list[int] | None]]


class FastPieces(FastPath):
    """Captions to ids by a table of pieces between spaces, the same ids as the slow path."""

    def __init__(self, learn: Learn, slow: Slow, max_words: int, flags: int) -> None:
        """
        Args:
            learn: pieces to their ids; a piece holds no space, save the first character of a JOINED one.
            slow: captions and limit to ids and offsets.
            max_words: the bound of the table; when it is reached, the table starts over.
            flags: of `labels.tokenizers.kernels.pieces`.
        """
        super().__init__(slow, max_words)
        self._learn_pieces = learn
        self._flags = flags

    def _encode(self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> int:
        return encode_pieces(self._words, text, offsets, pending, self._flags, rows, counts, self._missing)

    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        data = text.data
        pieces = list({bytes(data[begin:end]) for begin, end in missing.tolist()})
        found = self._learn_pieces([piece.decode("utf8") for piece in pieces])
        # The rows have no room for more ids than MAX_GROWTH a byte.
        safe = [ids is not None and len(ids) <= MAX_GROWTH * len(piece) for piece, ids in zip(pieces, found, strict=True)]
        kept = [ids if ids and good else [] for ids, good in zip(found, safe, strict=True)]
        add_known(
            self._words,
            np.frombuffer(b"".join(pieces), dtype=np.uint8),
            np.cumsum([len(piece) for piece in pieces], dtype=np.int64),
            np.array([token for ids in kept for token in ids], dtype=np.int64),
            np.cumsum([len(ids) for ids in kept], dtype=np.int64),
            np.where(safe, 0, UNSAFE),
        )
