"""CatLIP's labels (arXiv 2404.15653): the WordNet synsets of a caption's nouns that are frequent in the corpus.

    caption -> clip_clean (lower case) -> words -> lemma -> synset `lemma.n.01` -> its place in the vocabulary file
               pieces between spaces, each once, by a table of known pieces

Neither the paper nor its code was at hand for how words are cut: here a word is a run of letters and digits.
The vocabulary file is JSON: type `catlip`, wordnet (SHA-256 of the three noun files), min_count (captions), synsets (ascending).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ftfy
import numpy as np
import regex

from labels.errors import UserError
from labels.files import fingerprint, write_json
from labels.settings import Labels
from labels.tokenizers.clean import clip_clean
from labels.tokenizers.fastclean import clean_piece
from labels.tokenizers.sources import find_file, read_json
from labels.tokenizers.stopwords import remove_stop_words, stop_words
from labels.tokenizers.wordnet import Nouns, load_nouns

if TYPE_CHECKING:
    from labels.tokenizers.fastpieces import FastPieces
    from labels.tokenizers.word_table import Captions, Rows

_TYPE = "catlip"
_WORD = regex.compile(r"[\p{L}\p{N}]+")
# Cleaning treats ASCII control characters otherwise than the space that parts pieces.
_CONTROL = regex.compile(r"[\x00-\x1f\x7f]")
_MAX_KNOWN_PIECES = 1_000_000


def make(settings: Labels) -> CatlipTokenizer | None:
    """See labels/tokenizers/kinds/__init__.py."""
    file = find_file(settings.tokenizer)
    vocabulary = None if file is None else read_vocabulary(file)
    if vocabulary is None:
        return None
    return CatlipTokenizer(vocabulary, settings.wordnet, without_stop_words=settings.stop_words == "remove")


def read_vocabulary(file: Path) -> dict[str, Any] | None:
    """The vocabulary in a file; None if it is no CatLIP vocabulary.

    Raises:
        UserError: it says that it is one, but holds something else.
    """
    value = read_json(file) if file.suffix != ".txt" else None
    if value is None or value.get("type") != _TYPE:
        return None
    synsets = value.get("synsets")
    sound = isinstance(synsets, list) and all(isinstance(name, str) for name in synsets) and synsets == sorted(set(synsets))
    if not sound or not synsets or not isinstance(value.get("wordnet"), str):
        raise UserError(f"labels.tokenizer: {file} is a damaged CatLIP vocabulary", mend="make it anew with train-tokenizer --kind catlip")
    return value


def write_vocabulary(path: Path, nouns: Nouns, synsets: list[str], min_count: int) -> None:
    """Write a vocabulary file, in one step; the same synsets give the same bytes."""
    write_json(path, {"type": _TYPE, "wordnet": nouns.sha256, "min_count": min_count, "synsets": sorted(synsets)})


class CatlipTokenizer:
    """Captions to synset ids. Attributes: see `labels.tokenizers.tokenizer.Tokenizer`; `nouns`, the WordNet that is used."""

    name = _TYPE
    path: Literal["fast", "plain"] = "fast"

    def __init__(
        self, vocabulary: dict[str, Any], wordnet: str, *, without_stop_words: bool = False, max_known: int = _MAX_KNOWN_PIECES
    ) -> None:
        """
        Args:
            vocabulary: as `read_vocabulary` gives it.
            wordnet: `labels.wordnet`.
            without_stop_words: NLTK's stop words have no labels.
            max_known: bound of the table of known pieces.

        Raises:
            UserError: WordNet is not there, or another one than the vocabulary was made with.
        """
        self.nouns = load_nouns(wordnet)
        if self.nouns.sha256 != vocabulary["wordnet"]:
            raise UserError(
                f"labels.tokenizer: the CatLIP vocabulary was made with WordNet {vocabulary['wordnet'][:12]}, "
                f"labels.wordnet is {self.nouns.sha256[:12]}",
                mend="set labels.wordnet to that WordNet, or make the vocabulary anew with train-tokenizer --kind catlip",
            )
        self.tokens: list[str] = vocabulary["synsets"]
        self.excluded = np.empty(0, dtype=np.int32)
        self._without_stop_words = without_stop_words
        self._max_known = max_known
        self._ids = {name: number for number, name in enumerate(self.tokens)}
        versions = {"ftfy": ftfy.__version__, "regex": regex.__version__}
        removed = {"stop_words": sorted(stop_words())} if without_stop_words else {}
        self.fingerprint = fingerprint({"name": _TYPE, "wordnet": self.nouns.sha256, "tokens": self.tokens, **versions, **removed})

    @classmethod
    def of_all_nouns(cls, wordnet: str) -> CatlipTokenizer:
        """Every synset that WordNet offers for a label, for counting."""
        nouns = load_nouns(wordnet)
        return cls({"wordnet": nouns.sha256, "synsets": nouns.synsets}, wordnet)

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Bool [V] each: every synset is a word."""
        return np.ones(len(self.tokens), np.bool_), np.ones(len(self.tokens), np.bool_)

    @cached_property
    def fast(self) -> FastPieces:
        """The compiled path; loaded at the first call."""
        from labels.tokenizers.fastpieces import FastPieces
        from labels.tokenizers.kernels.pieces import MARKUP

        return FastPieces(self._learn, self.encode_slowly, self._max_known, MARKUP)

    def clean(self, caption: str) -> str:
        """See `labels.tokenizers.tokenizer.Tokenizer.clean`."""
        text = clip_clean(caption)
        return remove_stop_words(text) if self._without_stop_words else text

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Synset ids in the words' order, and label sets, see `labels.tokenizers.tokenizer.Tokenizer.encode_rows`."""
        return self.fast.encode_rows(captions, limit)

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `encode_rows`."""
        return self.encode_rows(captions, limit)[:2]

    def encode_slowly(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as `encode`, cleaning whole captions: ids int32 [T], offsets int64 [N + 1]."""
        rows = [self._word_ids(clip_clean(caption))[:limit] for caption in captions]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1])), offsets

    def _learn(self, pieces: list[str]) -> list[list[int] | None]:
        """The ids of pieces, None for those that have to be cleaned with their caption."""
        cleaned = [None if _CONTROL.search(piece) else clean_piece(piece) for piece in pieces]
        return [None if text is None else self._word_ids(text) for text in cleaned]

    def _word_ids(self, text: str) -> list[int]:
        """The ids of cleaned text."""
        if self._without_stop_words:
            text = remove_stop_words(text)
        names = map(self.nouns.synset, _WORD.findall(text))
        return [self._ids[name] for name in names if name in self._ids]
