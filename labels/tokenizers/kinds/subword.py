"""Any tokenizer of the `tokenizers` library (WordPiece, unigram, BPE, word-level): the same ids, in most cases faster.

    caption -> without stop words -> pieces -> table of known pieces -> ids                 (path `fast`)
                                   |   a new piece -> the library, once -> into the table
                                   +-> the library, whole captions                          (path `plain`)

`piece_rule` decides whether a caption's ids are those of its pieces between single spaces, one after another. A
tokenizer normalizes a caption, splits it into words, and encodes each word alone. The ids are those of the pieces if
- the normalizer works on characters, or on neighbours without a space between them: `Rule.allows` checks each piece;
- the text is split at every space, whatever is next to it. Three kinds do, and every other tokenizer takes `plain`:
  DROPPING  removes white space, then encodes words alone (BERT, Whitespace, CLIP's pattern): any piece, any space.
  MARKING   begins a word with the space before it (ByteLevel, GPT's patterns, Metaspace): no white space but spaces.
            More than one in a row are a piece of their own, unless the normalizer changes them. A piece is JOINED to
            the space before it, unless the first word is given a space too.
  WHOLE     does not split, but no token of its BPE has a space mark behind another character, so that no merge crosses
            one (LLaMA): single spaces, no other white space.
White space is that of Python, a superset of the library's. tests/labels/test_tokenizers.py checks all this against the
library over all of Unicode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from labels.arrays import unique_sorted
from labels.settings import Labels
from labels.storage import fingerprint
from labels.tokenizers.kernels.pieces import JOINED, RUNS, STRICT
from labels.tokenizers.tokenizer import (
    Tokenizer,
    find_source,
    load_engine,
    remove_from_piece,
    remove_stop_words,
    stop_words,
)
from labels.tokenizers.word_table import FastPieces, flat_rows, join_rows, refuse_nulls, string_arrays

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

    from labels.tokenizers.word_table import Captions, Rows

_MAX_KNOWN_PIECES = 1_000_000
_AT_ONCE = 4096
_MARK, _BYTE_SPACE = "\u2581", "\u0120"
_CUTTING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_BY_CHARACTER = ("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled")
# CLIP's words in its tokenizer.json, with and without special tokens: matches hold no white space, the rest is removed.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = (_CLIP_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _CLIP_WORDS)
# The patterns of GPT-2, of cl100k and LLaMA 3, and of Qwen 2: a space is only ever the first character of a match.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKING = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
)


class SubwordTokenizer(Tokenizer):
    """Captions to the ids of an engine of `load_engine`, without special tokens and the unknown token."""

    def __init__(self, engine: Engine, *, without_stop_words: bool = False, max_known: int = _MAX_KNOWN_PIECES) -> None:
        import regex
        import tokenizers

        self._engine = engine
        self._parts: dict[str, Any] = json.loads(engine.to_str())
        self._without_stop_words = without_stop_words
        self._max_known = max_known
        model = self._parts["model"]
        self.name: str = model["type"].lower()
        vocabulary = engine.get_vocab(with_added_tokens=True)
        # Unused ids are named too, so that position = id.
        self.tokens: list[str] = [f"[no token {number}]" for number in range(max(vocabulary.values()) + 1)]
        for token, number in vocabulary.items():
            self.tokens[number] = token
        self.excluded = self._find_excluded(vocabulary)
        unused = ("truncation", "padding", "post_processor", "decoder")  # they do not change the ids
        content = {key: value for key, value in self._parts.items() if key not in unused}
        removed = {"stop_words": sorted(stop_words()), "regex": regex.__version__} if without_stop_words else {}
        self.fingerprint = fingerprint({"tokenizer": content, "library": tokenizers.__version__, **removed})
        rule = piece_rule(engine)
        # Only after the removal of stop words it is known which piece is the first, and so has no space before it.
        self._rule = None if rule and rule.flags & JOINED and without_stop_words else rule
        self.path: Literal["fast", "plain"] = "fast" if self._rule else "plain"

    def clean(self, caption: str) -> str:
        text = _without_surrogates(caption)
        text = remove_stop_words(text) if self._without_stop_words else text
        normalizer = self._engine.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        if self.fast is not None:
            return self.fast.encode_rows(captions, limit)
        ids, offsets = join_rows([self.encode_slowly(part, limit) for part in _in_parts(captions)])
        return ids, offsets, *unique_sorted(ids, offsets, self.excluded)

    def encode_slowly(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode` by the library alone: ids int32 [T], offsets int64 [N + 1]."""
        texts = [_without_surrogates(caption) for caption in captions]
        if self._without_stop_words:
            texts = [remove_stop_words(text) for text in texts]
        return flat_rows([row[:limit] for row in self._encode_batch(texts)])

    @cached_property
    def fast(self) -> FastPieces | None:
        """The compiled path, if it gives the same ids; made at the first call."""
        if self._rule is None:
            return None
        # The removal of stop words also removes repeated spaces.
        flags = 0 if self._without_stop_words else self._rule.flags
        return FastPieces(self._learn, self.encode_slowly, self._max_known, flags)

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """starts_word, ends_word, bool [V] each; every token is a word if the vocabulary marks no borders."""
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
        """The ids of pieces, None for those that may not be encoded alone."""
        assert self._rule is not None
        texts = [remove_from_piece(piece) for piece in pieces] if self._without_stop_words else pieces
        safe = [not text or self._rule.allows(text) for text in texts]  # an empty piece leaves no space either
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


def make(settings: Labels) -> SubwordTokenizer:
    """See labels/tokenizers/kinds/__init__.py; accepts any name, or raises a UserError."""
    engine = load_engine(find_source(settings.tokenizer))
    return SubwordTokenizer(engine, without_stop_words=settings.stop_words == "remove")


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
    """Text with U+FFFD for lone surrogates, which are no UTF-8."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Rule:
    """How a tokenizer may encode piece by piece."""

    flags: int  # of `kernels.pieces`
    normalize: Callable[[str], str]
    added: tuple[str, ...]  # texts that no piece may hold, since the tokenizer splits them off first
    marks: int | None  # space marks that a normalized piece may have at most; None: the tokenizer has no marks

    def allows(self, piece: str) -> bool:
        """Whether the ids of any caption with this piece are those of the piece and of the rest."""
        normal = self.normalize(piece)
        if piece.isspace() and piece.strip(" ") == "" and self.flags & RUNS:
            return self.normalize(f"a{piece} a{piece}") == f"a{piece} a{piece}"
        if any(text in piece or text in normal for text in self.added):
            return False
        if self.flags & STRICT:
            body, normal_body = (text.removeprefix(" ") if self.flags & JOINED else text for text in (piece, normal))
            if not normal_body:
                return False
            # Python's str.isspace knows all white space; the Mongolian vowel separator was white space in older tables.
            if any(character.isspace() or character in "\u180e\u200b\ufeff" for character in body + normal_body):
                return False
            if self.marks is not None and (_MARK in piece or normal.count(_MARK) > self.marks):
                return False
        space = "" if self.flags & JOINED else " "
        around = self.normalize(f"a{space}{piece} a")
        if self.marks == 1:
            return around == self.normalize("a") + normal + self.normalize("a")
        return around == f"a{space}{normal} a"


def piece_rule(engine: Engine) -> Rule | None:
    """The rule for a tokenizer; None if it is not known to allow pieces to be encoded alone."""
    parts = json.loads(engine.to_str())
    normalizers = _flat(parts["normalizer"], "normalizers")
    pre_tokenizers = _flat(parts["pre_tokenizer"], "pretokenizers")
    marks = None
    whole = _llama_normalizer(normalizers)
    flags = _dropping(pre_tokenizers)
    if whole and not pre_tokenizers and _no_token_crosses(parts["model"]):
        flags, marks = STRICT, 1
    elif flags is None and pre_tokenizers:
        flags = _marking(pre_tokenizers, parts["model"])
        marks = 0 if pre_tokenizers[-1]["type"] == "Metaspace" else None
    if flags is None or not (whole or all(_is_local(step, flags) for step in normalizers)):
        return None
    if any(step["type"] == "Strip" or "Regex" in step.get("pattern", ()) for step in normalizers):
        flags &= ~RUNS  # these steps change spaces
    normalizer = engine.normalizer
    normalize = normalizer.normalize_str if normalizer is not None else str
    added = _added_texts(engine, normalize)
    return None if added is None else Rule(flags, normalize, added, marks)


def _flat(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence within sequences."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _flat(inner, name)] if part["type"] == "Sequence" else [part]


def _dropping(steps: Sequence[dict[str, Any]]) -> int | None:
    """Flags if the first step removes white space, and no later one depends on a word's position in the caption."""
    if not steps:
        return None
    first = steps[0]
    words = first["type"] == "Split" and first["pattern"].get("Regex") in _WORDS
    cutting = words and first["invert"] and first["behavior"] == "Removed"
    if first["type"] not in _CUTTING and not cutting:
        return None
    return None if any(step["type"] == "Metaspace" and step["prepend_scheme"] == "first" for step in steps) else 0


def _marking(steps: Sequence[dict[str, Any]], model: dict[str, Any]) -> int | None:
    """Flags if every space begins a word."""
    last = steps[-1]
    if len(steps) == 1 and last["type"] == "ByteLevel" and last["use_regex"]:
        return STRICT | RUNS if last["add_prefix_space"] else STRICT | RUNS | JOINED
    if len(steps) == 1 and last["type"] == "Metaspace" and last["replacement"] == _MARK:
        if not last["split"] and not _no_token_crosses(model):
            return None
        return STRICT | (RUNS if last["split"] else 0) | (0 if last["prepend_scheme"] == "always" else JOINED)
    if len(steps) == 2 and steps[0]["type"] == "Split" and last["type"] == "ByteLevel":
        split = steps[0]
        known = split["pattern"].get("Regex") in _MARKING and split["behavior"] == "Isolated" and not split["invert"]
        return STRICT | RUNS | JOINED if known and not last["use_regex"] and not last["add_prefix_space"] else None
    return None


def _llama_normalizer(steps: Sequence[dict[str, Any]]) -> bool:
    """A mark before the text, and one instead of every space."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    return list(steps) == [{"type": "Prepend", "prepend": _MARK}, replace]


def _no_token_crosses(model: dict[str, Any]) -> bool:
    """A BPE none of whose tokens has a space mark behind another character."""
    return model["type"] == "BPE" and not any(_MARK in token.lstrip(_MARK) for token in model["vocab"])


def _is_local(step: dict[str, Any], flags: int) -> bool:
    """Whether a step of the normalizer keeps single spaces and never looks across them."""
    if step["type"] == "Strip":  # a JOINED piece must keep the space at its left end
        return not (step["strip_left"] and flags & JOINED)
    if step["type"] == "Replace":
        literal, pattern = step["pattern"].get("String"), step["pattern"].get("Regex")
        if literal is not None:
            return bool(literal) and not any(character.isspace() for character in literal)
        to_space = step["content"] == " "
        return (pattern == " {2,}" and (to_space or bool(flags & STRICT))) or (pattern == r"\s+" and to_space)
    return step["type"] in _BY_CHARACTER


def _added_texts(engine: Engine, normalize: Callable[[str], str]) -> tuple[str, ...] | None:
    """Texts that the tokenizer splits off first, without special tokens (`encode_special_tokens` makes these ordinary
    text); None if one may hold a space.
    """
    texts = set[str]()
    for token in engine.get_added_tokens_decoder().values():
        if not token.special:
            texts |= {token.content, normalize(token.content)}
    if any(not text or any(character.isspace() for character in text) for text in texts):
        return None
    return tuple(sorted(texts))
