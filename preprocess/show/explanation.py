"""One sample from caption to target: what `preprocess explain` knows, before it is shown.

KEY|UID -> label row -> image, caption, cleaned caption, tokens -> document frequency, IDF, t_c of each label
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels.errors import UserError
from labels.files import local_copy
from labels.idf import target_weights
from labels.layout import Layout
from labels.manifest import Manifest, read_manifest
from labels.tokenizers.text import name_of, text_of
from labels.tokenizers.tokenizer import Tokenizer, make_tokenizer
from preprocess.show.captions import DECODED, read_config, source_captions
from preprocess.show.predictions import Predicted, predict
from preprocess.show.samples import Sample, find_sample, quarantined, read_image


@dataclass(frozen=True)
class Label:
    """One label of a caption. `weight`: t_c, its share of the loss's target; `idf`: w_c; document frequency in captions."""

    token_id: int
    name: str
    document_frequency: int
    idf: float
    weight: float


@dataclass(frozen=True)
class Guess:
    """One token that a model expects, and whether the caption has it."""

    label: Label
    probability: float
    hit: bool


@dataclass(frozen=True)
class Explanation:
    """`tokens`: names in the caption's order; `labels`: by falling weight; `notes`: what a reader has to know beside."""

    sample: Sample
    image: bytes | None
    caption: str
    caption_from: str
    cleaned: str | None
    tokens: list[str]
    labels: list[Label]
    captions: int
    formula: str
    tokenizer: str
    notes: list[str] = field(default_factory=list)
    checkpoint: str = ""
    guesses: list[Guess] = field(default_factory=list)


class Vocabulary:
    """The table of idf.parquet, by token id."""

    def __init__(self, layout: Layout, manifest: Manifest) -> None:
        with local_copy(layout.idf_parquet) as file:
            table = pq.read_table(file)
        self._tokens = table["token"]
        self.frequency: np.ndarray = table["document_frequency"].to_numpy()
        self.idf: np.ndarray = table["idf"].to_numpy()
        self._tokenizer = manifest.tokenizer.name

    def __len__(self) -> int:
        return len(self.idf)

    def name(self, token_id: int) -> str:
        return name_of(self._tokens[token_id].as_py(), self._tokenizer)

    def text(self, token_ids: list[int]) -> str:
        """What a row of token ids says."""
        return text_of([self._tokens[token_id].as_py() for token_id in token_ids], self._tokenizer)

    def labels(self, label_ids: list[int]) -> list[Label]:
        """The labels of one caption, by falling weight."""
        weights = target_weights(self.idf[label_ids]) if label_ids else np.empty(0)
        order = sorted(range(len(label_ids)), key=lambda place: (-weights[place], label_ids[place]))
        return [self.label(label_ids[place], float(weights[place])) for place in order]

    def label(self, token_id: int, weight: float) -> Label:
        return Label(token_id, self.name(token_id), int(self.frequency[token_id]), float(self.idf[token_id]), weight)


def explain(out: Path, name: str, *, shard: str | None = None, run: Path | None = None, top: int = 10) -> Explanation:
    """Put together all that is known of one sample.

    Args:
        out: a finished OUT.
        name: the sample's key or uid.
        shard: the shard to look in, where a key stands in several.
        run: RUN of `train run`, or one of its checkpoints, whose `top` likeliest tokens are told too.
        top: how many.

    Raises:
        UserError: no such sample; a run of another vocabulary, or without `train` installed.
    """
    manifest, layout = read_manifest(out), Layout(out)
    sample = find_sample(out, manifest, name, shard)
    vocabulary = Vocabulary(layout, manifest)
    notes: list[str] = []
    if sample.repeats:
        notes.append(f"the subset names this sample {sample.repeats + 1} times; it has as many label rows")
    image = read_image(layout, manifest, sample)
    if image is None:
        left_out = [
            f"{reason}: {detail}" for _, stage, reason, detail in quarantined(layout, sample.key, sample.shard.name) if stage == "images"
        ]
        notes.append(f"no image: {left_out[0] if left_out else 'OUT has none, and no place of it that still holds'}")
    captions = source_captions(layout, sample.shard.name, {sample.key})
    caption = None if isinstance(captions, str) else captions.get(sample.key)
    tokenizer = _tokenizer(layout, manifest, notes)
    if caption is None:
        why = captions if isinstance(captions, str) else "the shard no longer holds the sample"
        told_from = f"{DECODED}: {why}"
    else:
        told_from = f"from the shard {sample.shard.source}"
        limit = manifest.options["labels"]["context"]
        if tokenizer and tokenizer.encode([caption], limit)[0].tolist() != sample.token_ids:
            notes.append("this caption does not give the tokens of the label row")
        if len(sample.token_ids) == limit:
            notes.append(f"the caption fills the limit of {limit} tokens: what comes after them is cut off")
    labels = vocabulary.labels(sample.label_ids)
    if labels and not any(label.weight for label in labels):
        notes.append("no label has weight: this sample's loss is 0")
    checkpoint, guesses = "", []
    if run is not None and image is not None:
        predicted = predict(run, image, top, vocabulary=len(vocabulary), tokenizer=manifest.tokenizer.fingerprint, out=out)
        checkpoint, guesses = predicted.checkpoint, _guesses(predicted, vocabulary, labels)
    return Explanation(
        sample=sample, image=image, caption=vocabulary.text(sample.token_ids) if caption is None else caption, caption_from=told_from,
        cleaned=tokenizer.clean(caption) if tokenizer and caption is not None else None,
        tokens=[vocabulary.name(token) for token in sample.token_ids], labels=labels, captions=manifest.captions,
        formula=manifest.idf_formula, tokenizer=manifest.tokenizer.name, notes=notes, checkpoint=checkpoint, guesses=guesses,
    )  # fmt: skip


def _tokenizer(layout: Layout, manifest: Manifest, notes: list[str]) -> Tokenizer | None:
    """The tokenizer that OUT was built with, None if it is no longer to be had."""
    try:
        tokenizer = make_tokenizer(read_config(layout).labels)
    except UserError as error:
        notes.append(f"no cleaned caption: {error.problem}")
        return None
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        notes.append("no cleaned caption: the tokenizer, or a library that cleans for it, is another one than at the build")
        return None
    return tokenizer


def _guesses(predicted: Predicted, vocabulary: Vocabulary, labels: list[Label]) -> list[Guess]:
    weights = {label.token_id: label.weight for label in labels}
    return [
        Guess(vocabulary.label(token_id, weights.get(token_id, 0.0)), probability, token_id in weights)
        for token_id, probability in predicted.tokens
    ]
