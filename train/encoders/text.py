"""The text side of an encoder: texts and its own features in one space, where cosines compare them.

texts -> tokens (the run's own tokenizer, by stage 1; open_clip's) -> text tower -> unit vectors [T, D]
features [N, W] -> projection -> unit vectors [N, D]
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from labels.arrays import Column
from labels.config import load_pipeline
from labels.manifest import PAD_ID, read_manifest
from labels.storage import Layout, UserError
from labels.tokenizers.tokenizer import make_tokenizer
from train.checkpoint import load_exactly, read_weights
from train.text_tower import Joint, build_text_tower, framed, specials_of

# ---- name_labels: Texts -> label sets, or tokens in order: labelled as captions are, by the tokenizer and options of a build.


def label_texts(texts: Sequence[str], built: Path, column: Column = "label_ids") -> list[np.ndarray]:
    """The label ids of each text, as a caption of the build `built` would have them: int64, ascending, without
    repetition; or its `token_ids`, in order, at most as many as the build's context. Pairs of words are no part of
    them: the corpus chooses those.

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
            fix="install these versions, or label again and train on that",
        )
    token_ids, token_offsets, label_ids, label_offsets = tokenizer.encode_rows(list(texts), settings.context)
    ids, offsets = (label_ids, label_offsets) if column == "label_ids" else (token_ids, token_offsets)
    return [row.astype(np.int64) for row in np.split(ids, offsets[1:-1])] if len(texts) else []


_TEXTS_AT_ONCE = 256


class Foreign(NamedTuple):
    """An encoder that is no trunk of this trainer, as `train lit` was given it; `weights_fingerprint` is its weights'."""

    spec: str
    weights: str | None
    weights_fingerprint: str


@dataclass(frozen=True)
class TextSide:
    """Both ways into the common space.

    Attributes:
        tokens: texts, and another OUT than the one that the run was trained on -> what `tower` takes, int64 [T, L].
        tower: -> [T, D].
        projection: features [N, W] -> [N, D].
    """

    tokens: Callable[[Sequence[str], Path | None], Tensor]
    tower: Callable[[Tensor], Tensor]
    projection: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, ...]

    def texts(self, texts: Sequence[str], device: torch.device, labels: Path | None = None) -> Tensor:
        """Unit vectors float32 [T, D] of texts, on the device.

        Raises:
            UserError: they cannot be tokenized as the tower's own were.
        """
        return self.embedded(self.tokens(texts, labels), device)

    @torch.inference_mode()
    def embedded(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Unit vectors float32 [T, D] of what `tokens` gives, on the device."""
        self._on(device)
        return torch.cat(
            [functional.normalize(self.tower(part.to(device)).float(), dim=1) for part in tokens.split(_TEXTS_AT_ONCE)]
        )

    @torch.inference_mode()
    def images(self, features: np.ndarray, device: torch.device) -> Tensor:
        """Unit vectors float32 [N, D] of features float32 [N, W], on the device."""
        self._on(device)
        return functional.normalize(self.projection(torch.from_numpy(features).to(device)).float(), dim=1)

    def _on(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device).eval()


def run_text_side(checkpoint: Path) -> TextSide:
    """Of a checkpoint of `train clip` or `train lit`.

    Raises:
        UserError: its files are damaged, or do not fit the run's configuration.
    """
    run = checkpoint.parent.parent
    settings, files = (
        load_pipeline(run / "config.yaml").text_tower,
        [checkpoint / f"{name}.safetensors" for name in ("text", "joint")],
    )
    text, joined = (read_weights(file) for file in files)
    tower: Any = build_text_tower(
        settings, len(text["token_embedding.weight"]) if "token_embedding.weight" in text else 1
    )
    joint = Joint(joined["projection.weight"].shape[1] if "projection.weight" in joined else 1, settings.embed_dim)
    load_exactly(tower, text, files[0])
    load_exactly(joint, joined, files[1])

    def tokens(texts: Sequence[str], labels: Path | None) -> Tensor:
        built = _built(run, labels)
        rows = label_texts(texts, built, "token_ids")
        padded = torch.full((len(rows), settings.context), PAD_ID)
        for row, ids in zip(padded, rows, strict=True):
            kept = torch.from_numpy(ids)[: settings.context]
            row[: len(kept)] = kept
        return framed(padded, specials_of(read_manifest(built).tokenizer), settings.context)

    return TextSide(tokens, tower, joint.projection, (tower, joint))


def _built(run: Path, labels: Path | None) -> Path:
    """The OUT whose tokenizer a run was trained with.

    Raises:
        UserError: it is not there, or has another tokenizer.
    """
    facts = json.loads((run / "data.json").read_bytes())
    built, wanted = labels or Path(facts["labels"]), facts["tokenizer_fingerprint"]
    fix = "--set zeroshot.labels=OUT, or retrieval.labels, if it has moved"
    if not Layout(built).manifest.is_file():
        raise UserError(
            f"{run} was trained on the captions of {built}, and no manifest is there",
            allowed="the OUT of its build-labels",
            fix=fix,
        )
    found = read_manifest(built).tokenizer.fingerprint
    if found != wanted:
        raise UserError(
            f"{run} was trained with the tokenizer {wanted[:16]}, {built} has {found[:16]}",
            allowed="the same",
            fix=fix,
        )
    return built


def foreign_encoder(run: Path) -> Foreign | None:
    """What a run of `train lit` has frozen, where that is no trunk that RUN/config.yaml describes; None for all other
    runs.
    """
    facts = json.loads((run / "data.json").read_bytes()) if (run / "data.json").is_file() else {}
    encoder = facts.get("encoder")
    return (
        None
        if encoder is None or encoder["by_config"]
        else Foreign(encoder["spec"], encoder["weights"], encoder["fingerprint"])
    )


def open_clip_text_side(name: str, model: Any) -> TextSide:
    """Of open_clip's `model`, whose image features are in the common space already."""

    def tokens(texts: Sequence[str], labels: Path | None) -> Tensor:
        import open_clip

        try:
            return open_clip.get_tokenizer(name)(list(texts))
        except (OSError, ImportError, ValueError) as error:  # tokenizers of the hub
            raise UserError(
                f"the tokenizer of open_clip's {name!r} is not on this machine: {str(error).splitlines()[0]}",
                allowed="models with open_clip's own tokenizer, or with one in Hugging Face's cache",
            ) from None

    return TextSide(tokens, model.encode_text, lambda features: features, (model,))
