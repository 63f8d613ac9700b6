"""CLIP's own caption cleaning, to the letter (open_clip/tokenizer.py: basic_clean, whitespace_clean, lower)."""

import html

import ftfy


def clip_clean(text: str) -> str:
    """Mend mojibake, unescape HTML entities twice, collapse white space, lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
