"""CLIP ids: the same as open_clip's own tokenizer, on anything that can stand in a caption."""

import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from captions import NASTY
from labels.tokenizers.kinds import clip
from labels.tokenizers.kinds.clip import ClipTokenizer, clip_clean

LIMIT = 75
MINE = ClipTokenizer()


def _open_clip() -> SimpleTokenizer:
    """open_clip's tokenizer, except that a caption which spells a special token stays ordinary text."""
    tokenizer = SimpleTokenizer()
    specials = "<start_of_text>|<end_of_text>|"
    assert tokenizer.pat.pattern.startswith(specials)
    tokenizer.pat = regex.compile(tokenizer.pat.pattern.removeprefix(specials), regex.IGNORECASE)
    tokenizer.cache = {}
    return tokenizer


THEIRS = _open_clip()


def rows(captions: list[str], limit: int = LIMIT) -> list[list[int]]:
    ids, offsets = MINE.encode(captions, limit)
    assert ids.dtype == np.int32 and offsets.dtype == np.int64 and len(offsets) == len(captions) + 1
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


@pytest.mark.parametrize("caption", NASTY, ids=lambda caption: ascii(caption[:20]))
def test_nasty_captions(caption: str) -> None:
    assert rows([caption]) == [THEIRS.encode(caption)[:LIMIT]]


def test_many_captions_at_once_are_each_as_alone() -> None:
    assert rows(NASTY) == [THEIRS.encode(caption)[:LIMIT] for caption in NASTY]


def test_every_assigned_code_point_and_a_part_of_the_others() -> None:
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    chosen = [point for point in points if unicodedata.category(point) not in ("Cn", "Co") or ord(point) % 97 == 0]
    lines = [" ".join(chosen[start : start + 64]) for start in range(0, len(chosen), 64)]
    assert rows(lines, 10**9) == [THEIRS.encode(line) for line in lines]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text(caption: str) -> None:
    assert rows([caption]) == [THEIRS.encode(caption)[:LIMIT]]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "&amp;",
                "amp;",
                "lt;",
                "<",
                "&lt;",
                "Ã©",
                "’",
                "'s",
                " ",
                "a",
                "É",
                "<end_of_text>",
                "\u0301",
                "\u200d",
                "😀",
                "1",
            ]
        ),
        max_size=12,
    )
)
def test_any_mixture_of_nasty_parts(parts: list[str]) -> None:
    caption = "".join(parts)
    assert rows([caption]) == [THEIRS.encode(caption)[:LIMIT]]


def test_a_special_token_in_a_caption_stays_ordinary_text() -> None:
    ids = rows(["<end_of_text> <start_of_text> <|endoftext|>"])[0]
    assert ids and not set(ids) & set(MINE.excluded.tolist())


def test_cleaning_is_idle_on_clean_text() -> None:
    assert clip_clean("  A  Cat\n&amp;amp; dog ") == "a cat & dog"


def test_the_vocabulary_is_open_clips() -> None:
    assert {token: position for position, token in enumerate(MINE.tokens)} == THEIRS.encoder
    assert MINE.excluded.tolist() == [49406, 49407]


def test_a_full_word_table_starts_over_without_changing_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"word{number} again{number % 7} 犬{number}" for number in range(200)]
    expected = rows(captions)
    monkeypatch.setattr(clip, "_MAX_KNOWN_WORDS", 20)
    small = ClipTokenizer()
    for caption, row in zip(captions, expected, strict=True):
        assert small.encode([caption], LIMIT)[0].tolist() == row
        assert small.fast._words.fill[0] <= 40
    assert small.encode(captions, LIMIT)[0].tolist() == [token for row in expected for token in row], (
        "more words at once than the bound"
    )
