"""What stage 1 needs of a tokenizer, and how one is chosen (`labels.tokenizer`, `labels.stop_words`, `labels.wordnet`)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from labels.settings import Labels
from preprocess.tokens.clip_bpe import ClipTokenizer

if TYPE_CHECKING:
    from preprocess.tokens.fastpath import Captions, Rows


class Tokenizer(Protocol):
    """Captions to ids; V tokens, N captions, T ids.

    Attributes:
        name: what the manifest calls it: `clip`, `catlip`, or the kind of model, such as `wordpiece`.
        tokens: the vocabulary as strings, position = id.
        excluded: ids that are never labels: special tokens and the unknown token, ascending.
        fingerprint: of everything that decides ids; equal fingerprints give equal ids.
        path: `fast`, the compiled way, or `plain`, the tokenizer itself for every caption. The ids are the same.
    """

    name: str
    tokens: list[str]
    excluded: np.ndarray
    fingerprint: str
    path: Literal["fast", "plain"]

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """starts_word, ends_word, bool [V] each: a word border lies between ids a and b if ends_word[a] or starts_word[b]."""
        ...

    def clean(self, caption: str) -> str:
        """The text that is cut into tokens: a caption after cleaning and without removed stop words. For people; ids do without."""
        ...

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets of N captions; the excluded ids are in neither.

        Args:
            captions: N strings, as they came; a list or an Arrow array without nulls.
            limit: at most this many ids a caption; the rest is cut off.

        Returns:
            ids int32 [T], offsets int64 [N + 1]; label_ids int32 [T'], a caption's distinct ids in ascending order, and
            label_offsets int64 [N + 1].

        Raises:
            ValueError: a caption is null.
        """
        ...

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `encode_rows`."""
        ...


def make_tokenizer(settings: Labels) -> Tokenizer:
    """The tokenizer of these settings; one a process, so that its table of known words serves all shards.

    Raises:
        UserError: there is no such tokenizer, or its file is not one.
    """
    return _make(settings.tokenizer, settings.stop_words == "remove", settings.wordnet)


@cache
def _make(name: str, without_stop_words: bool, wordnet: str) -> Tokenizer:
    if name == "clip":
        return ClipTokenizer(without_stop_words=without_stop_words)
    # Here, not above: CLIP's tokenizer is made without reading what only the others need.
    from preprocess.tokens.catlip import CatlipTokenizer, read_vocabulary
    from preprocess.tokens.sources import find_source, load_engine
    from preprocess.tokens.subword import SubwordTokenizer

    source = find_source(name)
    vocabulary = read_vocabulary(source)
    if vocabulary is not None:
        return CatlipTokenizer(vocabulary, wordnet, without_stop_words=without_stop_words)
    return SubwordTokenizer(load_engine(source), without_stop_words=without_stop_words)
