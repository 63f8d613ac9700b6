"""`train predict`: the likeliest tokens of images by a run's checkpoint; `train explain`: of a label dataset's sample.

image bytes -> decode [B, S, S, 3] -> trunk -> head [B, V] -> softmax or sigmoid, as the loss has it -> `top` tokens
B images, S image side, V vocabulary.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labels.config import load_pipeline
from labels.idf import newest_visual
from labels.manifest import read_manifest
from labels.show.explanation import Explanation, explain_row, with_guesses, with_visual
from labels.storage import UserError
from train.checkpoint import load_exactly, read_state, read_weights
from train.encoders.load import load_encoder
from train.evals.features import DECODE_FAULTS, Normaliser, decode
from train.losses.kinds import kind
from train.model import build_head
from train.trainer import SUPERCLASS

_ALLOWED = "image files that Pillow reads"


@torch.inference_mode()
def predict_tokens(run: Path | str, images: Iterable[tuple[str, bytes]], top: int) -> dict[str, Any]:
    """The `top` likeliest tokens of each image, by the newest checkpoint of a run folder, or one checkpoint's folder;
    `ema:RUN`: by the moving average of its weights.

    `images`: name and file content of each. Returns run, checkpoint, samples_seen, vocabulary,
    tokenizer_fingerprint and images: file, tokens
    (token_id, probability: softmax over V, or sigmoid for a loss that takes each token alone).
    """
    encoder = load_encoder(str(run) if str(run).startswith("ema:") else f"run:{run}")
    assert encoder.checkpoint is not None
    checkpoint, run_folder = encoder.checkpoint, encoder.checkpoint.parent.parent
    file, state = encoder.weight_file("head"), read_state(checkpoint)
    if state.method != SUPERCLASS:
        problem = f"{run} has no head of tokens: it was trained by `train {state.method}`"
        raise UserError(problem, allowed="a run of `train run`")
    head = build_head(encoder.width, state.vocabulary)
    load_exactly(head, read_weights(file), file)
    names, decoded = zip(*((name, _decode(name, data, encoder.images.side)) for name, data in images), strict=True)
    pixels = Normaliser(encoder.images, torch.device("cpu"))(torch.from_numpy(np.stack(decoded)))  # [B, 3, S, S]
    logits = head.eval()(encoder(pixels)).float()  # [B, V]
    loss = kind(load_pipeline(run_folder / "config.yaml").train.loss.name)
    probabilities = logits.softmax(dim=1) if getattr(loss, "DISTRIBUTION", False) else logits.sigmoid()
    best = probabilities.topk(min(top, state.vocabulary), dim=1)
    tokens = [
        [{"token_id": token, "probability": probability} for token, probability in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return {
        "run": str(run_folder),
        "checkpoint": encoder.description["checkpoint"],
        "samples_seen": state.samples_seen,
        "vocabulary": state.vocabulary,
        "tokenizer_fingerprint": json.loads((run_folder / "data.json").read_bytes())["tokenizer_fingerprint"],
        "images": [{"file": name, "tokens": row} for name, row in zip(names, tokens, strict=True)],
    }


def read_images(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file."""
    for file in files:
        try:
            yield str(file), file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}", allowed=_ALLOWED) from None


def _decode(name: str, data: bytes, side: int) -> np.ndarray:
    """uint8 [S, S, 3]."""
    try:
        return decode(data, side)
    except DECODE_FAULTS as error:
        raise UserError(f"{name} is not an image: {error}", allowed=_ALLOWED) from None


def explain_with_predictions(
    out: Path, name: str, run: Path | str, *, shard: str | None = None, top: int = 10, visual: Path | None = None
) -> Explanation:
    """The sample with the key or uid `name`, with the `top` likeliest tokens by a run that was trained on `out`.

    `shard`: the shard to search, if several have the key. `visual`: a table of `train weigh`, whose gains are shown;
    None: the newest that the run has made itself, if any.
    """
    explanation, tokenizer = explain_row(out, name, shard), read_manifest(out).tokenizer
    if explanation.image is None:
        return explanation
    predicted = predict_tokens(run, [(name, explanation.image)], top)
    vocabulary, fingerprint = predicted["vocabulary"], predicted["tokenizer_fingerprint"]
    if (vocabulary, fingerprint) != (tokenizer.vocabulary, tokenizer.fingerprint):
        raise UserError(
            f"{run} was trained on other classes: {vocabulary:,} of tokenizer {fingerprint}, "
            f"{out} has {tokenizer.vocabulary:,} of {tokenizer.fingerprint}",
            fix="give the output folder whose labels the run was trained on",
        )
    tokens = [(row["token_id"], row["probability"]) for row in predicted["images"][0]["tokens"]]
    explanation = with_guesses(explanation, out, predicted["checkpoint"], tokens)
    visual = visual or newest_visual(Path(predicted["run"]))
    if visual is None:
        return explanation
    settings = load_pipeline(Path(predicted["run"]) / "config.yaml").train.visual
    return with_visual(explanation, out, visual, settings.combination, settings.floor)
