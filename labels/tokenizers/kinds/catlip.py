"""CatLIP's labels (arXiv 2404.15653): the WordNet synsets of a caption's nouns that are frequent in the corpus.

    caption -> clip_clean (lower case) -> words -> lemma -> synset `lemma.n.01` -> its row in the vocabulary file
    WordNet: index.noun (lemma -> offsets of its senses), data.noun (offset -> words of the synset), noun.exc (plurals)
    -> word -> lemma, as NLTK's lemmatizer -> its first sense, if that is named `lemma.n.01`

A synset is named by its first word; so the first sense of a lemma is `lemma.n.01` exactly if the lemma is its first
word. The paper does not define words, and its code was not available: a word is a run of letters and digits. The
vocabulary file is JSON: type `catlip`, wordnet (SHA-256 of the three noun files), min_count (captions), synsets.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from labels.settings import Labels
from labels.storage import UserError, fingerprint, local_path, write_json
from labels.tokenizers.kinds.clip import clean_piece, clip_clean
from labels.tokenizers.tokenizer import Tokenizer, find_file, read_json, remove_stop_words, stop_words
from labels.tokenizers.word_table import FastPieces, flat_rows

if TYPE_CHECKING:
    import regex

    from labels.tokenizers.word_table import Captions, Rows

_TYPE = "catlip"
# Cleaning treats ASCII control characters differently from the space between pieces.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_KNOWN_PIECES = 1_000_000
_FILES = ("index.noun", "data.noun", "noun.exc")
_FIX = (
    "apt-get install wordnet-base, or `python -m nltk.downloader wordnet` and unzip it; "
    "or set labels.wordnet to the folder"
)
# A longer word is no noun: its endings would be removed one by one, in quadratic time.
_MAX_LETTERS = 100
# Morphy's rules for nouns, in its order.
_ENDINGS = [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")]
_ENDINGS += [("men", "man"), ("ies", "y")]


@cache
def _word() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[\p{L}\p{N}]+")


def make(settings: Labels) -> CatlipTokenizer | None:
    """See labels/tokenizers/kinds/__init__.py."""
    file = find_file(settings.tokenizer)
    vocabulary = None if file is None else read_vocabulary(file)
    if vocabulary is None:
        return None
    return CatlipTokenizer(vocabulary, settings.wordnet, without_stop_words=settings.stop_words == "remove")


def read_vocabulary(file: Path) -> dict[str, Any] | None:
    """The vocabulary in a file; None if it is no CatLIP vocabulary. UserError: it is a damaged one."""
    value = read_json(file) if file.suffix != ".txt" else None
    if value is None or value.get("type") != _TYPE:
        return None
    synsets = value.get("synsets")
    valid = isinstance(synsets, list) and all(isinstance(name, str) for name in synsets)
    if not valid or not synsets or synsets != sorted(set(synsets)) or not isinstance(value.get("wordnet"), str):
        fix = "make it again with train-tokenizer --kind catlip"
        raise UserError(f"labels.tokenizer: {file} is a damaged CatLIP vocabulary", fix=fix)
    return value


def write_vocabulary(path: Path, nouns: Nouns, synsets: list[str], min_count: int) -> None:
    """Write a vocabulary file, in one step; the same synsets give the same bytes."""
    write_json(path, {"type": _TYPE, "wordnet": nouns.sha256, "min_count": min_count, "synsets": sorted(synsets)})


class CatlipTokenizer(Tokenizer):
    """Captions to synset ids of a `read_vocabulary`. UserError: `wordnet` (`labels.wordnet`) is another WordNet."""

    name = _TYPE
    path: Literal["fast", "plain"] = "fast"

    def __init__(
        self,
        vocabulary: dict[str, Any],
        wordnet: str,
        *,
        without_stop_words: bool = False,
        max_known: int = _MAX_KNOWN_PIECES,
    ) -> None:
        import ftfy
        import regex

        self.nouns = load_nouns(wordnet)
        if self.nouns.sha256 != vocabulary["wordnet"]:
            raise UserError(
                f"labels.tokenizer: the CatLIP vocabulary was made with WordNet {vocabulary['wordnet'][:12]}, "
                f"labels.wordnet is {self.nouns.sha256[:12]}",
                fix="set labels.wordnet to that WordNet, or make the vocabulary again: train-tokenizer --kind catlip",
            )
        self.tokens: list[str] = vocabulary["synsets"]
        self.excluded = np.empty(0, dtype=np.int32)
        self._without_stop_words = without_stop_words
        self._max_known = max_known
        self._ids = {name: number for number, name in enumerate(self.tokens)}
        versions = {"ftfy": ftfy.__version__, "regex": regex.__version__}
        removed = {"stop_words": sorted(stop_words())} if without_stop_words else {}
        self.fingerprint = fingerprint(
            {"name": _TYPE, "wordnet": self.nouns.sha256, "tokens": self.tokens, **versions, **removed}
        )

    @classmethod
    def of_all_nouns(cls, wordnet: str) -> CatlipTokenizer:
        """The tokenizer of all synsets that can be labels, for counting."""
        nouns = load_nouns(wordnet)
        return cls({"wordnet": nouns.sha256, "synsets": nouns.synsets}, wordnet)

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        every = np.ones(len(self.tokens), np.bool_)
        return every, every

    @cached_property
    def fast(self) -> FastPieces:
        """The compiled path, made at the first call."""
        from labels.tokenizers.kernels.pieces import MARKUP

        return FastPieces(self._learn, self.encode_slowly, self._max_known, MARKUP)

    def clean(self, caption: str) -> str:
        text = clip_clean(caption)
        return remove_stop_words(text) if self._without_stop_words else text

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        return self.fast.encode_rows(captions, limit)

    def encode_slowly(self, captions: list[str], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode` by cleaning whole captions: ids int32 [T], offsets int64 [N + 1]."""
        return flat_rows([self._word_ids(clip_clean(caption))[:limit] for caption in captions])

    def _learn(self, pieces: list[str]) -> list[list[int] | None]:
        """The ids of pieces, None for those that must be cleaned with their caption."""
        cleaned = [None if _CONTROL.search(piece) else clean_piece(piece) for piece in pieces]
        return [None if text is None else self._word_ids(text) for text in cleaned]

    def _word_ids(self, text: str) -> list[int]:
        if self._without_stop_words:
            text = remove_stop_words(text)
        names = map(self.nouns.synset, _word().findall(text))
        return [self._ids[name] for name in names if name in self._ids]


class Nouns:
    """The nouns of the WordNet in `folder`. UserError: the files are not WordNet 3's.

    `sha256`: of the three files; `synsets`: names `lemma.n.01` of all synsets that can be labels, ascending.
    """

    def __init__(self, folder: Path) -> None:
        index, data, exceptions = files = [_read(folder / name) for name in _FILES]
        self.sha256 = hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()
        try:
            first_words = dict(map(_first_word, _lines(data)))
            self._named = {lemma: first_words[offset] == lemma for lemma, offset in map(_first_sense, _lines(index))}
            self._exceptions = {word: lemmas for word, *lemmas in map(str.split, _lines(exceptions))}
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"labels.wordnet: the files in {folder} are not WordNet 3's: {error!r}", fix=_FIX) from None
        self.synsets = sorted(f"{lemma}.n.01" for lemma, named in self._named.items() if named)

    def lemma(self, word: str) -> str:
        """The base form of a lower-case word as a noun, the word itself if there is none (NLTK's WordNetLemmatizer)."""
        return min(self._morphy(word), key=len, default=word) if len(word) <= _MAX_LETTERS else word

    def synset(self, word: str) -> str | None:
        """The name of the synset that labels a lower-case word, None if it has no label."""
        lemma = self.lemma(word)
        return f"{lemma}.n.01" if self._named.get(lemma) else None

    def _morphy(self, word: str) -> list[str]:
        if word in self._exceptions:
            return self._known([word, *self._exceptions[word]])
        forms = _without_endings([word])
        known = self._known([word, *forms])
        while forms and not known:
            forms = _without_endings(forms)
            known = self._known(forms)
        return known

    def _known(self, forms: Iterable[str]) -> list[str]:
        return [form for form in forms if form in self._named]


@cache
def load_nouns(setting: str) -> Nouns:
    """The nouns of `labels.wordnet`: a folder, or `auto` for the usual folders."""
    folders = _usual_folders() if setting == "auto" else [local_path(setting)]
    for folder in folders:
        if all((folder / name).is_file() for name in _FILES):
            return Nouns(folder)
    where = ", ".join(map(str, folders))
    raise UserError(f"labels.wordnet: no WordNet ({', '.join(_FILES)}) in {where}", fix=_FIX)


def _usual_folders() -> list[Path]:
    roots = os.environ.get("NLTK_DATA", "").split(os.pathsep)
    roots += ["~/nltk_data", "/usr/share/nltk_data", "/usr/local/share/nltk_data"]
    return [Path("/usr/share/wordnet"), *(Path(root).expanduser() / "corpora" / "wordnet" for root in roots if root)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"labels.wordnet: {path} cannot be read: {error}", fix=_FIX) from None


def _lines(data: bytes) -> list[str]:
    """The lines of a file, without the licence before them, whose lines begin with a space."""
    return [line for line in data.decode("utf8").splitlines() if line and not line.startswith(" ")]


def _first_sense(line: str) -> tuple[str, str]:
    """A line of index.noun -> its lemma and the offset of its first sense."""
    # lemma pos synset_cnt p_cnt [pointer symbol]*p_cnt sense_cnt tagsense_cnt synset_offset*synset_cnt
    fields = line.split()
    return fields[0], fields[6 + int(fields[3])]


def _first_word(line: str) -> tuple[str, str]:
    """A line of data.noun -> its offset and the first word of the synset."""
    offset, _, _, _, word, _ = line.split(" ", 5)  # offset lex_filenum ss_type w_cnt word lex_id ...
    return offset, word.lower()


def _without_endings(forms: Iterable[str]) -> list[str]:
    return [form.removesuffix(old) + new for form in forms for old, new in _ENDINGS if form.endswith(old)]
