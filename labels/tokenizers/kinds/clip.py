"""OpenAI CLIP's byte-pair encoding: 49,408 entries, from the vocabulary file that ships with this package.

    caption -> clip_clean -> words by CLIP's pattern -> table of known words -> ids
                             a new word -> byte-pair merges, once -> into the table
    FastWords: captions -> encode_block -> missing pieces -> clean_piece, split, add_pieces -> encode_block again

CLIP's BPE encodes the words of a caption one by one, so a table of known words changes no id. Two paths have the same
ids: `FastWords`, compiled, and `ClipTokenizer.encode_slowly`, the reference, which also takes the few captions that can
only be cleaned as a whole. Cleaning and splitting follow open_clip with the same ftfy and regex.
"""

from __future__ import annotations

import gzip
import html
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Literal

import numpy as np

from labels.settings import Labels
from labels.storage import fingerprint
from labels.tokenizers.tokenizer import Tokenizer, is_stop_word, stop_words
from labels.tokenizers.word_table import FastPath, Slow, flat_rows

if TYPE_CHECKING:
    import regex

    from labels.tokenizers.kernels.words import Merges
    from labels.tokenizers.word_table import Captions, Rows

_MERGES = 49_152 - 256 - 2
_SPECIALS = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_MAX_KNOWN_WORDS = 1_000_000


@cache
def word_pattern() -> regex.Pattern[str]:
    """The pattern of open_clip/tokenizer.py without its special tokens: captions that spell one are ordinary text."""
    import regex

    return regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clip_clean(text: str) -> str:
    """CLIP's cleaning (open_clip/tokenizer.py: basic_clean, whitespace_clean, lower): fix mojibake, unescape HTML
    entities twice, collapse white space, lower the case.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _character_map() -> dict[int, str]:
    """ftfy's steps on single characters in one table: code point -> replacement, if it changes."""
    from ftfy.chardata import CONTROL_CHARS, DOUBLE_QUOTE_RE, LIGATURES, SINGLE_QUOTE_RE, WIDTH_MAP
    from ftfy.fixes import fix_latin_ligatures, fix_line_breaks, remove_control_chars, uncurl_quotes

    patterns = (SINGLE_QUOTE_RE, DOUBLE_QUOTE_RE)
    quotes = [code for code in range(0x2BC, 0x2020) if any(pattern.match(chr(code)) for pattern in patterns)]
    changed = {*LIGATURES, *WIDTH_MAP, *CONTROL_CHARS, *quotes, 0x0D, 0x2028, 0x2029}
    result = {}
    for code in changed:
        text = uncurl_quotes(fix_latin_ligatures(chr(code)).translate(WIDTH_MAP))
        result[code] = remove_control_chars(fix_line_breaks(text))
    return result


def clean_piece(piece: str) -> str | None:
    """`clip_clean` of a piece without ASCII white space, ASCII control characters and lone surrogates, in any caption
    that does not hold both `&` and `<`; None if the rest of the caption may change the result.

    `clip_clean` of a caption is that of its pieces joined by spaces, since every step but one works on a character or
    on neighbours without white space between them. The exception: ftfy fixes the whole caption's encoding as soon as
    `is_bad` finds mojibake anywhere. So a piece that no neighbours can make bad is cleaned alone, once.
    tests/labels/test_fast_ids.py checks the following against ftfy over all code points:
    - is_bad is a pattern with white space only next to the non-ASCII characters it is about, never between two of them:
      all of a match are in one piece. `a ` before and ` a` behind allow all that other neighbours allow.
    - names of entities hold no white space; ftfy skips entities only if the caption has a `<`.
    - ligatures, width, quotes, line breaks, control characters: single characters. NFC: a space neither composes nor is
      reordered. Lower case: the letters next to a final sigma decide on it.
    """
    from ftfy.badness import is_bad
    from ftfy.fixes import unescape_html

    text, before = piece, None
    while text != before:
        before = text
        if "&" in text:
            text = unescape_html(text)
        if "\x1b" in text or is_bad(f"a {text} a"):  # an escape can only come from an entity
            return None
        text = unicodedata.normalize("NFC", text.translate(_character_map()))
        if "&" in text and "&" not in piece:  # from a fullwidth ampersand: the caption was not searched for a `<`
            return None
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


class ClipTokenizer(Tokenizer):
    """Captions to CLIP token ids without special tokens."""

    name = "clip"
    path: Literal["fast", "plain"] = "fast"

    def __init__(self, *, without_stop_words: bool = False) -> None:
        import ftfy
        import regex
        from tokenizers import Tokenizer as BpeEngine
        from tokenizers import models, pre_tokenizers

        merges, alphabet = _read_merges(), _byte_alphabet()
        self.tokens: list[str] = [
            *alphabet,
            *(symbol + "</w>" for symbol in alphabet),
            *map("".join, merges),
            *_SPECIALS,
        ]
        self.excluded = np.array([len(self.tokens) - 2, len(self.tokens) - 1], dtype=np.int32)
        self._dropped = sorted(stop_words() | set(_CONTRACTIONS)) if without_stop_words else []
        versions = {"ftfy": ftfy.__version__, "regex": regex.__version__}
        removed = {"stop_words": self._dropped} if without_stop_words else {}
        self.fingerprint = fingerprint(
            {"name": self.name, "tokens": self.tokens, "pattern": word_pattern().pattern, **versions, **removed}
        )
        self._merges = merges
        self._vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._engine = BpeEngine(
            models.BPE(vocab=self._vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
        )
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._known: dict[str, tuple[int, ...]] = {}

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        return self.fast.encode_rows(captions, limit)

    def clean(self, caption: str) -> str:
        text = clip_clean(caption)
        return " ".join(self._split(text)) if self._dropped else text

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        # no token is marked as the beginning of a word
        return np.zeros(len(self.tokens), np.bool_), np.array([token.endswith("</w>") for token in self.tokens])

    @cached_property
    def fast(self) -> FastWords:
        """The compiled path, made at the first call: numba takes long to import."""
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
        """`encode` with ftfy and the pattern over whole captions."""
        words = [self._split(clip_clean(caption)) for caption in captions]
        self._learn({word for line in words for word in line})
        known = self._known
        return flat_rows([[token for word in line for token in known[word]][:limit] for line in words])

    def _split(self, text: str) -> list[str]:
        """The words of cleaned text, without removed stop words."""
        words = word_pattern().findall(text)
        return [word for word in words if not is_stop_word(word)] if self._dropped else words

    def _learn(self, words: set[str]) -> None:
        if len(self._known) + len(words) > _MAX_KNOWN_WORDS:
            self._known = {}  # bounded memory; an empty table costs time, but changes no id
        batch = sorted(word for word in words if word not in self._known)  # `words - keys` would visit all known ones
        for word, encoding in zip(batch, self._engine.encode_batch(batch, add_special_tokens=False), strict=True):
            self._known[word] = tuple(encoding.ids)


class FastWords(FastPath):
    """Captions to ids by a table of CLIP's words, the same ids as the slow path.

    `split`: cleaned text -> its words; `dropped`: words without ids of two or more ASCII characters (those of one are
    for `byte_pairs`); `slow`, `max_words`: see `FastPath`.
    """

    def __init__(
        self, merges: Merges, split: Callable[[str], list[str]], slow: Slow, max_words: int, dropped: Iterable[str] = ()
    ) -> None:
        self._dropped = sorted(dropped)
        super().__init__(slow, max_words, len(self._dropped))
        self._merges, self._split = merges, split
        self._start_table()

    def _start_table(self) -> None:
        self._add([(word.encode("ascii"), True, []) for word in self._dropped])

    def _encode(
        self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray
    ) -> int:
        from labels.tokenizers.kernels.words import encode_block

        return encode_block(self._words, self._merges, text, offsets, pending, rows, counts, self._missing)

    def _learn(self, text: np.ndarray, missing: np.ndarray) -> None:
        data, cleaned_pieces = text.data, []
        for raw in {bytes(data[begin:end]) for begin, end in missing.tolist()}:
            cleaned = clean_piece(raw.decode("utf8"))
            cleaned_pieces.append((raw, cleaned is not None, self._split(cleaned or "")))
        self._add(cleaned_pieces)

    def _add(self, cleaned_pieces: list[tuple[bytes, bool, list[str]]]) -> None:
        """Add pieces to the table: their bytes, whether they may be cleaned alone, and their words after cleaning."""
        from labels.tokenizers.kernels.words import add_pieces

        buffer = bytearray()
        pieces, first_word, word_ends = [], [0], []
        for raw, _, words in cleaned_pieces:
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
            np.array([safe for _, safe, _ in cleaned_pieces], dtype=np.bool_),
        )


def byte_pairs(
    inner: list[int], last: list[int], merges: list[tuple[int, int, int]], dropped: Iterable[int] = ()
) -> Merges:
    """Byte-pair merges for the kernel: ids of the 256 bytes inside a word and at its end; left, right and merged id of
    each merge, by rank; bytes that have no id as a word of their own.
    """
    from labels.tokenizers.kernels.words import MAX_WORD_BYTES, Merges, add_pairs

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


def make(settings: Labels) -> ClipTokenizer | None:
    """See labels/tokenizers/kinds/__init__.py."""
    if settings.tokenizer != ClipTokenizer.name:
        return None
    return ClipTokenizer(without_stop_words=settings.stop_words == "remove")


def _read_merges() -> list[tuple[str, str]]:
    compressed = resources.files("labels.tokenizers").joinpath("vocab/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(compressed).decode("utf8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    return [(first, second) for first, second in pairs]


def _bytes_in_order() -> list[int]:
    """The bytes in the order of CLIP's vocabulary: those that are printable in Latin-1, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [byte for byte in range(256) if byte not in printable]


@cache
def _byte_alphabet() -> tuple[str, ...]:
    """One printable character for every byte, in the order of CLIP's vocabulary (GPT-2's bytes_to_unicode)."""
    return tuple(chr(byte) if row < 188 else chr(256 + row - 188) for row, byte in enumerate(_bytes_in_order()))
