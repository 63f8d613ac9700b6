"""OpenAI CLIP's byte-pair encoding: 49,408 entries, from the vocabulary file that ships with this package.

    caption -> clip_clean -> words by CLIP's pattern -> table of known words -> ids
                                    a word not in the table -> byte-pair merges, once -> into the table

The words of a caption are encoded one by one, so a table of whole words changes no id. There are two ways, with the same ids:
the fast one (`labels.tokenizers.fastwords`, compiled) and the slow one below, which is the reference, and which takes the few
captions that can only be cleaned as a whole.
"""

from __future__ import annotations

import gzip
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Literal

import ftfy
import numpy as np
import regex
from tokenizers import Tokenizer as BpeEngine
from tokenizers import models, pre_tokenizers

from labels.files import fingerprint
from labels.settings import Labels
from labels.tokenizers.clean import clip_clean
from labels.tokenizers.stopwords import is_stop_word, stop_words

if TYPE_CHECKING:
    from labels.tokenizers.fastwords import FastWords
    from labels.tokenizers.word_table import Captions, Rows

# The pattern of open_clip/tokenizer.py without its special tokens: a caption that spells one stays ordinary text.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_MERGES = 49_152 - 256 - 2
_SPECIALS = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_MAX_KNOWN_WORDS = 1_000_000


class ClipTokenizer:
    """Captions to CLIP token ids, without specials.

    Attributes:
        name: `clip`.
        tokens: the vocabulary as strings, position = id.
        excluded: ids of the special tokens, which are never labels.
        fingerprint: of vocabulary, pattern, cleaning and stop words; equal fingerprints give equal ids.
        path: `fast`, the compiled way.
    """

    name = "clip"
    path: Literal["fast", "plain"] = "fast"

    def __init__(self, *, without_stop_words: bool = False) -> None:
        """`without_stop_words`: the words of `labels.tokenizers.stopwords` have no ids."""
        merges = _read_merges()
        alphabet = _byte_alphabet()
        self.tokens: list[str] = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges), *_SPECIALS]
        self.excluded = np.array([len(self.tokens) - 2, len(self.tokens) - 1], dtype=np.int32)
        self._dropped = sorted(stop_words() | set(_CONTRACTIONS)) if without_stop_words else []
        versions = {"ftfy": ftfy.__version__, "regex": regex.__version__}
        removed = {"stop_words": self._dropped} if without_stop_words else {}
        self.fingerprint = fingerprint({"name": self.name, "tokens": self.tokens, "pattern": _WORD.pattern, **versions, **removed})
        self._merges = merges
        self._vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._engine = BpeEngine(models.BPE(vocab=self._vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix=""))
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """See `labels.tokenizers.tokenizer.Tokenizer.encode`."""
        return self.encode_rows(captions, limit)[:2]

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """See `labels.tokenizers.tokenizer.Tokenizer.encode_rows`; the special tokens are in neither."""
        return self.fast.encode_rows(captions, limit)

    def clean(self, caption: str) -> str:
        """See `labels.tokenizers.tokenizer.Tokenizer.clean`."""
        text = clip_clean(caption)
        return " ".join(self._split(text)) if self._dropped else text

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Bool [V] each: tokens that begin a word (none is marked so), and tokens that end one."""
        return np.zeros(len(self.tokens), np.bool_), np.array([token.endswith("</w>") for token in self.tokens])

    @cached_property
    def fast(self) -> FastWords:
        """The compiled path; loaded at the first call, since its compiler takes longer to import than all else here."""
        from labels.tokenizers.fastwords import FastWords, byte_pairs

        symbols = {byte: symbol for symbol, byte in zip(_byte_alphabet(), _bytes_in_order(), strict=True)}
        ids = self._vocabulary
        table = byte_pairs(
            [ids[symbols[byte]] for byte in range(256)],
            [ids[symbols[byte] + "</w>"] for byte in range(256)],
            [(ids[first], ids[second], ids[first + second]) for first, second in self._merges],
            [ord(word) for word in self._dropped if len(word) == 1],
        )
        longer = [word for word in self._dropped if len(word) > 1]
        return FastWords(table, self._split, self.encode_slowly, _MAX_KNOWN_WORDS, longer)

    def encode_slowly(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as `encode`, with ftfy and the pattern over whole captions."""
        words = [self._split(clip_clean(caption)) for caption in captions]
        self._learn({word for line in words for word in line})
        known = self._known
        rows = [[token for word in line for token in known[word]][:limit] for line in words]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        ids = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
        return ids, offsets

    def _split(self, text: str) -> list[str]:
        """The words of cleaned text that count."""
        words = _WORD.findall(text)
        return [word for word in words if not is_stop_word(word)] if self._dropped else words

    def _learn(self, words: set[str]) -> None:
        """Make sure that every one of `words` is in the table."""
        if len(self._known) + len(words) > _MAX_KNOWN_WORDS:
            # Bounded memory on any input; the table only saves time, so starting over changes nothing.
            self._known = {}
        batch = sorted(word for word in words if word not in self._known)  # `words - keys` would walk all the known ones
        for word, encoding in zip(batch, self._engine.encode_batch(batch, add_special_tokens=False), strict=True):
            self._known[word] = tuple(encoding.ids)


def make(settings: Labels) -> ClipTokenizer | None:
    """See labels/tokenizers/kinds/__init__.py."""
    return ClipTokenizer(without_stop_words=settings.stop_words == "remove") if settings.tokenizer == ClipTokenizer.name else None


def _read_merges() -> list[tuple[str, str]]:
    compressed = resources.files("labels.tokenizers").joinpath("vocab/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(compressed).decode("utf8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    return [(first, second) for first, second in pairs]


def _bytes_in_order() -> list[int]:
    """The bytes in the order of CLIP's vocabulary: those with a printable Latin-1 character, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [byte for byte in range(256) if byte not in printable]


@cache
def _byte_alphabet() -> tuple[str, ...]:
    """One printable character for every byte, in the order of CLIP's vocabulary (GPT-2's bytes_to_unicode)."""
    return tuple(chr(byte) if place < 188 else chr(256 + place - 188) for place, byte in enumerate(_bytes_in_order()))
