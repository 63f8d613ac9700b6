"""Any tokenizer of the `tokenizers` library: WordPiece, unigram, byte-pair and word-level; its very ids, faster where that is proven.

caption -> stop words removed, if asked for -> pieces -> table of known pieces -> ids      (path `fast`)
                                        |  a new piece -> the library, once -> into the table
                                        +> the library, whole captions                     (path `plain`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import regex
import tokenizers

from labels.files import fingerprint
from labels.settings import Labels
from labels.sparse import unique_sorted
from labels.tokenizers.kernels.pieces import JOINED
from labels.tokenizers.piecewise import piece_rule
from labels.tokenizers.sources import find_source, load_engine
from labels.tokenizers.stopwords import remove_from_piece, remove_stop_words, stop_words
from labels.tokenizers.word_table import refuse_nulls, string_arrays

if TYPE_CHECKING:
    from labels.tokenizers.fastpieces import FastPieces
    from labels.tokenizers.word_table import Captions, Rows

_MAX_KNOWN_PIECES = 1_000_000
_AT_ONCE = 4096
_MARK, _BYTE_SPACE = "\u2581", "\u0120"


class SubwordTokenizer:
    """Captions to the ids of a tokenizer of the `tokenizers` library, without special tokens and the unknown token.

    Attributes: see `labels.tokenizers.tokenizer.Tokenizer`.
    """

    def __init__(self, engine: tokenizers.Tokenizer, *, without_stop_words: bool = False, max_known: int = _MAX_KNOWN_PIECES) -> None:
        """
        Args:
            engine: as `labels.tokenizers.sources.load_engine` gives it.
            without_stop_words: remove NLTK's stop words from the text first.
            max_known: bound of the table of known pieces.
        """
        self._engine = engine
        self._parts: dict[str, Any] = json.loads(engine.to_str())
        self._without_stop_words = without_stop_words
        self._max_known = max_known
        model = self._parts["model"]
        self.name: str = model["type"].lower()
        vocabulary = engine.get_vocab(with_added_tokens=True)
        # Ids that no token has keep their place, so that position = id.
        self.tokens: list[str] = [f"[no token {number}]" for number in range(max(vocabulary.values()) + 1)]
        for token, number in vocabulary.items():
            self.tokens[number] = token
        self.excluded = self._find_excluded(vocabulary)
        # What comes after the ids are known has no part in them.
        content = {key: value for key, value in self._parts.items() if key not in ("truncation", "padding", "post_processor", "decoder")}
        removed = {"stop_words": sorted(stop_words()), "regex": regex.__version__} if without_stop_words else {}
        self.fingerprint = fingerprint({"tokenizer": content, "library": tokenizers.__version__, **removed})
        rule = piece_rule(engine)
        # Which piece is the first, and so has no space before it, is not known before the stop words are gone.
        self._rule = None if rule and rule.flags & JOINED and without_stop_words else rule
        self.path: Literal["fast", "plain"] = "fast" if self._rule else "plain"

    def clean(self, caption: str) -> str:
        """See `labels.tokenizers.tokenizer.Tokenizer.clean`."""
        text = _without_surrogates(caption)
        text = remove_stop_words(text) if self._without_stop_words else text
        normalizer = self._engine.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets, see `labels.tokenizers.tokenizer.Tokenizer.encode_rows`."""
        if self.fast is not None:
            return self.fast.encode_rows(captions, limit)
        ids, offsets = self._joined([self.encode_slowly(part, limit) for part in _in_parts(captions)])
        return ids, offsets, *unique_sorted(ids, offsets, self.excluded)

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `encode_rows`."""
        return self.encode_rows(captions, limit)[:2]

    def encode_slowly(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as `encode`, by the library alone: ids int32 [T], offsets int64 [N + 1]."""
        texts = [_without_surrogates(caption) for caption in captions]
        if self._without_stop_words:
            texts = [remove_stop_words(text) for text in texts]
        rows = [row[:limit] for row in self._encode_batch(texts)]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1])), offsets

    @cached_property
    def fast(self) -> FastPieces | None:
        """The compiled path, if it gives the same ids; loaded at the first call."""
        from labels.tokenizers.fastpieces import FastPieces

        if self._rule is None:
            return None
        # Stop words leave with all spaces too many.
        flags = 0 if self._without_stop_words else self._rule.flags
        return FastPieces(self._learn, self.encode_slowly, self._max_known, flags)

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """starts_word, ends_word, bool [V] each; where ids do not tell words apart, every token is one."""
        model, inside = self._parts["model"], self._parts["model"].get("continuing_subword_prefix")
        starts, ends = np.zeros(len(self.tokens), np.bool_), np.zeros(len(self.tokens), np.bool_)
        text = json.dumps([self._parts["pre_tokenizer"], self._parts["normalizer"]])
        if model.get("end_of_word_suffix"):
            ends[:] = [token.endswith(model["end_of_word_suffix"]) for token in self.tokens]
        elif inside and model["type"] in ("WordPiece", "BPE"):
            starts[:] = [not token.startswith(inside) for token in self.tokens]
        elif "Metaspace" in text or json.dumps(_MARK) in text:
            starts[:] = [token.startswith(_MARK) for token in self.tokens]
        elif "ByteLevel" in text:
            starts[:] = [token.startswith(_BYTE_SPACE) for token in self.tokens]
        else:
            starts[:] = ends[:] = True
        return starts, ends

    def _learn(self, pieces: list[str]) -> list[list[int] | None]:
        """The ids of pieces, None for those that may not be taken alone."""
        rule = self._rule
        if rule is None:
            raise ValueError("this tokenizer takes no pieces")
        texts = [remove_from_piece(piece) for piece in pieces] if self._without_stop_words else pieces
        # A piece of which nothing stays leaves no space behind either.
        safe = [not text or rule.allows(text) for text in texts]
        rows = iter(self._encode_batch([text for text, good in zip(texts, safe, strict=True) if good]))
        return [next(rows) if good else None for good in safe]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        excluded = frozenset(self.excluded.tolist())
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [[token for token in encoding.ids if token not in excluded] for encoding in encodings]

    def _find_excluded(self, vocabulary: dict[str, int]) -> np.ndarray:
        model = self._parts["model"]
        ids = {token["id"] for token in self._parts["added_tokens"] if token["special"]}
        if model.get("unk_token") in vocabulary:
            ids.add(vocabulary[model["unk_token"]])
        if model.get("unk_id") is not None:
            ids.add(model["unk_id"])
        return np.array(sorted(ids), dtype=np.int32)

    @staticmethod
    def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, offsets in parts)])
        return np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in parts)]), np.concatenate([[0], np.cumsum(counts)]).astype(
            np.int64
        )


def make(settings: Labels) -> SubwordTokenizer:
    """See labels/tokenizers/kinds/__init__.py; takes any name.

    Raises:
        UserError: there is no such tokenizer.
    """
    return SubwordTokenizer(load_engine(find_source(settings.tokenizer)), without_stop_words=settings.stop_words == "remove")


def _in_parts(captions: Captions) -> Iterator[list[str]]:
    """Lists of a bounded number of captions."""
    try:
        arrays: list[Any] = string_arrays(captions)
    except UnicodeEncodeError:
        arrays = [captions]
    for array in arrays:
        if isinstance(array, pa.Array):
            refuse_nulls(array)
        for start, stop in pairwise([*range(0, len(array), _AT_ONCE), len(array)]):
            part = array[start:stop]
            yield part.to_pylist() if isinstance(part, pa.Array) else list(part)


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which no UTF-8 can hold, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
