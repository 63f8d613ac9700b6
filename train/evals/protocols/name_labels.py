"""Texts -> label sets, or tokens in order: labelled as captions are, by the tokenizer and options of a build."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from labels.arrays import Column
from labels.config import load_pipeline
from labels.errors import UserError
from labels.layout import Layout
from labels.manifest import read_manifest
from labels.tokenizers.tokenizer import make_tokenizer


def label_texts(texts: Sequence[str], built: Path, column: Column = "label_ids") -> list[np.ndarray]:
    """The label ids of each text, as a caption of the build `built` would have them: int64, ascending, without repetition; or its
    `token_ids`, in order, at most as many as the build's context. Pairs of words are no part of them: the corpus chooses those.

    Raises:
        UserError: the build's tokenizer cannot be made, or gives other ids now than when `built` was made.
    """
    settings = load_pipeline(Layout(built).config).labels
    try:
        tokenizer = make_tokenizer(settings)
    except UserError as error:
        raise UserError(f"texts cannot be labelled as in {built}: {error}") from None
    was, now = read_manifest(built).tokenizer.fingerprint, tokenizer.fingerprint
    if was != now:
        raise UserError(
            f"texts are labelled with the tokenizer {now[:16]}, {built} was with {was[:16]}",
            allowed="the tokenizer, and the versions of ftfy and regex, that the labels were made with",
            mend="install these versions, or label again and train on that",
        )
    token_ids, token_offsets, label_ids, label_offsets = tokenizer.encode_rows(list(texts), settings.context)
    ids, offsets = (label_ids, label_offsets) if column == "label_ids" else (token_ids, token_offsets)
    return [row.astype(np.int64) for row in np.split(ids, offsets[1:-1])] if len(texts) else []
