"""OpenAI CLIP's byte-pair encoding: 49,408 entries, from the vocabulary file that ships beside this module.

    caption -> clip_clean -> words by CLIP's pattern -> table of known words -> ids
                                    a word not in the table -> tokenizers' BPE, once -> into the table

The words of a caption are encoded one by one, so a table of whole words changes no id.
"""

import gzip
from functools import cache
from importlib import resources

import ftfy
import numpy as np
import regex
from tokenizers import Tokenizer as BpeEngine
from tokenizers import models, pre_tokenizers

from labels.files import fingerprint
from preprocess.clean import clip_clean

# The pattern of open_clip/tokenizer.py without its special tokens: a caption that spells one stays ordinary text.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_MERGES = 49_152 - 256 - 2
_SPECIALS = ("<start_of_text>", "<end_of_text>")
_MAX_KNOWN_WORDS = 1_000_000


class ClipTokenizer:
    """Captions to CLIP token ids, without specials.

    Attributes:
        name: `clip`.
        tokens: the vocabulary as strings, position = id.
        excluded: ids of the special tokens, which are never labels.
        fingerprint: of vocabulary, pattern and cleaning; equal fingerprints give equal ids.
    """

    name = "clip"

    def __init__(self) -> None:
        merges = _read_merges()
        alphabet = _byte_alphabet()
        self.tokens: list[str] = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges), *_SPECIALS]
        self.excluded = np.array([len(self.tokens) - 2, len(self.tokens) - 1], dtype=np.int32)
        self.fingerprint = fingerprint(
            {"name": self.name, "tokens": self.tokens, "pattern": _WORD.pattern, "ftfy": ftfy.__version__, "regex": regex.__version__}
        )
        vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._engine = BpeEngine(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix=""))
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of N captions, T in all.

        Args:
            captions: N strings, as they came.
            limit: at most this many ids a caption; the rest is cut off.

        Returns:
            ids int32 [T], offsets int64 [N + 1].
        """
        words = [_WORD.findall(clip_clean(caption)) for caption in captions]
        self._learn({word for line in words for word in line})
        known = self._known
        rows = [[token for word in line for token in known[word]][:limit] for line in words]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        ids = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
        return ids, offsets

    def _learn(self, words: set[str]) -> None:
        """Make sure that every one of `words` is in the table."""
        if len(self._known) + len(words) > _MAX_KNOWN_WORDS:
            # Bounded memory on any input; the table only saves time, so starting over changes nothing.
            self._known = {}
        batch = sorted(words - self._known.keys())
        for word, encoding in zip(batch, self._engine.encode_batch(batch, add_special_tokens=False), strict=True):
            self._known[word] = tuple(encoding.ids)


def _read_merges() -> list[tuple[str, str]]:
    compressed = resources.files("preprocess").joinpath("vocab/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(compressed).decode("utf8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    return [(first, second) for first, second in pairs]


@cache
def _byte_alphabet() -> tuple[str, ...]:
    """One printable character for every byte, in the order of CLIP's vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in printable]
    return tuple(map(chr, printable)) + tuple(chr(256 + position) for position in range(len(other)))
