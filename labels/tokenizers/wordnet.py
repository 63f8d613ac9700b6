"""WordNet's nouns: a word of a caption to the synset that CatLIP takes for its label.

    index.noun (lemma -> offsets of its senses), data.noun (offset -> words of the synset), noun.exc (irregular plurals)
    -> word -> lemma, as NLTK's lemmatizer does it -> its first sense, if that is named `lemma.n.01`

A synset is named by its first word; so the first sense of a lemma is `lemma.n.01` exactly if the lemma is its first word.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from labels.errors import UserError

_FILES = ("index.noun", "data.noun", "noun.exc")
_MEND = "apt-get install wordnet-base, or `python -m nltk.downloader wordnet` and unzip it; or set labels.wordnet to the folder"
# A longer word is no noun: its endings would be taken off one by one, in quadratic time.
_MAX_LETTERS = 100
# Morphy's rules for nouns, in its order.
_ENDINGS = (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"))


class Nouns:
    """The nouns of one WordNet.

    Attributes:
        sha256: of the three files together.
        synsets: names `lemma.n.01` of all synsets that a word can have for a label, ascending.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the files in `folder` are not WordNet 3's.
        """
        index, data, exceptions = (_read(folder / name) for name in _FILES)
        self.sha256 = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (index, data, exceptions))).hexdigest()
        try:
            first_words = dict(map(_first_word, _lines(data)))
            self._named = {lemma: first_words[offset] == lemma for lemma, offset in map(_first_sense, _lines(index))}
            self._exceptions = {word: lemmas for word, *lemmas in map(str.split, _lines(exceptions))}
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"labels.wordnet: the files in {folder} are not WordNet 3's: {error!r}", mend=_MEND) from None
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
        found = self._known([word, *forms])
        while forms and not found:
            forms = _without_endings(forms)
            found = self._known(forms)
        return found

    def _known(self, forms: Iterable[str]) -> list[str]:
        return [form for form in forms if form in self._named]


@cache
def load_nouns(setting: str) -> Nouns:
    """The nouns of `labels.wordnet`: a folder, or `auto` for the usual places.

    Raises:
        UserError: WordNet is not there.
    """
    folders = _usual_folders() if setting == "auto" else [Path(setting).expanduser()]
    for folder in folders:
        if all((folder / name).is_file() for name in _FILES):
            return Nouns(folder)
    where = ", ".join(map(str, folders))
    raise UserError(f"labels.wordnet: no WordNet ({', '.join(_FILES)}) in {where}", mend=_MEND)


def _usual_folders() -> list[Path]:
    roots = [*os.environ.get("NLTK_DATA", "").split(os.pathsep), "~/nltk_data", "/usr/share/nltk_data", "/usr/local/share/nltk_data"]
    return [Path("/usr/share/wordnet"), *(Path(root).expanduser() / "corpora" / "wordnet" for root in roots if root)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"labels.wordnet: {path} cannot be read: {error}", mend=_MEND) from None


def _lines(data: bytes) -> list[str]:
    """The lines of a file, without the licence before them, whose lines begin with a space."""
    return [line for line in data.decode("utf8").splitlines() if line and not line.startswith(" ")]


def _first_sense(line: str) -> tuple[str, str]:
    """A line of index.noun to its lemma and the offset of its first sense.

    lemma pos synset_cnt p_cnt [pointer symbol]*p_cnt sense_cnt tagsense_cnt synset_offset*synset_cnt
    """
    fields = line.split()
    return fields[0], fields[6 + int(fields[3])]


def _first_word(line: str) -> tuple[str, str]:
    """A line of data.noun to its offset and the first word of the synset: offset lex_filenum ss_type w_cnt word lex_id ..."""
    offset, _, _, _, word, _ = line.split(" ", 5)
    return offset, word.lower()


def _without_endings(forms: Iterable[str]) -> list[str]:
    return [form.removesuffix(old) + new for form in forms for old, new in _ENDINGS if form.endswith(old)]
