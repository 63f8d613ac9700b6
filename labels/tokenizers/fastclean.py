"""CLIP's cleaning of one piece of a caption between white space, when it is the same as within the caption.

`clip_clean` of a caption is that of its pieces, joined by spaces, since every step works on a character, or on neighbours
that no white space parts, save one: ftfy mends the whole caption's encoding as soon as `is_bad` finds mojibake anywhere.
So a piece for which no neighbours can make `is_bad` true is cleaned here, alone and once; the rest is cleaned with its caption.

Why the steps are local, white space being tab, line feed, form feed, carriage return and space:
- is_bad: a pattern; white space in it stands only beside the non-ASCII characters it is about, never between two of
  them, so a match has them all from one piece. `a ` before and ` a` behind allow all that any other neighbours allow.
- entities: their names hold no white space. A caption with both `&` and `<` is not cleaned piecewise (ftfy looks at both).
- ligatures, width, quotes, line breaks, control characters: one character at a time. Surrogates cannot be in UTF-8.
- normalisation: a space neither composes nor is reordered. Lower case: a final sigma is decided by the letters next to it.
tests/test_fast_ids.py holds every one of these sentences against ftfy, over all code points.
"""

import html
import unicodedata

from ftfy.badness import is_bad
from ftfy.chardata import CONTROL_CHARS, DOUBLE_QUOTE_RE, LIGATURES, SINGLE_QUOTE_RE, WIDTH_MAP
from ftfy.fixes import fix_latin_ligatures, fix_line_breaks, remove_control_chars, uncurl_quotes, unescape_html


def _character_map() -> dict[int, str]:
    """ftfy's steps on single characters as one: code point to what it becomes, where that is something else."""
    quotes = [code for code in range(0x2BC, 0x2020) if SINGLE_QUOTE_RE.match(chr(code)) or DOUBLE_QUOTE_RE.match(chr(code))]
    changed = {*LIGATURES, *WIDTH_MAP, *CONTROL_CHARS, *quotes, 0x0D, 0x2028, 0x2029}
    steps = fix_latin_ligatures, lambda text: text.translate(WIDTH_MAP), uncurl_quotes, fix_line_breaks, remove_control_chars
    result = {}
    for code in changed:
        text = chr(code)
        for step in steps:
            text = step(text)
        result[code] = text
    return result


_CHARACTERS = _character_map()


def clean_piece(piece: str) -> str | None:
    """What `clip_clean` makes of a piece in any caption that does not hold both `&` and `<`; None where its rest may matter.

    Args:
        piece: one or more characters, none of them ASCII white space or an ASCII control character, no lone surrogates.
    """
    text, before = piece, None
    while text != before:
        before = text
        if "&" in text:
            text = unescape_html(text)
        # An escape sequence could only come out of an entity.
        if "\x1b" in text or is_bad(f"a {text} a"):
            return None
        text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
        # A fullwidth ampersand: nobody has looked for a `<` in the caption.
        if "&" in text and "&" not in piece:
            return None
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()
