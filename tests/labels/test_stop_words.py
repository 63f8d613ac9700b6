"""`labels.stop_words: remove`: the list, what goes of a text, and CLIP's fast path without them."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captions import NASTY
from labels.arrays import unique_sorted
from labels.settings import Labels
from labels.tokenizers.kinds import clip
from labels.tokenizers.kinds.clip import ClipTokenizer, clip_clean
from labels.tokenizers.tokenizer import is_stop_word, make_tokenizer, remove_stop_words, stop_words

FAST = ClipTokenizer(without_stop_words=True)
SLOW = ClipTokenizer(without_stop_words=True)
KEEP = ClipTokenizer()
NO_LIMIT = 10**6


def expected(caption: str, limit: int) -> list[int]:
    """Word by word, by the tokenizer that keeps all."""
    words = [
        word
        for word in clip.word_pattern().findall(clip_clean(caption))
        if word not in stop_words() and word[1:] not in apostrophes(word)
    ]
    return [token for word in words for token in KEEP._engine.encode(word, add_special_tokens=False).ids][:limit]


def apostrophes(word: str) -> frozenset[str]:
    return stop_words() if word[:1] == "'" else frozenset()


def assert_same(captions: list[str], limit: int = 75, fast: ClipTokenizer = FAST) -> None:
    ids, offsets, label_ids, label_offsets = fast.encode_rows(captions, limit)
    for caption, (start, end) in zip(captions, pairwise(offsets), strict=True):
        assert ids[start:end].tolist() == expected(caption, limit), ascii(caption[:200])
    slow_ids, slow_offsets = SLOW.encode_slowly(captions, limit)
    assert np.array_equal(ids, slow_ids) and np.array_equal(offsets, slow_offsets)
    labels, ends = unique_sorted(ids, offsets, fast.excluded)
    assert np.array_equal(label_ids, labels) and np.array_equal(label_offsets, ends)


def test_the_list_is_nltks() -> None:
    assert len(stop_words()) == 179
    assert all(word == word.lower() and word.replace("'", "").isalpha() and word.isascii() for word in stop_words())
    assert {"i", "a", "the", "don", "don't", "t", "s", "wouldn't", "should've", "ma", "y"} <= stop_words()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("A photo of the cat", "photo cat"),
        ("the  THE\tcat", "\tcat"),
        ("I'm sure you’re here, don't!", "sure , !"),
        ("the cat's o'clock rock'n'roll", "cat's o'clock rock'n'roll"),
        ("a1 1a a_b á a\u0301 \u0301a thea", "a1 1a a_b á a\u0301 \u0301a thea"),
        ("of/the-cat 'the' (a)", "/-cat '' ()"),
        ("don't1 don't's", "don't1"),
        ("the", ""),
        ("", ""),
    ],
)
def test_which_words_are_removed(text: str, left: str) -> None:
    assert remove_stop_words(text) == left


def test_clips_words() -> None:
    assert all(map(is_stop_word, ["the", "'t", "'s", "'ll", "don", "a"]))
    assert not any(map(is_stop_word, ["cat", "'", "''", "1", "s'", "'ſ"]))


def test_clip_without_stop_words() -> None:
    for without, kept in [
        ("A photo of the cat", "photo cat"),
        ("It's a dog; I'd say don't!", "dog; say !"),
        ("the the", ""),
    ]:
        assert FAST.encode([without], 75)[0].tolist() == KEEP.encode([kept], 75)[0].tolist()
    assert FAST.fingerprint != KEEP.fingerprint
    assert make_tokenizer(Labels(stop_words="remove")).fingerprint == FAST.fingerprint
    assert make_tokenizer(Labels()).fingerprint == KEEP.fingerprint


def test_every_stop_word_between_anything() -> None:
    words = sorted(stop_words())
    captions = [
        f"{before}{word}{after} cat"
        for word, (before, after) in product(words, product(["", "é ", "1", "'"], ["", "1", "'s", "’t", "x"]))
    ]
    assert_same([*captions, *(caption.upper() for caption in captions), *NASTY])


@pytest.mark.parametrize("limit", [0, 1, 2, 3, NO_LIMIT])
def test_removed_words_do_not_count_for_the_limit(limit: int) -> None:
    assert_same(
        ["the a cat", "cat the", "a", "a a a b c", "x the y the z", "the é of cat", "é the", "don't the cats"], limit
    )


@pytest.mark.parametrize("bound", [1, 300])
def test_cold_warm_and_full_tables(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "_MAX_KNOWN_WORDS", bound)
    small = ClipTokenizer(without_stop_words=True)
    captions = [
        f"the word{chr(97 + number % 26)}{'q' * (number % 70)} of café{number} it's don't" for number in range(1500)
    ]
    for _ in range(2):
        assert_same(captions, fast=small)
        assert_same(captions[:3], fast=small)
    assert small.fast._words.fill[0] <= 2 * 1024, "the table did not start over"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*sorted(stop_words())[:60], " ", " ", "'", "’", "é", "1", "İ", "Σ", "&amp;", "cat", "'S", "'ſ"]
        ),
        max_size=12,
    )
)
def test_any_mixture(parts: list[str]) -> None:
    assert_same(["".join(parts), " ".join(parts)])
