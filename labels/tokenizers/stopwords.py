"""The 179 English stop words of NLTK, and captions without them (`labels.stop_words: remove`).

The list is the English one of NLTK's public stopwords corpus (nltk_data, after Porter and others), as it stood with 179 words; it is
a list of common words without a licence of its own, kept in labels/tokenizers/vocab/stop_words_en.txt, one a line.
"""

from functools import cache
from importlib import resources

import regex

# A word: letters with apostrophes inside, no digit, mark or underscore beside it. Possessive, so that no part of a word is ever one.
_WORD = regex.compile(r"(?<![\p{L}\p{M}\p{N}_])\p{L}++(?:['’]\p{L}++)*+(?![\p{M}\p{N}_])")


@cache
def stop_words() -> frozenset[str]:
    """The list, in lower case, with straight apostrophes."""
    return frozenset(resources.files("labels.tokenizers").joinpath("vocab/stop_words_en.txt").read_text("utf8").split())


def is_stop_word(word: str) -> bool:
    """Whether one of CLIP's words is dropped: it is in the list, or is without its apostrophe (`don't` comes as `don` and `'t`).

    Args:
        word: as CLIP's pattern cuts it from cleaned, lower-cased text.
    """
    return word in stop_words() or (word.startswith("'") and word[1:] in stop_words())


def remove_from_piece(piece: str) -> str:
    """A piece of text that holds no space, without its stop words, in any case.

    A word goes if it is in the list, or if each of its parts between apostrophes is (`I'm`).
    """
    return _WORD.sub(_kept, piece)


def remove_stop_words(text: str) -> str:
    """A caption without its stop words; pieces of which nothing stays leave no space behind."""
    return " ".join(filter(None, map(remove_from_piece, text.split(" "))))


def _kept(match: regex.Match[str]) -> str:
    word = match[0].lower().replace("’", "'")
    return "" if word in stop_words() or all(part in stop_words() for part in word.split("'")) else match[0]
