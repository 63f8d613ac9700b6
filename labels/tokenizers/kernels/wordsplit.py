"""CLIP's word pattern over bytes of plain ASCII, compiled."""

import numpy as np

from labels.tokenizers.kernels.table import SLOW, Scalar, append, keys
from labels.tokenizers.kernels.wordbits import leading_letters, lowest_bytes
from labels.tokenizers.kernels.wordjit import compiled, inlined

# ftfy cuts text into segments of a million characters, wherever that is.
_MAX_CAPTION_BYTES = 1_000_000
_ZERO = np.uint64(0)
_CASE, _A, _LETTERS = np.uint32(0x20), np.uint32(ord("a")), np.uint32(26)
_FOLD, _KEEP = np.uint8(0x20), np.uint8(0)


@inlined
def is_letter(byte: Scalar) -> Scalar:
    return np.uint8((byte | 0x20) - 97) < 26


@inlined
def is_digit(byte: Scalar) -> Scalar:
    return np.uint8(byte - 48) < 10


@inlined
def is_space(byte: Scalar) -> Scalar:
    """White space that ftfy keeps; other control characters it deletes."""
    return byte == 0x20 or byte == 0x0A or byte == 0x0D or byte == 0x09 or byte == 0x0C


@compiled
def contraction(text: np.ndarray, begin: Scalar, end: Scalar) -> int:
    """Length of 's 't 're 've 'm 'll 'd at `begin`, in any case; 0 if there is none."""
    if text[begin] != 0x27 or begin + 1 == end:
        return 0
    first = text[begin + 1] | 0x20
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return 2
    if begin + 2 == end:
        return 0
    second = text[begin + 2] | 0x20
    pair = ((first == ord("r") or first == ord("v")) and second == ord("e")) or (first == ord("l") and second == ord("l"))
    return 3 if pair else 0


@inlined
def scan_letters(text: np.ndarray, begin: Scalar, end: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """Where the ASCII letters from `begin` on end, and the first two columns of a slot for them."""
    if begin + 16 > len(text):
        return _scan_each(text, begin, begin, end, _ZERO, _ZERO)
    count, first = leading_letters(text, begin)
    second = _ZERO
    if count == 8:
        more, second = leading_letters(text, begin + 8)
        count += more
    if begin + count > end:
        # The next caption begins with letters.
        if end - begin < 8:
            return end, lowest_bytes(first, end - begin), _ZERO
        return end, first, lowest_bytes(second, end - begin - 8)
    if count == 16:
        return _scan_each(text, begin, begin + 16, end, first, second)
    return begin + count, first, second


@compiled
def _scan_each(text: np.ndarray, begin: Scalar, at: Scalar, end: Scalar, first: Scalar, second: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The same byte by byte from `at` on: at the end of the text or the caption, and in long words."""
    while at < end:
        byte = np.uint32(text[at]) | _CASE
        if np.uint32(byte - _A) >= _LETTERS:
            break
        first, second = append(first, second, at - begin, byte)
        at += 1
    return at, first, second


@inlined
def next_word(text: np.ndarray, at: Scalar, end: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Where the word that begins at `at` ends, the bit to fold its case with, and its keys."""
    stop, first, second = scan_letters(text, at, end)
    if stop > at:
        return stop, _FOLD, first, second
    stop, first = at + 1, np.uint64(text[at])
    if is_digit(text[at]):
        return stop, _KEEP, first, second
    short = contraction(text, at, end)
    if short:
        # Bit 0x20 of an apostrophe is set, so folding leaves it as it is.
        first, second = keys(text, at, at + short, _FOLD)
        return at + short, _FOLD, first, second
    while stop < end and text[stop] > 0x20 and not is_letter(text[stop]) and not is_digit(text[stop]):
        first, second = append(first, second, stop - at, text[stop])
        stop += 1
    return stop, _KEEP, first, second


@inlined
def survey(text: np.ndarray, begin: Scalar, end: Scalar) -> int:
    """0: plain ASCII; 1: to be taken piece by piece; SLOW: control characters, or entities beside a `<`."""
    control, beyond, entity, tag = False, False, False, False
    for i in range(begin, end):
        byte = text[i]
        control |= (byte < 0x20) & (byte != 0x0A) & (byte != 0x0D) & (byte != 0x09) & (byte != 0x0C)
        control |= byte == 0x7F
        beyond |= byte >= 0x80
        entity |= byte == 0x26
        tag |= byte == 0x3C
    # With a `<` in sight ftfy takes the text for HTML and leaves its entities alone.
    if control or (entity and tag) or end - begin > _MAX_CAPTION_BYTES:
        return SLOW
    return 1 if beyond or entity else 0
