"""train-tokenizer: each kind, the same file from the same captions, and a file that is used on the fast path."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labels import TokenizerKind
from labels.settings import Labels
from labels.storage import UserError
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.train_tokenizer import train_tokenizer
from wordnet_factory import write_wordnet

ROOT = Path(__file__).parents[2]
IMPORT_PATH = [str(ROOT), str(ROOT / "tests" / "helpers")]  # for processes that unpickle functions of this file

KINDS: tuple[TokenizerKind, ...] = ("bpe", "wordpiece", "unigram", "wordlevel")


def captions() -> Iterator[list[str]]:
    """Words with many equal counts, which is where an order that is not fixed would show."""
    draw = random.Random(0)
    syllables = ["ka", "To", "mi", "ré", "su", "no", "日", "x", "qu", "ing", "the", "'s"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    for _ in range(6):
        yield [" ".join(draw.choices(words, k=8)) for _ in range(100)]


def _needs(kind: str) -> None:
    if kind == "unigram":
        pytest.importorskip("sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_is_used_on_the_fast_path(kind: TokenizerKind, tmp_path: Path) -> None:
    _needs(kind)
    out = tmp_path / "deep" / "tokenizer.json"
    size = train_tokenizer(captions, kind, out=out, vocab_size=400)
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer.json"]
    tokenizer = make_tokenizer(Labels(tokenizer=str(out)))
    assert tokenizer.path == "fast" and len(tokenizer.tokens) == size <= 400 and size > 200
    assert len(tokenizer.excluded) == (0 if kind == "bpe" else 1)
    rows = [line for batch in captions() for line in batch]
    ids, offsets, _, _ = tokenizer.encode_rows(rows, 75)
    assert (offsets[1:] > offsets[:-1]).all() and len(set(ids.tolist())) > 100
    starts, ends = tokenizer.whole_words
    assert starts.sum() > 0 and (kind != "wordlevel" or ends.all())
    assert make_tokenizer(Labels(tokenizer=str(out), stop_words="remove")).path == "fast"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_captions_give_the_same_file(kind: TokenizerKind, tmp_path: Path) -> None:
    _needs(kind)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.preprocess.test_train_tokenizer import captions, train_tokenizer\n"
        "train_tokenizer(captions, sys.argv[1], out=Path(sys.argv[2]), vocab_size=350)"
    )
    environment = {"PYTHONPATH": ":".join([*IMPORT_PATH, *sys.path])}
    subprocess.run([sys.executable, "-c", code, kind, tmp_path / "other.json"], check=True, env=environment)
    files = [tmp_path / "other.json", *(tmp_path / f"{number}.json" for number in range(3))]
    for file in files[1:]:
        train_tokenizer(captions, kind, out=file, vocab_size=350)
    assert len({file.read_bytes() for file in files}) == 1


def test_wordpiece_is_berts_in_form(tmp_path: Path) -> None:
    train_tokenizer(captions, "wordpiece", out=tmp_path / "t.json", vocab_size=200)
    value = json.loads((tmp_path / "t.json").read_text("utf8"))
    assert [token["content"] for token in value["added_tokens"]] == ["[UNK]"]
    assert any(token.startswith("##") and len(token) > 3 for token in value["model"]["vocab"]), "no merge inside words"
    assert sorted(value["model"]["vocab"].values()) == list(range(200))


def test_min_count(tmp_path: Path) -> None:
    def few() -> list[list[str]]:
        return [["cat cat dog"], ["cat bird bird", "\ud800 cat"]]

    assert train_tokenizer(few, "wordlevel", out=tmp_path / "t.json", min_count=2) == 3
    assert set(json.loads((tmp_path / "t.json").read_text())["model"]["vocab"]) == {"[UNK]", "cat", "bird"}


def test_catlip_keeps_the_synsets_of_enough_captions(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")

    def few() -> list[list[str]]:
        return [["a cat", "cats and a dog dog dog"], ["The DOG", "a goose, geese", "dogs"]]

    for file in ("a.json", "b.json"):
        assert train_tokenizer(few, "catlip", out=tmp_path / file, min_count=2, wordnet=str(folder)) == 2
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    value = json.loads((tmp_path / "a.json").read_text())
    assert value["synsets"] == ["cat.n.01", "dog.n.01"] and value["min_count"] == 2 and value["type"] == "catlip"
    tokenizer = make_tokenizer(Labels(tokenizer=str(tmp_path / "a.json"), wordnet=str(folder)))
    assert tokenizer.encode(["geese, dogs, cats"], 75)[0].tolist() == [1, 0]
    with pytest.raises(
        UserError, match="no synset is in 500 captions or more; of 5 captions, 3 have the most frequent synset"
    ) as caught:
        train_tokenizer(few, "catlip", out=tmp_path / "c.json", wordnet=str(folder))
    assert "--min-count" in str(caught.value) and not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_captions_are_an_error(kind: TokenizerKind, tmp_path: Path) -> None:
    _needs(kind)
    with pytest.raises(UserError, match="there are no captions"):
        train_tokenizer(lambda: [], kind, out=tmp_path / "t.json", vocab_size=300)
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_too_small_is_an_error(kind: TokenizerKind, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size is 20\n  allowed: "):
        train_tokenizer(captions, kind, out=tmp_path / "t.json", vocab_size=20)
