"""Every tokenizer of the `tokenizers` library gives that library's ids: fast where it is proven, plain elsewhere."""

import io
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from labels.arrays import unique_sorted
from labels.settings import Labels
from labels.storage import UserError
from labels.tokenizers.kinds.subword import _MARKING, _WORDS, SubwordTokenizer
from labels.tokenizers.tokenizer import find_source, load_engine, make_tokenizer, remove_stop_words

NO_LIMIT = 10**6
MARK = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'’-#[]<>|_ÉéßΣσ日本語漢あア한ْĠ" + MARK
PIECES = [
    "ca",
    "at",
    "cat",
    "do",
    "og",
    "dog",
    "th",
    "he",
    "the",
    "é",
    "ing",
    "12",
    "’s",
    "'s",
    "日本",
    "!!",
    "un",
    "ca-",
]
POINTS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
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
N, P = normalizers, pre_tokenizers


def _wordpiece() -> models.WordPiece:
    heads = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *PIECES]
    tokens = dict.fromkeys([*heads, *("##" + head for head in [*LETTERS, *PIECES])])
    return models.WordPiece(
        {token: number for number, token in enumerate(tokens)}, unk_token="[UNK]", max_input_chars_per_word=30
    )


def _wordlevel() -> models.WordLevel:
    return models.WordLevel(
        {word: number for number, word in enumerate(["[UNK]", "the", "cat", "dog", "a", ".", "日本", "é"])}, "[UNK]"
    )


def _unigram() -> models.Unigram:
    scores = [("<unk>", 0.0), *((letter, -8.0 - number / 50) for number, letter in enumerate(LETTERS))]
    scores += [(piece, -5.0 - number / 9) for number, piece in enumerate(PIECES) if len(piece) > 1]
    scores += [(MARK + piece, -4.0 - number / 7) for number, piece in enumerate([*PIECES, "a", "b", "."])]
    return models.Unigram(scores, unk_id=0)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that build the words from the left."""
    return list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))


def _bpe(alphabet: list[str], words: list[str], **options: Any) -> models.BPE:
    merges = _merges(words)
    tokens = dict.fromkeys(["<unk>", *alphabet, *("".join(pair) for pair in merges)])
    return models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, **options)


def _byte_bpe() -> models.BPE:
    return _bpe(sorted(P.ByteLevel.alphabet()), ["Ġcat", "Ġthe", "dog", "ing", "Ġ!!", "Ã©", "æĹ¥", "Ġ1", "'s"])


def _mark_bpe() -> models.BPE:
    return _bpe(
        [*LETTERS], [MARK + "cat", MARK + "the", "dog", MARK + "ing", MARK * 3], unk_token="<unk>", fuse_unk=True
    )


def _engine(
    model: models.Model, normalizer: normalizers.Normalizer | None, cut: pre_tokenizers.PreTokenizer | None
) -> Engine:
    engine = Engine(model)
    if normalizer is not None:
        engine.normalizer = normalizer
    if cut is not None:
        engine.pre_tokenizer = cut
    return engine


def _with_added(engine: Engine) -> Engine:
    engine.add_tokens(
        [AddedToken("<tool>"), AddedToken("Cat", normalized=True), AddedToken("xy", single_word=True, lstrip=True)]
    )
    engine.add_special_tokens(["<s>", "[MASK]"])
    return engine


def _split(pattern: str, **options: Any) -> pre_tokenizers.PreTokenizer:
    return P.Split(Regex(pattern), **{"behavior": "isolated", **options})


def _precompiled() -> normalizers.Normalizer:
    """SentencePiece's own nmt_nfkc, out of a model it has trained."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat", "the dog"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return normalizers.Precompiled(_field(_field(model.getvalue(), 3), 2))


def _field(message: bytes, wanted: int) -> bytes:
    """One field of bytes of a protobuf message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 2:
            length = number()
            at += length
            if tag >> 3 == wanted:
                return message[at - length : at]
        elif tag & 7 == 0:
            number()
        else:
            at += 4 if tag & 7 == 5 else 8
    raise AssertionError(f"no field {wanted}")


NFKC_LOWER = [N.NFKC(), N.Lowercase()]
LLAMA = N.Sequence([N.Prepend(MARK), N.Replace(" ", MARK)])
FAST = {
    "BERT uncased": lambda: _engine(_wordpiece(), N.BertNormalizer(), P.BertPreTokenizer()),
    "BERT cased": lambda: _engine(_wordpiece(), N.BertNormalizer(lowercase=False), P.BertPreTokenizer()),
    "BERT, no cleaning": lambda: _engine(
        _wordpiece(), N.BertNormalizer(clean_text=False, handle_chinese_chars=False), P.BertPreTokenizer()
    ),
    "added tokens": lambda: _with_added(_engine(_wordpiece(), N.BertNormalizer(), P.BertPreTokenizer())),
    "words": lambda: _engine(_wordlevel(), N.Sequence(NFKC_LOWER), P.Whitespace()),
    "words by white space": lambda: _engine(_wordlevel(), None, P.WhitespaceSplit()),
    "words, digits apart": lambda: _engine(
        _wordlevel(), N.StripAccents(), P.Sequence([P.Whitespace(), P.Digits(True), P.Punctuation()])
    ),
    "CLIP": lambda: _engine(
        _byte_bpe(),
        N.Sequence([N.NFC(), N.Replace(Regex(r"\s+"), " "), N.Lowercase()]),
        P.Sequence([_split(_WORDS[0], behavior="removed", invert=True), P.ByteLevel(add_prefix_space=False)]),
    ),
    "unigram": lambda: _engine(_unigram(), N.Sequence([N.Nmt(), *NFKC_LOWER]), P.Metaspace()),
    "unigram, lower case": lambda: _engine(_unigram(), N.Lowercase(), P.Metaspace()),
    "unigram, first only": lambda: _engine(_unigram(), N.NFKC(), P.Metaspace(prepend_scheme="first")),
    "unigram, never": lambda: _engine(_unigram(), N.Replace("``", '"'), P.Metaspace(prepend_scheme="never")),
    "unigram, added": lambda: _with_added(_engine(_unigram(), N.Lowercase(), P.Metaspace())),
    "T5": lambda: _engine(_unigram(), _precompiled(), P.Sequence([P.WhitespaceSplit(), P.Metaspace()])),
    "ALBERT": lambda: _engine(
        _unigram(),
        N.Sequence(
            [
                N.Strip(left=False),
                N.NFKD(),
                N.StripAccents(),
                N.Lowercase(),
                _precompiled(),
                N.Replace(Regex(" {2,}"), MARK),
            ]
        ),
        P.Metaspace(),
    ),
    "bytes": lambda: _engine(_byte_bpe(), None, P.ByteLevel(add_prefix_space=True)),
    "bytes, no prefix": lambda: _engine(_byte_bpe(), None, P.ByteLevel(add_prefix_space=False)),
    "bytes, added": lambda: _with_added(_engine(_byte_bpe(), N.NFC(), P.ByteLevel(add_prefix_space=False))),
    **{
        f"bytes by pattern {number}": lambda pattern=pattern: _engine(
            _byte_bpe(), N.NFC(), P.Sequence([_split(pattern), P.ByteLevel(add_prefix_space=False, use_regex=False)])
        )
        for number, pattern in enumerate(_MARKING)
    },
    "LLaMA": lambda: _engine(_mark_bpe(), LLAMA, None),
    "LLaMA, Metaspace": lambda: _engine(_mark_bpe(), None, P.Metaspace(prepend_scheme="first", split=False)),
}
PLAIN = {
    "no cutting": lambda: _engine(_unigram(), None, None),
    "punctuation only": lambda: _engine(_wordpiece(), N.Lowercase(), P.Punctuation()),
    "bytes without a pattern": lambda: _engine(_byte_bpe(), None, P.ByteLevel(use_regex=False)),
    "a merge over the space": lambda: _engine(_bpe([*LETTERS], [f"t{MARK}cat"], unk_token="<unk>"), LLAMA, None),
    "an unknown pattern": lambda: _engine(
        _byte_bpe(), None, P.Sequence([_split(r"\w+ \w+"), P.ByteLevel(use_regex=False)])
    ),
    "words and the space between": lambda: _engine(
        _byte_bpe(), None, P.Sequence([_split(r"\s+"), P.ByteLevel(use_regex=False)])
    ),
    "a normaliser over spaces": lambda: _engine(_wordlevel(), N.Replace("a b", "cat"), P.Whitespace()),
    "an added token with a space": lambda: _plain_added(),
    "unigram over the whole": lambda: _engine(_unigram(), None, P.Metaspace(split=False)),
    "first of several": lambda: _engine(
        _unigram(), None, P.Sequence([P.WhitespaceSplit(), P.Metaspace(prepend_scheme="first")])
    ),
}


def _plain_added() -> Engine:
    engine = _engine(_wordlevel(), None, P.Whitespace())
    engine.add_tokens(["the cat"])
    return engine


def tokenizer_of(engine: Engine, **options: Any) -> SubwordTokenizer:
    """As `make_tokenizer` makes it from a file."""
    engine.encode_special_tokens = True
    return SubwordTokenizer(engine, **options)


MADE: dict[str, SubwordTokenizer] = {}


def made(name: str) -> SubwordTokenizer:
    if name not in MADE:
        MADE[name] = tokenizer_of({**FAST, **PLAIN}[name]())
    return MADE[name]


def assert_same(captions: list[str], tokenizer: SubwordTokenizer, limit: int = NO_LIMIT) -> None:
    """Ids and label sets are those of the library, less the excluded ones."""
    ids, offsets, label_ids, label_offsets = tokenizer.encode_rows(captions, limit)
    assert ids.dtype == label_ids.dtype == np.int32 and offsets.dtype == label_offsets.dtype == np.int64
    excluded = set(tokenizer.excluded.tolist())
    for caption, (start, end) in zip(captions, pairwise(offsets), strict=True):
        text = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if tokenizer._without_stop_words:
            text = remove_stop_words(text)
        expected = [
            token for token in tokenizer._engine.encode(text, add_special_tokens=False).ids if token not in excluded
        ]
        assert ids[start:end].tolist() == expected[:limit], ascii(caption[:200])
    expected_labels, expected_offsets = unique_sorted(ids, offsets, tokenizer.excluded)
    assert np.array_equal(label_ids, expected_labels) and np.array_equal(label_offsets, expected_offsets)


NASTY = [
    *[
        "",
        " ",
        "  ",
        "a",
        " a",
        "a ",
        "a  b",
        " a  b ",
        "the cat",
        "The CAT, the dog!",
        "a\tb",
        "a\nb c",
        "\u00a0a",
        "a\u00a0b",
        "a \u3000b",
    ],
    *[
        "日本語 の cat",
        "é e\u0301 E\u0301",
        "\u0301 a",
        "a \u0301b",
        f"{MARK}cat",
        f"the {MARK}cat",
        f"the{MARK}cat",
        f"{MARK}{MARK} a {MARK}",
    ],
    *[
        "[MASK] [UNK] <s> <unk> [CLS]",
        "x[MASK]y",
        "<tool> a<tool>b <tool",
        "Cat cat CAT",
        "xy axy xy.",
        "a xy b",
        "` `` ```",
        "''",
    ],
    *[
        "\u0600 a",
        "\u0600",
        "a\u200d b",
        "\u200b",
        "a \u200b b",
        "\ufeffa",
        "a \ufeff b",
        "\x00 a\x00b",
        "a \x7f b",
        "a \x1c b",
        "\u180e a",
        "a \u0085 b",
    ],
    *[
        "don't 's it's 'S",
        "ﬁ Ⅷ ½ ﷺ",
        "x" * 31,
        "x" * 300,
        "é" * 200,
        "the " * 200 + "cat",
        "12 123 1234567 12a3",
        "!!! ... --",
        "a\r\nb",
        "a \r\n b",
    ],
    *[
        "İ ǅ ß ΑΣ ΑΣ.",
        "한국어 텍스트",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "\U0010ffff \ue000",
        "Ġword Ġ ġ",
        "\u1100\u1161 \u1161",
        "\u0e33 a",
        "a \u0e33",
        "\ud800",
        "a \ud83d b",
    ],
]


@pytest.mark.parametrize("name", FAST)
def test_the_fast_path_is_the_library(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer.path == "fast"
    for limit in (0, 1, 3, NO_LIMIT):
        assert_same(NASTY, tokenizer, limit)
    assert tokenizer.fast is not None
    before = tokenizer.fast.slow_captions
    tokenizer.encode_rows(["the bird and a dog", "12 dogs, 3 birds!"], 75)
    assert tokenizer.fast.slow_captions == before, "ordinary captions take the slow path"


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_not_proven_is_plain(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer.path == "plain"
    for limit in (0, 1, NO_LIMIT):
        assert_same(NASTY, tokenizer, limit)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("template", ["{}", "a{}", "{}b"])
def test_every_kind_of_code_point(name: str, template: str) -> None:
    """Between words, in lines of a few, so that one that needs the whole caption takes few others with it."""
    chars = VARIED[sum(map(ord, name + template)) % 4 :: 4]
    pieces = [template.format(char) for char in chars]
    assert_same([f"the {' '.join(pieces[start : start + 8])} cat" for start in range(0, len(pieces), 8)], made(name))


PARTS = [
    *PIECES,
    *NASTY[:40],
    *"aé日 ",
    " ",
    " ",
    " ",
    "\u0301",
    "\u200d",
    "the",
    "Cat",
    "<tool>",
    "xy",
    "\u00a0",
    "\t",
    MARK,
    "Ġ",
    "ﷺ",
    "\u0600",
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*FAST, *PLAIN]),
    st.lists(st.lists(st.sampled_from(PARTS), max_size=10).map("".join), max_size=3),
    st.integers(0, 20),
)
def test_any_mixture_of_parts(name: str, captions: list[str], limit: int) -> None:
    assert_same([*captions, *(f"the {caption} cat" for caption in captions)], made(name), limit)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*FAST, *PLAIN]), st.lists(st.text(max_size=30), max_size=4))
def test_any_text(name: str, captions: list[str]) -> None:
    assert_same([*captions, " ".join(captions)], made(name))


@pytest.mark.parametrize("name", ["BERT uncased", "unigram", "bytes, no prefix", "LLaMA"])
@pytest.mark.parametrize("bound", [1, 20, 300])
def test_cold_warm_and_full_tables(name: str, bound: int) -> None:
    captions = [f"cat{number} dog{number % 7} é{number} the long-word{'x' * (number % 40)}" for number in range(200)]
    small = tokenizer_of(FAST[name](), max_known=bound)
    for _ in range(2):
        assert_same(captions, small)
        for caption in captions[::20]:
            assert_same([caption], small)
    assert small.fast is not None and small.fast._words.fill[0] <= max(2, 2 * bound)


@pytest.mark.parametrize(
    "name", ["BERT uncased", "words", "unigram", "bytes", "bytes, no prefix", "LLaMA", "no cutting", "added tokens"]
)
def test_stop_words_are_removed_from_the_text(name: str) -> None:
    tokenizer = tokenizer_of({**FAST, **PLAIN}[name](), without_stop_words=True)
    captions = ["The cat and a dog", "the the", "I'm THE dog's", "Don’t the-cat a1 á", "it's, not: cats'", *NASTY]
    assert_same(captions, tokenizer)
    assert tokenizer.fingerprint != made(name).fingerprint
    assert np.array_equal(tokenizer.encode(captions[:1], 75)[0], made(name).encode(["cat dog"], 75)[0])
    assert tokenizer.path == ("plain" if name in ("bytes, no prefix", "no cutting") else "fast")


def test_arrow_layouts_and_nulls() -> None:
    captions = [caption for caption in NASTY if caption.isascii()] * 2
    for name in ("BERT uncased", "no cutting"):
        tokenizer = made(name)
        expected = tokenizer.encode_rows(captions, 75)
        for kind in (pa.string(), pa.large_string(), pa.string_view()):
            array = pa.array(captions, kind)
            for layout in (
                array,
                pa.chunked_array([array[:5], array[5:5], array[5:]]),
                pa.concat_arrays([array[:3], array])[3:],
            ):
                for got, wanted in zip(tokenizer.encode_rows(layout, 75), expected, strict=True):
                    assert np.array_equal(got, wanted)
        for empty in ([], pa.array([], pa.string()), pa.chunked_array([], pa.string())):
            assert [part.tolist() for part in tokenizer.encode_rows(empty, 75)] == [[], [0], [], [0]]
        with pytest.raises(ValueError, match="1 of 2 captions are null"):
            tokenizer.encode_rows(pa.array(["a", None]), 75)


def test_where_words_begin_and_end() -> None:
    def borders(name: str) -> tuple[set[str], set[str]]:
        tokenizer = made(name)
        starts, ends = tokenizer.whole_words
        tokens = np.array(tokenizer.tokens, object)
        return set(tokens[starts]), set(tokens[ends])

    assert (
        "cat" in borders("BERT uncased")[0]
        and "##cat" not in borders("BERT uncased")[0]
        and not borders("BERT uncased")[1]
    )
    assert (
        MARK + "cat" in borders("unigram")[0]
        and "cat" not in borders("LLaMA")[0]
        and MARK + "cat" in borders("LLaMA")[0]
    )
    assert "Ġcat" in borders("bytes")[0] and "dog" not in borders("bytes")[0]
    assert borders("words")[0] == borders("words")[1] == set(made("words").tokens)
    starts, ends = make_tokenizer(Labels()).whole_words
    assert not starts.any() and ends.sum() > 20_000


# Where a tokenizer comes from.


def _saved(folder: Path, name: str = "tokenizer.json", engine: Engine | None = None) -> Path:
    engine = engine or FAST["BERT uncased"]()
    (folder / name).write_text(engine.to_str(), "utf8")
    return folder / name


def test_a_file_a_folder_and_a_hub_name_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _saved(tmp_path)
    monkeypatch.setattr(
        tokenizers.Tokenizer,
        "from_pretrained",
        lambda name: Engine.from_file(str(file)) if name == "org/my-bert" else None,
    )
    made_from = [make_tokenizer(Labels(tokenizer=name)) for name in (str(file), str(tmp_path), "org/my-bert")]
    assert len({tokenizer.fingerprint for tokenizer in made_from}) == 1 and {
        tokenizer.path for tokenizer in made_from
    } == {"fast"}
    ids = [tokenizer.encode(["The cat"], 75)[0].tolist() for tokenizer in made_from]
    assert ids[0] and ids[0] == ids[1] == ids[2]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    prints = [
        tokenizer_of(load_engine(_saved(tmp_path, f"{name}.json", FAST[name]()))).fingerprint
        for name in ("words", "BERT uncased")
    ]
    again = tokenizer_of(load_engine(_saved(tmp_path, "other.json", FAST["words"]())))
    engine = FAST["words"]()
    engine.enable_truncation(3)
    engine.enable_padding()
    engine.decoder = decoders.WordPiece()
    cut = tokenizer_of(load_engine(_saved(tmp_path, "cut.json", engine)))
    assert prints[0] != prints[1] and prints[0] == again.fingerprint == cut.fingerprint
    assert len(cut.encode(["the cat a dog . the cat", "a"], 75)[0]) == 8


def test_a_vocabulary_file_is_berts(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "Cat", ",", "cafe", "日"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf8")
    tokenizer = make_tokenizer(Labels(tokenizer=str(tmp_path / "vocab.txt")))
    assert (
        tokenizer.name == "wordpiece" and tokenizer.tokens == words and tokenizer.excluded.tolist() == [0, 1, 2, 3, 4]
    )
    assert tokenizer.encode(["CATS, Café 日日 [MASK] zebra"], 75)[0].tolist() == [5, 6, 8, 9, 10, 10]
    (tmp_path / "cased").mkdir()
    (tmp_path / "cased/vocab.txt").write_text("\r\n".join(words), "utf8")
    (tmp_path / "cased/tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    cased = make_tokenizer(Labels(tokenizer=str(tmp_path / "cased")))
    assert cased.encode(["Cat cat"], 75)[0].tolist() == [7, 5] and cased.fingerprint != tokenizer.fingerprint


def test_ids_without_a_token_keep_their_position() -> None:
    model = models.WordLevel({"[UNK]": 0, "cat": 3}, "[UNK]")
    tokenizer = tokenizer_of(_engine(model, None, P.Whitespace()))
    assert tokenizer.tokens == ["[UNK]", "[no token 1]", "[no token 2]", "cat"] and tokenizer.encode(["cat"], 5)[
        0
    ].tolist() == [3]


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    engine = FAST["bytes"]()
    engine.model.dropout = 0.5
    tokenizer = tokenizer_of(load_engine(_saved(tmp_path, engine=engine)))
    assert (
        tokenizer.encode(["the cat ing dog"] * 50, 75)[0].tolist()
        == made("bytes").encode(["the cat ing dog"] * 50, 75)[0].tolist()
    )


def test_errors_name_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> Engine:
        raise OSError("no route to host")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", unreachable)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    reported = {
        "no-such-model": "is no file, and its tokenizer.json could not be fetched from the hub: no route",
        "no/such/file": "there is no file 'no/such/file'",
        "missing.json": "there is no file 'missing.json'",
        str(tmp_path / "empty"): "holds neither tokenizer.json nor vocab.txt",
        str(tmp_path / "broken.json"): "is no tokenizer.json of the tokenizers library: it is not JSON",
        str(tmp_path / "other.json"): "is no tokenizer.json",
        str(tmp_path / "words.txt"): r"is no vocab.txt: it has no line \[UNK\]",
        str(tmp_path / "binary.txt"): "cannot be read as a vocab.txt",
    }
    for name, text in reported.items():
        with pytest.raises(UserError, match=text) as caught:
            make_tokenizer(Labels(tokenizer=name))
        assert caught.value.allowed
    assert find_source("bert-base-uncased") == "bert-base-uncased"
