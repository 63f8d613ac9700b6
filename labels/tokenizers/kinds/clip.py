"""OpenAI CLIP's byte-pair encoding: 49,408 entries, from the vocabulary file that ships with this package.

    caption -> clip_clean -> words by CLIP's pattern -> table of known words -> ids
                                    a word not in the table -> byte-pair merges, once -> into the table

The words of a caption are encoded one by one, so a table of whole words changes no id. There are two ways, with the
    same ids: `FastWords`,
compiled, and `ClipTokenizer.encode_slowly`, which is the reference, and which takes the few captions that can only be
cleaned as a whole.

    FastWords: captions -> encode_block -> missing pieces -> clean_piece, split, add_pieces -> encode_block again
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
from labels.tokenizers.tokenizer import is_stop_word, stop_words
from labels.tokenizers.word_table import FastPath, Slow

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
    """The pattern of open_clip/tokenizer.py without its special tokens: a caption that spells one stays ordinary text."""
    import regex

    return regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clip_clean(text: str) -> str:
    """CLIP's own cleaning, to the letter (open_clip/tokenizer.py: basic_clean, whitespace_clean, lower).

    Fixes mojibake, unescapes HTML entities twice, collapses white space, lowers the case.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _character_map() -> dict[int, str]:
    """ftfy's steps on single characters as one: code point to what it becomes, where that is something else."""
    from ftfy.chardata import CONTROL_CHARS, DOUBLE_QUOTE_RE, LIGATURES, SINGLE_QUOTE_RE, WIDTH_MAP
    from ftfy.fixes import fix_latin_ligatures, fix_line_breaks, remove_control_chars, uncurl_quotes

    quotes = [
        code for code in range(0x2BC, 0x2020) if SINGLE_QUOTE_RE.match(chr(code)) or DOUBLE_QUOTE_RE.match(chr(code))
    ]
    changed = {*LIGATURES, *WIDTH_MAP, *CONTROL_CHARS, *quotes, 0x0D, 0x2028, 0x2029}
    steps = (
        fix_latin_ligatures,
        lambda text: text.translate(WIDTH_MAP),
        uncurl_quotes,
        fix_line_breaks,
        remove_control_chars,
    )
    result = {}
    for code in changed:
        text = chr(code)
        for step in steps:
            text = step(text)
        result[code] = text
    return result


def clean_piece(piece: str) -> str | None:
    """What `clip_clean` makes of a piece in any caption that does not hold both `&` and `<`; None where its rest may
    matter.

    `clip_clean` of a caption is that of its pieces, joined by spaces, since every step works on a character, or on
    neighbours that no white space parts, save one: ftfy fixes the whole caption's encoding as soon as `is_bad` finds
    mojibake anywhere. So a piece for which no neighbours can make `is_bad` true is cleaned here, alone and once; the
    rest is cleaned with its caption.

    Why the steps are local, white space being tab, line feed, form feed, carriage return and space: - is_bad: a
    pattern; white space in it stands only next to the non-ASCII characters it is about, never between two of
      them, so a match has them all from one piece. `a ` before and ` a` behind allow all that any other neighbours
      allow.
    - entities: their names hold no white space. A caption with both `&` and `<` is not cleaned piecewise (ftfy looks at
    both). - ligatures, width, quotes, line breaks, control characters: one character at a time. Surrogates cannot be in
    UTF-8. - normalisation: a space neither composes nor is reordered. Lower case: a final sigma is decided by the
    letters next to it. tests/test_fast_ids.py holds every one of these sentences against ftfy, over all code points.

    Args:
        piece: one or more characters, none of them ASCII white space or an ASCII control character, no lone surrogates.
    """
    from ftfy.badness import is_bad
    from ftfy.fixes import unescape_html

    text, before = piece, None
    while text != before:
        before = text
        if "&" in text:
            text = unescape_html(text)
        # An escape sequence could only come out of an entity.
        if "\x1b" in text or is_bad(f"a {text} a"):
            return None
        text = unicodedata.normalize("NFC", text.translate(_character_map()))
        # A fullwidth ampersand: nobody has looked for a `<` in the caption.
        if "&" in text and "&" not in piece:
            return None
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


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
        """`without_stop_words`: the words of `text.stop_words` have no ids."""
        import ftfy
        import regex
        from tokenizers import Tokenizer as BpeEngine
        from tokenizers import models, pre_tokenizers

        merges = _read_merges()
        alphabet = _byte_alphabet()
        self.tokens: list[str] = [
            *alphabet,
            *(symbol + "</w>" for symbol in alphabet),
            *("".join(pair) for pair in merges),
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
        words = word_pattern().findall(text)
        return [word for word in words if not is_stop_word(word)] if self._dropped else words

    def _learn(self, words: set[str]) -> None:
        """Make sure that every one of `words` is in the table."""
        if len(self._known) + len(words) > _MAX_KNOWN_WORDS:
            # Bounded memory on any input; the table only saves time, so starting over changes nothing.
            self._known = {}
        batch = sorted(
            word for word in words if word not in self._known
        )  # `words - keys` would walk all the known ones
        for word, encoding in zip(batch, self._engine.encode_batch(batch, add_special_tokens=False), strict=True):
            self._known[word] = tuple(encoding.ids)


class FastWords(FastPath):
    """Captions to ids by a table of CLIP's words, the same ids as the slow path."""

    def __init__(
        self, merges: Merges, split: Callable[[str], list[str]], slow: Slow, max_words: int, dropped: Iterable[str] = ()
    ) -> None:
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

    def _encode(
        self, text: np.ndarray, offsets: np.ndarray, pending: np.ndarray, rows: np.ndarray, counts: np.ndarray
    ) -> int:
        from labels.tokenizers.kernels.words import encode_block

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
        from labels.tokenizers.kernels.words import add_pieces

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


def byte_pairs(
    inner: list[int], last: list[int], merges: list[tuple[int, int, int]], dropped: Iterable[int] = ()
) -> Merges:
    """Byte-pair merges for the kernel.

    Args:
        inner: 256 ids, of each byte inside a word.
        last: 256 ids, of each byte at the end of a word.
        merges: left id, right id, id of both together; the first is merged first.
        dropped: bytes that have no id where they are a word by themselves.
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
    return (
        ClipTokenizer(without_stop_words=settings.stop_words == "remove")
        if settings.tokenizer == ClipTokenizer.name
        else None
    )


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
