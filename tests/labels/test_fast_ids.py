"""The fast path gives the ids of the slow path: every code point, any text, any state of its table, Arrow layout."""

import re
import sys
import unicodedata
from itertools import pairwise, product
from subprocess import run

import ftfy
import numpy as np
import pyarrow as pa
import pytest
from ftfy.badness import BADNESS_RE, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from captions import NASTY
from labels.arrays import unique_sorted
from labels.tokenizers.kinds import clip
from labels.tokenizers.kinds.clip import ClipTokenizer, clean_piece, clip_clean

LIMIT = 75
NO_LIMIT = 10**9
FAST = ClipTokenizer()
SLOW = ClipTokenizer()
# White space that parts the pieces; ftfy deletes the other ASCII control characters.
SPACES = "\t\n\f\r "
CONTROLS = {*map(chr, range(0x21)), "\x7f", "&"}
POINTS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
# For templates that cost more: all but the bulk of equals, of which every 50th.
VARIED = [
    char
    for char in POINTS
    if not (
        0x3400 <= ord(char) < 0xA000
        or 0xAC00 <= ord(char) < 0xD7A4
        or ord(char) >= 0x17000
        or unicodedata.category(char) == "Cn"
    )
    or ord(char) % 50 == 0
]


def assert_same(captions: list[str], limit: int = LIMIT, fast: ClipTokenizer = FAST) -> None:
    """Ids and label sets of both paths are equal."""
    ids, offsets, label_ids, label_offsets = fast.encode_rows(captions, limit)
    slow_ids, slow_offsets = SLOW.encode_slowly(captions, limit)
    assert ids.dtype == label_ids.dtype == np.int32 and offsets.dtype == label_offsets.dtype == np.int64
    if not np.array_equal(offsets, slow_offsets) or not np.array_equal(ids, slow_ids):
        for caption, (start, end), (slow_start, slow_end) in zip(
            captions, pairwise(offsets), pairwise(slow_offsets), strict=True
        ):
            assert ids[start:end].tolist() == slow_ids[slow_start:slow_end].tolist(), ascii(caption[:200])
    slow_labels, slow_label_offsets = unique_sorted(slow_ids, slow_offsets, SLOW.excluded)
    assert np.array_equal(label_ids, slow_labels) and np.array_equal(label_offsets, slow_label_offsets)


def in_lines(pieces: list[str], of: int = 256) -> list[str]:
    """The pieces that may be cleaned alone, many to a caption; the others each in a caption of its own."""
    local = [piece for piece in pieces if "&" not in piece and "\x1b" not in piece and clean_piece(piece) is not None]
    others = sorted(set(pieces) - set(local))
    return [" ".join(local[start : start + of]) for start in range(0, len(local), of)] + others


def test_every_code_point_is_cleaned_alone_as_among_others() -> None:
    pieces = [char for char in POINTS if char not in CONTROLS]
    cleaned = [clean_piece(piece) for piece in pieces]
    local = [(piece, text) for piece, text in zip(pieces, cleaned, strict=True) if text is not None]
    assert len(pieces) - len(local) < 50, "the class of characters that may be cleaned alone has shrunk"
    for start in range(0, len(local), 2048):
        part = local[start : start + 2048]
        assert clip_clean(" ".join(piece for piece, _ in part)) == " ".join(text for _, text in part if text)


def test_every_code_point() -> None:
    assigned = [char for char in POINTS if unicodedata.category(char) not in ("Cn", "Co") or ord(char) % 50 == 0]
    assert_same(in_lines(assigned), NO_LIMIT)


@pytest.mark.parametrize("template", ["Xc{}", "'{}1", "{0}{0}'S", "é{}Ё"])
def test_every_kind_of_code_point_between_others(template: str) -> None:
    assert_same(in_lines([template.format(char) for char in VARIED if char not in CONTROLS]), NO_LIMIT)


def test_all_pairs_of_ascii() -> None:
    chars = [chr(code) for code in range(128)]
    assert_same([f"a{first}{second}S x" for first, second in product(chars, chars)])


def test_mojibake_characters_in_pairs_between_ascii() -> None:
    """All pairs of the characters that ftfy's detector looks at, within a caption."""
    chars = sorted(
        {char for char in POINTS[:0x10000] if not char.isascii() and not char.isalnum() and char in BADNESS_RE.pattern}
        | set("ÂÃØàâéœŒВЂβ")
    )
    captions = [f"a {first}{second} a" for first, second in product(chars, chars)]
    assert_same(captions[:: max(1, len(captions) // 4000)])


def test_white_space_parts_no_two_characters_that_make_mojibake() -> None:
    """For every alternative of the detector: what stands for non-ASCII is contiguous; `a ` and ` a` allow all the rest
    does.

    An alternative is pre, core, post: core from the first to the last item that cannot match ASCII. The core lies
        within one
    piece if none of its items matches white space; pre and post may reach over white space only in ways that the two
    neighbours used by `clean_piece` allow as well.
    """
    tree = re._parser.parse(BADNESS_RE.pattern, re.VERBOSE)  # pyright: ignore[reportAttributeAccessIssue]
    [(_, (_, alternatives))] = tree

    def matches(items: list, text: str) -> bool:
        pattern = re._parser.SubPattern(tree.state, items)  # pyright: ignore[reportAttributeAccessIssue]
        return re._compiler.compile(pattern).fullmatch(text) is not None  # pyright: ignore[reportAttributeAccessIssue]

    for alternative in map(list, alternatives):
        spaced = [any(matches([item], text) for text in SPACES) for item in alternative]
        core = [
            position
            for position, item in enumerate(alternative)
            if not any(matches([item], chr(code)) for code in range(128))
        ]
        if alternative[0][0] is re._constants.AT:  # pyright: ignore[reportAttributeAccessIssue]
            # "Ã " at the beginning of a text; the alternative [a-z]\s?[ÃÂ][ ] finds it behind "a ".
            assert matches(alternative, "Ã ") and is_bad("a Ã a") and is_bad("a Â a") and len(alternative) == 3
            continue
        first, last = core[0], core[-1]
        assert not any(spaced[first : last + 1])
        assert not any(spaced[:first]) or matches(alternative[:first], "a ") or matches(alternative[:first], " ")
        assert (
            not any(spaced[last + 1 :])
            or matches(alternative[last + 1 :], " a")
            or matches(alternative[last + 1 :], " ")
        )


def test_white_space_in_the_mojibake_detector_is_at_its_edges() -> None:
    """`a ` and ` a` around a piece allow every match that other pieces around it allow."""
    odd = "ÂÃŒœàØÐÎВГ€£¤°»“”’«‚√≈β0aZ.,?!"
    for piece in map("".join, product(odd, repeat=2)):
        if not is_bad(f"a {piece} a"):
            for before, after in product(
                ["", "a", "Z", "a.", "é", "Ã", "œ", "0"], ["", "a", "Z", ".", "é", "€", "»", "0"]
            ):
                if not (is_bad(f"a {before} a") or is_bad(f"a {after} a")):
                    assert not is_bad(f"{before} {piece}\n{after}") and not is_bad(f"{before}\t\t{piece}  {after}")


def test_a_space_parts_normalisation_and_case() -> None:
    for char in POINTS:
        assert unicodedata.normalize("NFC", f"a {char} b") == f"a {unicodedata.normalize('NFC', char)} b"
    assert "Α Σ Α".lower() == "α σ α" and "ΑΣ ΣΑ".lower() == "ας σα"


def test_ascii_changes_only_in_case_and_control_characters() -> None:
    printable = "".join(map(chr, range(0x21, 0x7F))).replace("&", "")
    for first in printable:
        text = "".join(first + second for second in printable)
        assert ftfy.fix_text(text) == text and clip_clean(text) == text.lower()


NASTY_ALPHABET = "&;<>’\u00a0éÃ©â€™\u200b\u0301#xamplt3 \r\n'sSΣ＆ﬁœÂ\ufeff—"


@settings(max_examples=250, deadline=None)
@given(st.lists(st.text(NASTY_ALPHABET, max_size=24), max_size=4))
def test_any_nasty_text(captions: list[str]) -> None:
    assert_same(captions)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4), st.integers(0, 80))
def test_any_text_lone_surrogates_too(captions: list[str], limit: int) -> None:
    assert_same(captions, limit)


PARTS = [
    *[
        "&amp;",
        "&lt;",
        "&eacute;",
        "&#27;[31m",
        "&nbsp;",
        "＆amp;",
        "<",
        "Ã©",
        "l’été",
        "–",
        "©",
        "ΑΣ",
        "Σ",
        "İ",
        "'S",
        "'ſ",
        "don’t",
    ],
    "à\u00a0",
    "e\u0301",
    "\u0301",
]
PARTS += [*["日本", "œ", "Â", "ﾊﾞ", "\u200d", "😀", "½", "1", "a", "R&B", "&"]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PARTS, " ", " ", "\n", "\r"]), max_size=12).map("".join))
def test_any_mixture_of_parts(caption: str) -> None:
    assert_same([caption, f"plain {caption} plain"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(max_codepoint=127), max_size=40), max_size=4))
def test_any_ascii(captions: list[str]) -> None:
    assert_same(captions)


def test_entities_next_to_a_tag_are_read_differently() -> None:
    """ftfy leaves the entities of what looks like HTML, on that line and all after it, and knows some that html does
    not.
    """
    pieces = ["P&EACUTE;REZ", "＆EACUTE;", "&amp;amp;amp;amp;lt;", "＆amp;amp;amp;lt;"]
    assert clip_clean(pieces[0]) != clip_clean(f"< {pieces[0]}").removeprefix("< ")
    assert_same(
        [
            f"{before}{piece}{after}"
            for piece in pieces
            for before in ("", "< ", "<\n", "\n")
            for after in ("", " <", "\n<", "<")
        ]
    )


def test_nasty_and_long_captions() -> None:
    """With a limit and without, one by one and all at once."""
    extra = [
        "",
        "   ",
        "\n",
        "x" * 16,
        "x" * 17,
        "X" * 128,
        "x" * 129,
        "é" * 600,
        "’" * 64,
        "- " * 5000,
        "日本語 " * 3000,
        "a" * 40 + "é",
    ]
    long_words = [f"{stem}{tail}" for stem in ("z" * 15, "z" * 16, "z" * 40) for tail in ("a", "b", "ab", "ba")]
    for limit in (0, 1, 2, 3, LIMIT, 200, NO_LIMIT):
        assert_same([*NASTY, *extra, *long_words], limit)


@pytest.mark.parametrize("bound", [1, 2, 20, 300])
def test_cold_warm_and_full_tables(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [
        f"word{number} again{number % 7} café{number} l’eau{number % 5} Tom&amp;Co supercalifragilistic{number}"
        for number in range(200)
    ]
    captions += NASTY
    monkeypatch.setattr(clip, "_MAX_KNOWN_WORDS", bound)
    small = ClipTokenizer()
    for _ in range(2):
        assert_same(captions, fast=small)
        for caption in captions[::10]:
            assert_same([caption], fast=small)
    assert small.fast._words.fill[0] <= max(2, 2 * bound)


def test_a_table_that_grows_keeps_its_words() -> None:
    captions = [
        f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}{chr(97 + d)}q"
        for a, b, c, d in product(range(26), range(26), range(13), range(12))
    ]
    grown = ClipTokenizer()
    for start in range(0, len(captions), 20_000):
        assert_same(captions[start : start + 20_000], fast=grown)
    assert_same(captions[:20_000], fast=grown)
    assert len(grown.fast._words.slots) > 4 << 16


def test_arrow_layouts() -> None:
    captions = [*NASTY, "a cat", "l’été", "a cat", "Tom &amp; Jerry"] * 3
    ids, offsets, label_ids, label_offsets = FAST.encode_rows(captions, LIMIT)
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        array = pa.array(captions, kind)
        layouts = [
            array,
            pa.chunked_array([array[:5], array[5:5], array[5:]]),
            pa.concat_arrays([array[7:], array])[len(array) - 7 :],
        ]
        for layout in layouts:
            for got, expected in zip(
                FAST.encode_rows(layout, LIMIT), (ids, offsets, label_ids, label_offsets), strict=True
            ):
                assert np.array_equal(got, expected)
        start, end = offsets[3], offsets[9]
        assert np.array_equal(FAST.encode(array[3:9], LIMIT)[0], ids[start:end])
    for empty in ([], pa.array([], pa.string()), pa.chunked_array([], pa.string())):
        assert [part.tolist() for part in FAST.encode_rows(empty, LIMIT)] == [[], [0], [], [0]]


def test_a_null_caption_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 captions are null"):
        FAST.encode(pa.array(["a", None]), LIMIT)


def test_more_rows_than_a_block_hold_are_joined() -> None:
    captions = [f"caption {number} été" for number in range(9000)]
    assert_same(captions)


def test_importing_the_tokenizer_loads_no_compiler() -> None:
    make = "import sys, labels.settings as s, labels.tokenizers.tokenizer as t; t.make_tokenizer(s.Labels())"
    code = f"{make}; sys.exit('numba' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
