"""`preprocess train-tokenizer`: captions to a tokenizer file for `labels.tokenizer`.

    captions -> normalise, split into words -> the library's trainer -> tokenizer.json (bpe, wordpiece, unigram, ...)
    captions -> synset of every noun -> those in enough captions -> CatLIP vocabulary (catlip)

The same captions in the same order give the same file. All of them are lower-cased, as CLIP's are. Unigram is trained
by `sentencepiece`, since the trainer of `tokenizers` gives another result each time.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from labels import TokenizerKind
from labels.storage import UserError, write_whole
from labels.tokenizers.kinds.catlip import CatlipTokenizer, write_vocabulary

# Called for each pass over the captions; wordpiece takes two.
Captions = Callable[[], Iterable[list[str]]]

# Most characters of WordPiece's alphabet, the most frequent first; BERT's own trainer has the same bound.
_MAX_ALPHABET = 1000
_BYTES = 256
# sentencepiece holds its captions in memory; of more, it draws this many, with a seed.
_MAX_SENTENCES = 5_000_000


def train_tokenizer(
    captions: Captions,
    kind: TokenizerKind,
    *,
    out: Path,
    vocab_size: int = 32_768,
    min_count: int | None = None,
    wordnet: str = "auto",
) -> int:
    """Train a tokenizer, write its file atomically, and return the size of its vocabulary.

    Args:
        captions: called for each pass; yields the same batches each time.
        kind: `bpe` over bytes, `wordpiece` as BERT's, `unigram` and `wordlevel` with NFKC, or `catlip`.
        out: a tokenizer.json or, for catlip, a vocabulary.
        vocab_size: the most tokens; not for catlip.
        min_count: the least count of a merged pair (bpe, wordpiece), of a word (wordlevel; all 2 if None), or of
            captions with a synset (catlip; 500 if None). unigram ignores it.
        wordnet: `labels.wordnet`, for catlip.

    Raises:
        UserError: no captions, a vocabulary too small for the alphabet, no WordNet.
    """
    least = min_count if min_count is not None else 500 if kind == "catlip" else 2
    if kind == "catlip":
        return _train_catlip(captions, out, least, wordnet)
    counted = _Counted(captions)
    engine = _TRAINERS[kind](counted, vocab_size, least)
    if not counted.captions:
        raise UserError(
            "train-tokenizer: there are no captions in the input",
            fix="give a folder of shards or a table with captions",
        )
    write_whole(out, lambda partial: partial.write_text(engine.to_str(pretty=True) + "\n", encoding="utf8"))
    return engine.get_vocab_size()


class _Counted:
    """Captions, without lone surrogates, and how many there were in the last pass."""

    def __init__(self, captions: Captions) -> None:
        self._give = captions
        self.captions = 0

    def __iter__(self) -> Iterator[list[str]]:
        self.captions = 0
        for batch in self._give():
            self.captions += len(batch)
            yield [caption.encode("utf8", "replace").decode("utf8") for caption in batch]


def _train_bpe(captions: _Counted, vocab_size: int, min_count: int) -> Engine:
    """Over bytes, so that nothing is unknown; a word begins with the space before it."""
    _check_size(vocab_size, _BYTES, "all bytes")
    engine = Engine(models.BPE())
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    limits = {"vocab_size": vocab_size, "min_frequency": min_count, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **limits)
    engine.train_from_iterator(captions, trainer)
    return engine


def _train_wordpiece(captions: _Counted, vocab_size: int, min_count: int) -> Engine:
    """As BERT's, uncased.

    The trainer numbers the characters inside words in the order of a hash table, and the numbers decide between equal
    counts. For the same result each time, a pass before it finds the alphabet, and gives it as special tokens.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    letters = Counter[str]()
    for batch in captions:
        letters.update(normalizer.normalize_str(" ".join(batch)))
    letters = {letter: count for letter, count in letters.items() if not letter.isspace()}
    alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:_MAX_ALPHABET])
    inner = ["##" + letter for letter in alphabet]
    characters = f"{len(alphabet)} characters, each at the beginning of a word and inside"
    _check_size(vocab_size, 1 + 2 * len(alphabet), characters)
    trained = Engine(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_count,
        special_tokens=["[UNK]", *inner],
        initial_alphabet=alphabet,
        limit_alphabet=max(1, len(alphabet)),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    # Made again: to the trained one the characters inside words are special tokens.
    engine = Engine(models.WordPiece(trained.get_vocab(with_added_tokens=False) or {"[UNK]": 0}, unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens(["[UNK]"])
    return engine


def _train_unigram(captions: _Counted, vocab_size: int, min_count: int) -> Engine:
    """SentencePiece's unigram model; `min_count` is ignored."""
    try:
        import sentencepiece  # pyright: ignore[reportMissingImports] - wanted by this kind alone
    except ImportError:
        raise UserError(
            "train-tokenizer: --kind unigram needs sentencepiece, which is not installed",
            fix="pip install sentencepiece",
        ) from None
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                normalizer.normalize_str(caption).replace("\n", " ") for batch in captions for caption in batch
            ),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            input_sentence_size=_MAX_SENTENCES,
            num_threads=1,  # sums of floats depend on how they are parted
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not captions.captions:
            return Engine(models.Unigram())
        raise UserError(
            f"train-tokenizer: sentencepiece cannot train on these captions: {error}", fix="give another --vocab-size"
        ) from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = [number for number in range(trained.get_piece_size()) if not trained.is_control(number)]
    pieces = [(trained.id_to_piece(number), trained.get_score(number)) for number in numbers]
    engine = Engine(models.Unigram(pieces, unk_id=0))
    engine.normalizer = normalizer
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    engine.add_special_tokens([pieces[0][0]])
    return engine


def _train_wordlevel(captions: _Counted, vocab_size: int, min_count: int) -> Engine:
    """The most frequent words and runs of punctuation; all others are unknown."""
    _check_size(vocab_size, 1, "the unknown token")
    engine = Engine(models.WordLevel(unk_token="[UNK]"))
    engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_count, special_tokens=["[UNK]"], show_progress=False
    )
    engine.train_from_iterator(captions, trainer)
    return engine


_TRAINERS = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram, "wordlevel": _train_wordlevel}


def _train_catlip(captions: Captions, out: Path, min_count: int, wordnet: str) -> int:
    """The synsets that `min_count` captions or more have."""
    everything = CatlipTokenizer.of_all_nouns(wordnet)
    frequency = np.zeros(len(everything.tokens), np.int64)
    total = 0
    for batch in captions():
        total += len(batch)
        labels = everything.encode_rows(batch, np.iinfo(np.int32).max)[2]
        frequency += np.bincount(labels, minlength=len(frequency))
    kept = [name for name, count in zip(everything.tokens, frequency, strict=True) if count >= max(1, min_count)]
    if not kept:
        raise UserError(
            f"train-tokenizer: no synset is in {min_count} captions or more; of {total:,} captions, "
            f"{int(frequency.max()):,} have the most frequent synset",
            fix="give a smaller --min-count",
        )
    write_vocabulary(out, everything.nouns, kept, min_count)
    return len(kept)


def _check_size(vocab_size: int, least: int, holding: str) -> None:
    if vocab_size < least:
        raise UserError(f"train-tokenizer: --vocab-size is {vocab_size}", allowed=f"{least} or more, for {holding}")
