"""CatLIP labels: WordNet's nouns read, words to synsets, and captions to labels by the fast path as by the slow one."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captions import NASTY
from labels.arrays import unique_sorted
from labels.settings import Labels
from labels.storage import UserError
from labels.tokenizers.kinds import catlip
from labels.tokenizers.kinds.catlip import CatlipTokenizer, Nouns, load_nouns
from labels.tokenizers.tokenizer import make_tokenizer
from wordnet_factory import write_wordnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


@pytest.mark.parametrize(
    ("word", "synset"),
    [
        ("cat", "cat.n.01"),
        ("cats", "cat.n.01"),
        ("catsss", "cat.n.01"),  # the rules are applied again while nothing is found
        ("geese", "goose.n.01"),
        ("boxes", "box.n.01"),
        ("ladies", "lady.n.01"),
        ("knives", None),  # `ves` becomes `f`; NLTK has it among the exceptions, this WordNet has not
        ("jersey", "jersey.n.01"),  # the first sense counts, not the synset that comes first
        ("t-shirt", None),  # its first sense bears another name
        ("tee", "tee.n.01"),  # names are compared in lower case
        ("men", None),  # both `men` and `man` are lemmas, equally long; the word itself comes first
        ("glasses", "glass.n.01"),  # both are lemmas, the shorter one counts
        ("summer", "summer.n.01"),
        ("zebra", None),
        ("s", None),
        ("", None),
        ("cat" + "s" * 1_000_000, None),
    ],
)
def test_words_to_synsets(folder: Path, word: str, synset: str | None) -> None:
    assert Nouns(folder).synset(word) == synset


def test_synsets_are_those_named_after_a_lemma(folder: Path) -> None:
    names = [
        "box",
        "cat",
        "dog",
        "glass",
        "glasses",
        "goose",
        "jersey",
        "knife",
        "lady",
        "man",
        "summer",
        "tee",
        "work_force",
    ]
    assert Nouns(folder).synsets == [f"{name}.n.01" for name in names]


def vocabulary(folder: Path, synsets: list[str]) -> dict[str, object]:
    return {"type": "catlip", "wordnet": Nouns(folder).sha256, "min_count": 1, "synsets": synsets}


CHOSEN = ["box.n.01", "cat.n.01", "dog.n.01", "goose.n.01", "summer.n.01"]


def assert_same(captions: list[str], tokenizer: CatlipTokenizer, limit: int = 75) -> None:
    ids, offsets, label_ids, label_offsets = tokenizer.encode_rows(captions, limit)
    slow_ids, slow_offsets = tokenizer.encode_slowly(captions, limit)
    assert ids.dtype == label_ids.dtype == np.int32
    for caption, (start, end), (slow_start, slow_end) in zip(
        captions, pairwise(offsets), pairwise(slow_offsets), strict=True
    ):
        assert ids[start:end].tolist() == slow_ids[slow_start:slow_end].tolist(), ascii(caption[:200])
    labels, ends = unique_sorted(ids, offsets, tokenizer.excluded)
    assert np.array_equal(label_ids, labels) and np.array_equal(label_offsets, ends)


def test_labels_of_captions(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(vocabulary(folder, CHOSEN)))
    tokenizer = make_tokenizer(Labels(tokenizer=str(tmp_path / "labels.json"), wordnet=str(folder)))
    assert tokenizer.name == "catlip" and tokenizer.path == "fast" and tokenizer.tokens == CHOSEN
    ids, offsets, label_ids, _ = tokenizer.encode_rows(
        ["Two DOGS, a cat &amp; a “dog’s” box!", "a lady", "geese-box cat's &lt;cats&gt;"], 75
    )
    assert ids.tolist() == [2, 1, 2, 0, 3, 0, 1, 1] and offsets.tolist() == [0, 4, 4, 8]
    assert label_ids.tolist() == [0, 1, 2, 0, 1, 3]
    assert all(border.all() and len(border) == 5 for border in tokenizer.whole_words)


def test_the_fast_path_is_the_slow_one(folder: Path) -> None:
    extra = [
        "cats\ndogs",
        "\x07cat dog",
        "cat\tdog  box ",
        " geese",
        "< &amp;cats; cat",
        "caf\u00e9 cat\u00e9 Ã©cat",
        "cat " * 500,
        "x" * 300 + " cat",
    ]
    for bound in (1, 20, 10**6):
        for without in (False, True):
            tokenizer = CatlipTokenizer(
                vocabulary(folder, CHOSEN), str(folder), without_stop_words=without, max_known=bound
            )
            for limit in (0, 1, 3, 75, 10**6):
                assert_same([*NASTY, *extra], tokenizer, limit)


@settings(max_examples=150, deadline=None)
@given(
    captions=st.lists(
        st.lists(
            st.sampled_from(
                [
                    "cat",
                    "Dogs",
                    "geese",
                    "&amp;",
                    "<",
                    "Ã©",
                    "’s",
                    " ",
                    " ",
                    "\n",
                    "é",
                    "日",
                    "\u00a0",
                    "-",
                    "\x1b",
                    "ＢＯＸ",
                    "&lt;",
                ]
            ),
            max_size=12,
        ).map("".join)
        | st.text(max_size=30),
        max_size=4,
    )
)
def test_any_text(folder: Path, captions: list[str]) -> None:
    assert_same(captions, _tokenizer(folder))


_MADE: dict[Path, CatlipTokenizer] = {}


def _tokenizer(folder: Path) -> CatlipTokenizer:
    if folder not in _MADE:
        _MADE[folder] = CatlipTokenizer(vocabulary(folder, CHOSEN), str(folder))
    return _MADE[folder]


def test_stop_words_and_the_fingerprint(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path, "the cat\n")
    kept = CatlipTokenizer(vocabulary(folder, CHOSEN), str(folder))
    removed = CatlipTokenizer(vocabulary(folder, CHOSEN), str(folder), without_stop_words=True)
    fewer = CatlipTokenizer(vocabulary(folder, CHOSEN[:3]), str(folder))
    assert kept.encode(["the dog"], 75)[0].tolist() == [1, 2] and removed.encode(["the dog"], 75)[0].tolist() == [2]
    assert len({kept.fingerprint, removed.fingerprint, fewer.fingerprint}) == 3


def test_where_wordnet_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catlip, "_usual_folders", lambda: [tmp_path / "none", tmp_path / "there"])
    load_nouns.cache_clear()
    with pytest.raises(UserError, match="no WordNet") as caught:
        load_nouns("auto")
    assert "apt-get install wordnet-base" in str(caught.value)
    write_wordnet(tmp_path / "there")
    assert load_nouns("auto").sha256 == Nouns(tmp_path / "there").sha256
    load_nouns.cache_clear()


def test_nltks_folders_are_among_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLTK_DATA", "/some/where:/else")
    folders = [str(path) for path in catlip._usual_folders()]
    assert folders[:3] == ["/usr/share/wordnet", "/some/where/corpora/wordnet", "/else/corpora/wordnet"]
    assert str(Path.home() / "nltk_data/corpora/wordnet") in folders


def test_refusals(folder: Path, tmp_path: Path) -> None:
    broken = write_wordnet(tmp_path / "broken")
    (broken / "data.noun").write_text("not a line of it\n")
    with pytest.raises(UserError, match="are not WordNet 3's"):
        Nouns(broken)
    other = write_wordnet(tmp_path / "other", "mice mouse\n")
    with pytest.raises(UserError, match="was made with WordNet"):
        CatlipTokenizer(vocabulary(folder, CHOSEN), str(other))
    for number, damage in enumerate([{"synsets": ["b", "a"]}, {"synsets": []}, {"wordnet": 3}, {"synsets": "a"}]):
        (tmp_path / f"{number}.json").write_text(json.dumps({**vocabulary(folder, CHOSEN), **damage}))
        with pytest.raises(UserError, match="damaged CatLIP vocabulary"):
            make_tokenizer(Labels(tokenizer=str(tmp_path / f"{number}.json"), wordnet=str(folder)))
