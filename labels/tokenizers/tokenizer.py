"""What stage 1 needs of a tokenizer, and how one is chosen (`labels.tokenizer`, `labels.stop_words`, `labels.wordnet`)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from labels.kinds import TOKENIZERS, names_in
from labels.settings import Labels

if TYPE_CHECKING:
    from labels.tokenizers.word_table import Captions, Rows

_ANY = "subword"
"""The family that is asked last: it takes every name, or refuses it with what is allowed."""


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
    return _make(settings.tokenizer, settings.stop_words, settings.wordnet)


@cache
def _make(name: str, stop_words: Literal["keep", "remove"], wordnet: str) -> Tokenizer:
    """The first one that a family gives, by what decides ids."""
    settings = Labels(tokenizer=name, stop_words=stop_words, wordnet=wordnet)
    # The family of that very name first: CLIP's tokenizer is made without reading what only the others need.
    order = sorted(names_in(TOKENIZERS), key=lambda family: (family != name, family == _ANY))
    made = (import_module(f"{TOKENIZERS}.{family}").make(settings) for family in order)
    return next(tokenizer for tokenizer in made if tokenizer is not None)
