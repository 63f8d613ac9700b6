"""`train predict`: the likeliest tokens of images by a run's checkpoint, as JSON.

B images, S image side, W trunk width, V vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labels.config import load_pipeline
from labels.errors import UserError
from labels.kinds import LOSSES, says
from train.checkpoint import checkpoint_folders, read_state
from train.evals.encoders.load import load_encoder
from train.evals.encoders.runs import newest_checkpoint
from train.evals.pixels import decode
from train.method import SUPERCLASS
from train.model import build_head
from train.weights import load_exactly, read_weights


@torch.inference_mode()
def predict_tokens(run: Path, files: Sequence[Path], top: int) -> dict[str, Any]:
    """The `top` likeliest tokens of each image, shorter side to S and cropped at the centre.

    Args:
        run: RUN, of which the newest checkpoint is taken, or one checkpoint's folder.
        files: images of any kind that Pillow reads.
        top: how many tokens, at most V.

    Returns:
        checkpoint, samples_seen, vocabulary, tokenizer_fingerprint; images: file, tokens (token_id, probability: softmax over V, or
        sigmoid, as the run's loss has it).

    Raises:
        UserError: no checkpoint, or a file that is no image.
    """
    path = run.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    encoder = load_encoder(f"run:{checkpoint}")
    file, state = checkpoint / "head.safetensors", read_state(checkpoint)
    if state.method != SUPERCLASS:
        raise UserError(f"{run} has no head of tokens: it was trained by `train {state.method}`", allowed="a run of `train run`")
    vocabulary = state.vocabulary
    head = build_head(encoder.width, vocabulary)
    load_exactly(head, read_weights(file), file)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in encoder.images[1:])
    pixels = torch.from_numpy(np.stack([_read(image, encoder.images.side) for image in files]))  # [B, S, S, 3]
    logits = head.eval()(encoder((pixels.permute(0, 3, 1, 2).float().div(255) - mean) / std))  # [B, V]
    # A loss that learns no distribution asks of each token alone whether it is there.
    loss = load_pipeline(checkpoint.parent.parent / "config.yaml").train.loss.name
    probabilities = logits.float().softmax(dim=1) if says(LOSSES, loss, "DISTRIBUTION") else logits.float().sigmoid()  # [B, V]
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
        "images": [{"file": str(image), "tokens": row} for image, row in zip(files, tokens, strict=True)],
    }


def _read(file: Path, side: int) -> np.ndarray:
    """uint8 [S, S, 3]."""
    try:
        return decode(file.read_bytes(), side)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is no image: {error}", allowed="image files that Pillow reads") from None
