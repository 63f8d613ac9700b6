"""`train predict`: the likeliest tokens of images by a run's checkpoint, as JSON; `train explain`: of one sample of a
dataset.

B images, S image side, W trunk width, V vocabulary.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labels.config import load_pipeline
from labels.explanation import Explanation, explain_row, with_guesses
from labels.manifest import read_manifest
from labels.storage import UserError
from train.checkpoint import checkpoint_folders, load_exactly, read_state, read_weights
from train.encoders.load import load_encoder, newest_checkpoint
from train.evals.features import decode
from train.losses.kinds import kind
from train.model import build_head
from train.trainer import SUPERCLASS


@torch.inference_mode()
def predict_tokens(run: Path, images: Iterable[tuple[str, bytes]], top: int) -> dict[str, Any]:
    """The `top` likeliest tokens of each image; its shorter side is resized to S, its centre is cropped.

    Args:
        run: the folder of a run, whose newest checkpoint is read, or of one checkpoint.
        images: name and file content of each, in any format that Pillow reads.
        top: how many tokens, at most V.

    Returns:
        checkpoint, samples_seen, vocabulary, tokenizer_fingerprint; images: file, tokens (token_id, probability:
        softmax over V, or sigmoid for a loss that treats each token alone).

    Raises:
        UserError: no checkpoint, or a file that is not an image.
    """
    path = run.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    encoder = load_encoder(f"run:{checkpoint}")
    file, state = checkpoint / "head.safetensors", read_state(checkpoint)
    if state.method != SUPERCLASS:
        raise UserError(
            f"{run} has no head of tokens: it was trained by `train {state.method}`", allowed="a run of `train run`"
        )
    vocabulary = state.vocabulary
    head = build_head(encoder.width, vocabulary)
    load_exactly(head, read_weights(file), file)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in encoder.images[1:])
    names, decoded = zip(*((name, _decode(name, data, encoder.images.side)) for name, data in images), strict=True)
    pixels = torch.from_numpy(np.stack(decoded))  # [B, S, S, 3]
    logits = head.eval()(encoder((pixels.permute(0, 3, 1, 2).float().div(255) - mean) / std))  # [B, V]
    # losses without DISTRIBUTION predict each token alone
    loss = load_pipeline(checkpoint.parent.parent / "config.yaml").train.loss.name
    probabilities = (
        logits.float().softmax(dim=1) if getattr(kind(loss), "DISTRIBUTION", False) else logits.float().sigmoid()
    )  # [B, V]
    best = probabilities.topk(min(top, vocabulary), dim=1)
    tokens = [
        [{"token_id": token, "probability": probability} for token, probability in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    data = json.loads((checkpoint.parent.parent / "data.json").read_bytes())
    return {
        "checkpoint": checkpoint.name,
        "samples_seen": state.samples_seen,
        "vocabulary": vocabulary,
        "tokenizer_fingerprint": data["tokenizer_fingerprint"],
        "images": [{"file": name, "tokens": row} for name, row in zip(names, tokens, strict=True)],
    }


def read_images(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file."""
    for file in files:
        try:
            yield str(file), file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror}", allowed="image files that Pillow reads"
            ) from None


def _decode(name: str, data: bytes, side: int) -> np.ndarray:
    """uint8 [S, S, 3]."""
    try:
        return decode(data, side)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not an image: {error}", allowed="image files that Pillow reads") from None


def explain_with_predictions(
    out: Path, name: str, run: Path, *, shard: str | None = None, top: int = 10
) -> Explanation:
    """One sample of an output folder with a run's `top` likeliest tokens.

    Args:
        out: the output folder whose labels the run was trained on.
        name: the sample's key or uid.
        run: as in `predict_tokens`.
        shard: the shard to search, if several have the key.
        top: how many tokens.

    Raises:
        UserError: no such sample, no checkpoint, or the run was trained on other classes.
    """
    explanation, tokenizer = explain_row(out, name, shard), read_manifest(out).tokenizer
    if explanation.image is None:
        return explanation
    predicted = predict_tokens(run, [(name, explanation.image)], top)
    if (predicted["vocabulary"], predicted["tokenizer_fingerprint"]) != (tokenizer.vocabulary, tokenizer.fingerprint):
        raise UserError(
            f"{run} was trained on other classes: {predicted['vocabulary']:,} of tokenizer {predicted['tokenizer_fingerprint']}, "
            f"{out} has {tokenizer.vocabulary:,} of {tokenizer.fingerprint}",
            fix="give the output folder whose labels the run was trained on",
        )
    tokens = [(row["token_id"], row["probability"]) for row in predicted["images"][0]["tokens"]]
    return with_guesses(explanation, out, predicted["checkpoint"], tokens)
