"""Tokens as people read them: the marks that vocabularies put at word borders, and their bytes as characters, turned into text."""

from collections.abc import Sequence

from tokenizers import decoders

_END, _BYTE_SPACE, _MARK, _INSIDE = "</w>", "\u0120", "\u2581", "##"
_REPLACEMENT = "\ufffd"


def text_of(tokens: Sequence[str], tokenizer: str) -> str:
    """The text that a row of tokens stands for, as far as they tell it.

    Args:
        tokens: in the caption's order, as the table `tokens` names them.
        tokenizer: the manifest's name of it: `clip`, `catlip`, or the kind of model, such as `wordpiece`.
    """
    if tokenizer == "catlip":
        return ", ".join(tokens)
    if tokenizer == "wordpiece":
        return decoders.WordPiece(_INSIDE, cleanup=False).decode(list(tokens))
    if tokenizer == "clip" or any(token.endswith(_END) for token in tokens):
        return _from_bytes([token.replace(_END, _BYTE_SPACE) for token in tokens]).strip()
    if any(_BYTE_SPACE in token for token in tokens):
        return _from_bytes(tokens).strip()
    if any(_MARK in token for token in tokens):
        return decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]).decode(list(tokens)).strip()
    return ("" if tokenizer in ("bpe", "unigram") else " ").join(tokens)


def name_of(token: str, tokenizer: str) -> str:
    """One label's name: a word, or a part of one with `…` where the word goes on; bytes that are no character stay as they are."""
    if tokenizer == "clip" and " " in token:  # a pair of words
        return " ".join(name_of(part, tokenizer) for part in token.split(" "))
    if tokenizer == "clip":
        text = _from_bytes([token.removesuffix(_END)])
        return (token.removesuffix(_END) if _REPLACEMENT in text else text) + ("" if token.endswith(_END) else "…")
    if tokenizer == "wordpiece" and token.startswith(_INSIDE):
        return "…" + token.removeprefix(_INSIDE)
    if token.startswith(_MARK) or token.endswith(_END):
        return token.removeprefix(_MARK).removesuffix(_END) or token
    return text if (text := _from_bytes([token]).strip()) and token.startswith(_BYTE_SPACE) and _REPLACEMENT not in text else token


def _from_bytes(tokens: Sequence[str]) -> str:
    return decoders.ByteLevel().decode(list(tokens))
