"""What stage 1 needs of a tokenizer, how one is chosen, and where its file is found.

    labels.tokenizer: a name | a file | a folder | a hub name -> `find_file`, `find_source` -> `load_engine`, of the tokenizers library
    labels section -> `make_tokenizer`: the first family of labels/tokenizers/kinds that takes it -> a `Tokenizer`: captions -> ids

A tokenizer's ids are always those of the reference (open_clip for `clip`, the tokenizers library for all others); tests
compare them. `tokenizers`, `ftfy` and `regex` are imported where they are used: a training node imports labels/ without
them.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from labels.settings import TOKENIZERS, Labels, names_in
from labels.storage import UserError

if TYPE_CHECKING:
    import tokenizers

    from labels.tokenizers.word_table import Captions, Rows

ALLOWED = "clip | a tokenizer.json | a vocab.txt | a folder with either | a CatLIP vocabulary | a hub name such as bert-base-uncased"

_FILES = ("tokenizer.json", "vocab.txt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ANY = "subword"
"""The family that is asked last: it takes every name, or refuses it with what is allowed."""


class Tokenizer(Protocol):
    """Captions to ids; V tokens, N captions, T ids.

    Attributes:
        name: what the manifest calls it: `clip`, `catlip`, or the kind of model, such as `wordpiece`.
        tokens: the vocabulary as strings, position = id.
        excluded: ids that are never labels: special tokens and the unknown token, ascending.
        fingerprint: of everything that decides ids; equal fingerprints give equal ids.
        path: `fast`, the compiled way, or `plain`, the tokenizer itself for every caption. The ids are the same.
    """

    name: str
    tokens: list[str]
    excluded: np.ndarray
    fingerprint: str
    path: Literal["fast", "plain"]

    @property
    def whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """starts_word, ends_word, bool [V] each: a word border lies between ids a and b if ends_word[a] or
        starts_word[b].
        """
        ...

    def clean(self, caption: str) -> str:
        """The text that is cut into tokens: a caption after cleaning and without removed stop words. For people; ids do
        without.
        """
        ...

    def encode_rows(self, captions: Captions, limit: int) -> Rows:
        """Token ids and label sets of N captions; the excluded ids are in neither.

        Args:
            captions: N strings, as they came; a list or an Arrow array without nulls.
            limit: at most this many ids a caption; the rest is cut off.

        Returns:
            ids int32 [T], offsets int64 [N + 1]; label_ids int32 [T'], a caption's distinct ids in ascending order, and
            label_offsets int64 [N + 1].

        Raises:
            ValueError: a caption is null.
        """
        ...

    def encode(self, captions: Captions, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `encode_rows`."""
        ...


def make_tokenizer(settings: Labels) -> Tokenizer:
    """The tokenizer of these settings; one a process, so that its table of known words serves all shards.

    Raises:
        UserError: there is no such tokenizer, or its file is not one.
    """
    return _make(settings.tokenizer, settings.stop_words, settings.wordnet)


@cache
def _make(name: str, stop_words: Literal["keep", "remove"], wordnet: str) -> Tokenizer:
    """The first one that a family gives, by what decides ids."""
    settings = Labels(tokenizer=name, stop_words=stop_words, wordnet=wordnet)
    # The family of that very name first: CLIP's tokenizer is made without reading what only the others need.
    order = sorted(names_in(TOKENIZERS), key=lambda family: (family != name, family == _ANY))
    made = (import_module(f"{TOKENIZERS}.{family}").make(settings) for family in order)
    return next(tokenizer for tokenizer in made if tokenizer is not None)


def find_file(name: str) -> Path | None:
    """The file that `labels.tokenizer` names, or that lies in the folder it names; None if there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return next((path / file for file in _FILES if (path / file).is_file()), None)
    return path if path.exists() else None


def find_source(name: str) -> Path | str:
    """`labels.tokenizer` to the file that holds the tokenizer, or to a hub name.

    Raises:
        UserError: it is neither, or a folder without a tokenizer.
    """
    if (file := find_file(name)) is not None:
        return file
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"labels.tokenizer: the folder {name} holds neither {' nor '.join(_FILES)}", allowed=ALLOWED)
    if path.suffix in (".json", ".txt") or not _HUB_NAME.fullmatch(name):
        raise UserError(f"labels.tokenizer: there is no file {name!r}", allowed=ALLOWED)
    return name


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it holds something else.

    Raises:
        UserError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"labels.tokenizer: {path} cannot be read: {error}", allowed=ALLOWED) from None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def load_engine(source: Path | str) -> tokenizers.Tokenizer:
    """The tokenizer in a file or on the hub, as it would tokenize training text: without truncation, padding and
    dropout.

    Special tokens that a caption spells are ordinary text to it.

    Raises:
        UserError: the file holds no tokenizer; the hub cannot be reached, or does not know the name.
    """
    from tokenizers import models

    engine = _from_hub(source) if isinstance(source, str) else _from_file(source)
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    if isinstance(engine.model, models.BPE):
        # Noise for training a language model; labels are the same every time.
        engine.model.dropout = None
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
            f"labels.tokenizer: {name!r} is no file here, and its tokenizer.json could not be fetched from the hub: {reason[0]}",
            allowed=ALLOWED,
            fix="check the name and the network, or download the tokenizer.json (or vocab.txt) elsewhere and give its path",
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
    """BERT's WordPiece: a vocab.txt, one token a line, with what a tokenizer_config.json next to it says of its
    normaliser.
    """
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
        raise UserError(
            f"labels.tokenizer: {path} is no vocab.txt: it has no line [UNK]", allowed="BERT's form, one token a line"
        )
    options = (
        read_json(path.with_name("tokenizer_config.json"))
        if path.with_name("tokenizer_config.json").is_file()
        else None
    )
    options = options or {}
    engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.add_special_tokens([token for token in _BERT_SPECIALS if token in vocabulary])
    return engine
