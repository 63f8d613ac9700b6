"""What stage 1 needs of a tokenizer, and how one is chosen by name."""

from functools import cache
from typing import Protocol

import numpy as np

from preprocess.clip_bpe import ClipTokenizer


class Tokenizer(Protocol):
    """Captions to ids. Vocabulary `tokens` (position = id), `excluded` ids that are never labels, `fingerprint`."""

    name: str
    tokens: list[str]
    excluded: np.ndarray
    fingerprint: str

    def encode(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """N captions to ids int32 [T] and offsets int64 [N + 1], at most `limit` ids a caption, no specials."""
        ...


_BY_NAME = {"clip": ClipTokenizer}


@cache
def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name (`labels.tokenizer`); one a process, so that its table of known words serves all shards."""
    return _BY_NAME[name]()
