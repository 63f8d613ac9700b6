"""The interface of a tokenizer, how `labels.tokenizer` chooses one, stop words, and tokens as readable text.

    section `labels` -> `make_tokenizer`: the first family of labels/tokenizers/kinds that accepts it -> `Tokenizer`
    labels.tokenizer: name | file | folder | hub name -> `find_source` -> `load_engine`: the tokenizers library
    tokens -> `text_of`, `name_of`: text without a vocabulary's marks of word borders and byte characters

A tokenizer's ids are always those of the reference (open_clip for `clip`, the tokenizers library for all others); tests
compare them. A fingerprint covers the versions of ftfy and regex: another version may clean a caption differently.
`tokenizers`, `ftfy` and `regex` are imported where they are used: a training node does without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from labels.settings import TOKENIZERS, Labels, names_in
from labels.storage import UserError, local_path

if TYPE_CHECKING:
    import regex
    import tokenizers

    from labels.tokenizers.word_table import Captions, Rows

ALLOWED = (
    "clip | a tokenizer.json | a vocab.txt | a folder with either | a CatLIP vocabulary | "
    "a hub name such as bert-base-uncased"
)

_FILES = ("tokenizer.json", "vocab.txt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ANY = "subword"  # the family that is tried last: it accepts every name, or raises a UserError
_END, _BYTE_SPACE, _MARK, _INSIDE = "</w>", "\u0120", "\u2581", "##"
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """Captions to ids; V tokens, N captions, T ids."""

    name: str  # in the manifest: `clip`, `catlip`, or the kind of model, such as `wordpiece`
    tokens: list[str]  # [V], position = id
    excluded: np.ndarray  # ids that are never labels, ascending: special tokens and the unknown token
    fingerprint: str  # of everything that decides ids: equal fingerprints give equal ids
    path: Literal["fast", "plain"]  # compiled, or the library for every caption; the ids are the same

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """starts_word, ends_word, bool [V] each: ids a, b have a word border between them if ends_word[a] or
        starts_word[b].
        """
        ...

    def clean(self, caption: str) -> str:
        """A caption after cleaning, without removed stop words; only for display."""
        ...

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets of N captions, a list or an Arrow array; the excluded ids are in neither.

        -> ids int32 [T], at most `limit` per caption, and offsets int64 [N + 1]; label_ids int32 [T'], a caption's
        distinct ids, ascending, and label_offsets int64 [N + 1]. ValueError: a caption is null.
        """
        ...

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `encode_rows`."""
        return self.encode_rows(captions, limit)[:2]


def make_tokenizer(settings: Labels) -> Tokenizer:
    """The tokenizer of these settings: one object per process, so that its table of known words serves all shards."""
    return _make(settings.tokenizer, settings.stop_words, settings.wordnet)


@cache
def _make(name: str, stop_words: Literal["keep", "remove"], wordnet: str) -> Tokenizer:
    settings = Labels(tokenizer=name, stop_words=stop_words, wordnet=wordnet)
    # The family of that very name first: CLIP's tokenizer is made without reading what only the others need.
    order = sorted(names_in(TOKENIZERS), key=lambda family: (family != name, family == _ANY))
    made = (import_module(f"{TOKENIZERS}.{family}").make(settings) for family in order)
    return next(tokenizer for tokenizer in made if tokenizer is not None)


def find_file(name: str) -> Path | None:
    """The file that `labels.tokenizer` names, or the tokenizer file in that folder; None if there is none."""
    path = local_path(name)
    if path.is_dir():
        return next((path / file for file in _FILES if (path / file).is_file()), None)
    return path if path.exists() else None


def find_source(name: str) -> Path | str:
    """The tokenizer file that `labels.tokenizer` names, or a hub name. UserError: it is neither."""
    if (file := find_file(name)) is not None:
        return file
    path = local_path(name)
    if path.is_dir():
        raise UserError(f"labels.tokenizer: the folder {name} holds neither {' nor '.join(_FILES)}", allowed=ALLOWED)
    if path.suffix in (".json", ".txt") or not _HUB_NAME.fullmatch(name):
        raise UserError(f"labels.tokenizer: there is no file {name!r}", allowed=ALLOWED)
    return name


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"labels.tokenizer: {path} cannot be read: {error}", allowed=ALLOWED) from None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def load_engine(source: Path | str) -> tokenizers.Tokenizer:
    """The library's tokenizer from a file or the hub, without truncation, padding and dropout.

    A caption that spells a special token is ordinary text. UserError: there is no such tokenizer.
    """
    from tokenizers import models

    engine = _from_hub(source) if isinstance(source, str) else _from_file(source)
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    if isinstance(engine.model, models.BPE):
        engine.model.dropout = None  # noise for training a language model
    if not engine.get_vocab_size():
        raise UserError(f"labels.tokenizer: the tokenizer of {source} has an empty vocabulary", allowed=ALLOWED)
    return engine


def _from_hub(name: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Engine

    try:
        return Engine.from_pretrained(name)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"labels.tokenizer: {name!r} is no file, and its tokenizer.json could not be fetched from the hub: "
            f"{reason[0]}",
            allowed=ALLOWED,
            fix="check the name and the network, or download the tokenizer.json (or vocab.txt) and give its path",
        ) from None


def _from_file(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Engine

    value = read_json(path)
    if value is None and path.suffix != ".json":
        return _from_vocabulary(path)
    try:
        if value is None:
            raise ValueError("it is not JSON")
        return Engine.from_str(json.dumps(value))
    except Exception as error:
        raise UserError(
            f"labels.tokenizer: {path} is no tokenizer.json of the tokenizers library: {error}", allowed=ALLOWED
        ) from None


def _from_vocabulary(path: Path) -> tokenizers.Tokenizer:
    """BERT's WordPiece: a vocab.txt, one token per line, and the normalizer of a tokenizer_config.json next to it."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, normalizers, pre_tokenizers

    try:
        tokens = [line.rstrip("\r") for line in path.read_text("utf8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels.tokenizer: {path} cannot be read as a vocab.txt: {error}", allowed=ALLOWED) from None
    while tokens and not tokens[-1]:
        tokens.pop()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "[UNK]" not in vocabulary:
        problem = f"labels.tokenizer: {path} is no vocab.txt: it has no line [UNK]"
        raise UserError(problem, allowed="BERT's format, one token per line")
    config = path.with_name("tokenizer_config.json")
    options = (read_json(config) if config.is_file() else None) or {}
    engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.add_special_tokens([token for token in _BERT_SPECIALS if token in vocabulary])
    return engine


@cache
def _word() -> regex.Pattern[str]:
    """Letters with apostrophes inside, no digit, mark or underscore next to them; possessive: no part of a word."""
    import regex

    return regex.compile(r"(?<![\p{L}\p{M}\p{N}_])\p{L}++(?:['’]\p{L}++)*+(?![\p{M}\p{N}_])")


@cache
def stop_words() -> frozenset[str]:
    """The 179 English stop words of NLTK's public stopwords corpus (nltk_data, after Porter and others), a list without
    a licence of its own, in lower case with straight apostrophes.
    """
    return frozenset(resources.files("labels.tokenizers").joinpath("vocab/stop_words_en.txt").read_text("utf8").split())


def is_stop_word(word: str) -> bool:
    """Whether a word, as CLIP's pattern cuts it, is dropped; `don't` is cut to `don` and `'t`."""
    return word in stop_words() or (word.startswith("'") and word[1:] in stop_words())


def remove_from_piece(piece: str) -> str:
    """A piece of text between spaces, without its stop words in upper or lower case.

    A word is removed if it is in the list, or if each of its parts between apostrophes is (`I'm`).
    """
    return _word().sub(_kept, piece)


def remove_stop_words(text: str) -> str:
    """A caption without its stop words, and without the spaces of pieces that become empty."""
    return " ".join(filter(None, map(remove_from_piece, text.split(" "))))


def _kept(match: regex.Match[str]) -> str:
    word = match[0].lower().replace("’", "'")
    return "" if word in stop_words() or all(part in stop_words() for part in word.split("'")) else match[0]


def text_of(tokens: Sequence[str], tokenizer: str) -> str:
    """The text of a row of tokens of the tokenizer with this name in the manifest, as far as they determine it."""
    from tokenizers import decoders

    if tokenizer == "catlip":
        return ", ".join(tokens)
    if tokenizer == "wordpiece":
        return decoders.WordPiece(_INSIDE, cleanup=False).decode(list(tokens))
    if tokenizer == "clip" or any(token.endswith(_END) for token in tokens):
        return _from_bytes([token.replace(_END, _BYTE_SPACE) for token in tokens]).strip()
    if any(_BYTE_SPACE in token for token in tokens):
        return _from_bytes(tokens).strip()
    if any(_MARK in token for token in tokens):
        decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
        return decoder.decode(list(tokens)).strip()
    return ("" if tokenizer in ("bpe", "unigram") else " ").join(tokens)


def name_of(token: str, tokenizer: str) -> str:
    """One label's name: a word, or a part of one with `…` where the word continues; invalid UTF-8 stays as it is."""
    if tokenizer == "clip" and " " in token:  # a pair of words
        return " ".join(name_of(part, tokenizer) for part in token.split(" "))
    if tokenizer == "clip":
        text = _from_bytes([token.removesuffix(_END)])
        return (token.removesuffix(_END) if _REPLACEMENT in text else text) + ("" if token.endswith(_END) else "…")
    if tokenizer == "wordpiece" and token.startswith(_INSIDE):
        return "…" + token.removeprefix(_INSIDE)
    if token.startswith(_MARK) or token.endswith(_END):
        return token.removeprefix(_MARK).removesuffix(_END) or token
    text = _from_bytes([token]).strip() if token.startswith(_BYTE_SPACE) else ""
    return text if text and _REPLACEMENT not in text else token


def _from_bytes(tokens: Sequence[str]) -> str:
    from tokenizers import decoders

    return decoders.ByteLevel().decode(list(tokens))
