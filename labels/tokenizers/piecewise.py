"""Which tokenizers give a caption the ids of its pieces between single spaces, one after another; and which pieces may be taken alone.

A tokenizer normalises the caption, cuts it into words, and encodes each word alone. Its ids are those of the pieces if
- the normaliser works on characters, or on neighbours that no space parts; `Rule.allows` sees it do so for every piece, and
- the cutting parts the text at every space, whatever stands beside it. Three kinds do, and nothing else is trusted:
  DROPPING  white space is removed first, then each word is taken alone (BERT, Whitespace, CLIP's pattern): any piece, any space.
  MARKING   a word begins with the space before it (ByteLevel, GPT's patterns, Metaspace): no white space but spaces. Those too
            many in a row are a piece of their own, unless the normaliser is after them. If the first word is given a space
            too, all pieces are alike; else a piece is JOINED to the space before it.
  WHOLE     no cutting, but a BPE none of whose tokens has a space mark behind another character, so that no merge crosses
            one (LLaMA): single spaces, no other white space.
White space is what Python takes for it, which is more than the `tokenizers` library does. tests/test_tokenizers.py holds all this
against the library over all of Unicode.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Engine

from labels.tokenizers.kernels.pieces import JOINED, RUNS, STRICT

_CUTTING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_BY_CHARACTER = ("BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled")
# CLIP's words, with and without its special tokens, in its own tokenizer.json: matches hold no white space, the rest is removed.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = (_CLIP_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _CLIP_WORDS)
# The patterns of GPT-2, of cl100k and LLaMA 3, and of Qwen 2: a space is only ever the first character of a match.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKING = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
)
_MARK = "\u2581"


@dataclass(frozen=True)
class Rule:
    """How a tokenizer may be taken piece by piece.

    Attributes:
        flags: for `labels.tokenizers.fastpieces`.
        normalize: the tokenizer's normaliser.
        added: texts of which none may stand in a piece, since the tokenizer cuts them out first.
        marks: how many space marks the normal form of a piece may have; None if they mean nothing to this tokenizer.
    """

    flags: int
    normalize: Callable[[str], str]
    added: tuple[str, ...]
    marks: int | None

    def allows(self, piece: str) -> bool:
        """Whether a caption's ids are those of this piece and of the rest, whatever the rest is."""
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
    """The rule for a tokenizer, None if nothing is known that would allow pieces to be taken alone."""
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
    spaced = any(step["type"] == "Strip" or (step["type"] == "Replace" and "Regex" in step["pattern"]) for step in normalizers)
    if flags & RUNS and spaced:
        flags &= ~RUNS
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
    """Flags if the first step removes white space, and no later one looks at where a word stands in its caption."""
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
        known = steps[0]["pattern"].get("Regex") in _MARKING and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        return STRICT | RUNS | JOINED if known and not last["use_regex"] and not last["add_prefix_space"] else None
    return None


def _llama_normalizer(steps: Sequence[dict[str, Any]]) -> bool:
    """A mark before the text, and one in place of every space."""
    return list(steps) == [
        {"type": "Prepend", "prepend": _MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
    ]


def _no_token_crosses(model: dict[str, Any]) -> bool:
    """A BPE none of whose tokens has a space mark behind another character."""
    return model["type"] == "BPE" and not any(_MARK in token.lstrip(_MARK) for token in model["vocab"])


def _is_local(step: dict[str, Any], flags: int) -> bool:
    """Whether a step of the normaliser keeps single spaces and looks at nothing beyond them."""
    if step["type"] == "Strip":
        # The left end of a joined piece is the space that it must keep.
        return not (step["strip_left"] and flags & JOINED)
    if step["type"] == "Replace":
        literal, pattern = step["pattern"].get("String"), step["pattern"].get("Regex")
        if literal is not None:
            return bool(literal) and not any(character.isspace() for character in literal)
        return (pattern == " {2,}" and (step["content"] == " " or bool(flags & STRICT))) or (pattern == r"\s+" and step["content"] == " ")
    return step["type"] in _BY_CHARACTER


def _added_texts(engine: Engine, normalize: Callable[[str], str]) -> tuple[str, ...] | None:
    """What the tokenizer cuts out of a caption before all else; None if one of them may reach over a space.

    Special tokens are not among them: `encode_special_tokens` makes them ordinary text.
    """
    texts = set[str]()
    for token in engine.get_added_tokens_decoder().values():
        if not token.special:
            texts |= {token.content, normalize(token.content)}
    if any(not text or any(character.isspace() for character in text) for text in texts):
        return None
    return tuple(sorted(texts))
