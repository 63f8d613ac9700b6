"""Captions without stop words, and tokens as people read them.

`remove_stop_words` (`labels.stop_words: remove`): a caption without the 179 English stop words of NLTK. The list is the
    English one of
NLTK's public stopwords corpus (nltk_data, after Porter and others), as it stood with 179 words; it is a list of common
words without a licence of its own, kept in labels/tokenizers/vocab/stop_words_en.txt, one a line. `text_of`, `name_of`:
the marks that vocabularies put at word borders, and their bytes as characters, turned into text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

_END, _BYTE_SPACE, _MARK, _INSIDE = "</w>", "\u0120", "\u2581", "##"
_REPLACEMENT = "\ufffd"


@cache
def _word() -> regex.Pattern[str]:
    """A word: letters with apostrophes inside, no digit, mark or underscore next to it. Possessive, so that no part of
    a word is one.
    """
    import regex

    return regex.compile(r"(?<![\p{L}\p{M}\p{N}_])\p{L}++(?:['’]\p{L}++)*+(?![\p{M}\p{N}_])")


@cache
def stop_words() -> frozenset[str]:
    """The list, in lower case, with straight apostrophes."""
    return frozenset(resources.files("labels.tokenizers").joinpath("vocab/stop_words_en.txt").read_text("utf8").split())


def is_stop_word(word: str) -> bool:
    """Whether one of CLIP's words is dropped: it is in the list, or is without its apostrophe (`don't` comes as `don`
    and `'t`).

    Args:
        word: as CLIP's pattern cuts it from cleaned, lower-cased text.
    """
    return word in stop_words() or (word.startswith("'") and word[1:] in stop_words())


def remove_from_piece(piece: str) -> str:
    """A piece of text that holds no space, without its stop words, in any case.

    A word goes if it is in the list, or if each of its parts between apostrophes is (`I'm`).
    """
    return _word().sub(_kept, piece)


def remove_stop_words(text: str) -> str:
    """A caption without its stop words; pieces of which nothing stays leave no space behind."""
    return " ".join(filter(None, map(remove_from_piece, text.split(" "))))


def _kept(match: regex.Match[str]) -> str:
    word = match[0].lower().replace("’", "'")
    return "" if word in stop_words() or all(part in stop_words() for part in word.split("'")) else match[0]


def text_of(tokens: Sequence[str], tokenizer: str) -> str:
    """The text that a row of tokens stands for, as far as they tell it.

    Args:
        tokens: in the caption's order, as the table `tokens` names them.
        tokenizer: the manifest's name of it: `clip`, `catlip`, or the kind of model, such as `wordpiece`.
    """
    from tokenizers import decoders

    if tokenizer == "catlip":
        return ", ".join(tokens)
    if tokenizer == "wordpiece":
        return decoders.WordPiece(_INSIDE, cleanup=False).decode(list(tokens))
    if tokenizer == "clip" or any(token.endswith(_END) for token in tokens):
        return _from_bytes([token.replace(_END, _BYTE_SPACE) for token in tokens]).strip()
    if any(_BYTE_SPACE in token for token in tokens):
        return _from_bytes(tokens).strip()
    if any(_MARK in token for token in tokens):
        return (
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
            .decode(list(tokens))
            .strip()
        )
    return ("" if tokenizer in ("bpe", "unigram") else " ").join(tokens)


def name_of(token: str, tokenizer: str) -> str:
    """One label's name: a word, or a part of one with `…` where the word goes on; bytes that are no character stay as
    they are.
    """
    if tokenizer == "clip" and " " in token:  # a pair of words
        return " ".join(name_of(part, tokenizer) for part in token.split(" "))
    if tokenizer == "clip":
        text = _from_bytes([token.removesuffix(_END)])
        return (token.removesuffix(_END) if _REPLACEMENT in text else text) + ("" if token.endswith(_END) else "…")
    if tokenizer == "wordpiece" and token.startswith(_INSIDE):
        return "…" + token.removeprefix(_INSIDE)
    if token.startswith(_MARK) or token.endswith(_END):
        return token.removeprefix(_MARK).removesuffix(_END) or token
    return (
        text
        if (text := _from_bytes([token]).strip()) and token.startswith(_BYTE_SPACE) and _REPLACEMENT not in text
        else token
    )


def _from_bytes(tokens: Sequence[str]) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode(list(tokens))
