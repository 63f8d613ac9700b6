"""The text side of an encoder: texts and its own features as unit vectors in one space, compared by cosines.

texts -> tokens (the run's own tokenizer; open_clip's) -> text tower -> unit vectors [T, D]
features [N, W] -> projection -> unit vectors [N, D]

`run_text_side` reads the towers of `train clip` and `train lit`, `open_clip_text_side` open_clip's. `label_texts` gives
texts the labels of captions, also for the zero-shot scores of runs without a text tower.
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
from labels.storage import Layout, UserError, local_path
from labels.tokenizers.tokenizer import make_tokenizer
from train.checkpoint import load_exactly, read_weights
from train.text_tower import Joint, build_text_tower, framed, specials_of

_TEXTS_PER_BATCH = 256


@dataclass(frozen=True)
class TextSide:
    """Both ways into the common space."""

    # texts, and another label dataset than the run's own (or None) -> the tower's input, int64 [T, L]
    tokens: Callable[[Sequence[str], Path | None], Tensor]
    tower: Callable[[Tensor], Tensor]  # -> [T, D]
    projection: Callable[[Tensor], Tensor]  # features [N, W] -> [N, D]
    modules: tuple[nn.Module, ...]

    def texts(self, texts: Sequence[str], device: torch.device, labels: Path | None = None) -> Tensor:
        """Unit vectors float32 [T, D] of texts, on the device."""
        return self.embedded(self.tokens(texts, labels), device)

    @torch.inference_mode()
    def embedded(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Unit vectors float32 [T, D] of the result of `tokens`, on the device."""
        self._move(device)
        parts = [self.tower(part.to(device)).float() for part in tokens.split(_TEXTS_PER_BATCH)]
        return functional.normalize(torch.cat(parts), dim=1)

    @torch.inference_mode()
    def images(self, features: np.ndarray, device: torch.device) -> Tensor:
        """Unit vectors float32 [N, D] of features float32 [N, W], on the device."""
        self._move(device)
        return functional.normalize(self.projection(torch.from_numpy(features).to(device)).float(), dim=1)

    def _move(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device).eval()


def run_text_side(checkpoint: Path, text_file: Path, joint_file: Path) -> TextSide:
    """The text side of a checkpoint of `train clip` or `train lit`, from its weights or their moving averages."""
    run = checkpoint.parent.parent
    settings = load_pipeline(run / "config.yaml").text_tower
    text, joint_tensors = read_weights(text_file), read_weights(joint_file)
    # Sizes are those of the tensors; where one is missing, load_exactly names it.
    vocabulary = len(text["token_embedding.weight"]) if "token_embedding.weight" in text else 1
    width = joint_tensors["projection.weight"].shape[1] if "projection.weight" in joint_tensors else 1
    tower: Any = build_text_tower(settings, vocabulary)
    joint = Joint(width, settings.embed_dim)
    load_exactly(tower, text, text_file)
    load_exactly(joint, joint_tensors, joint_file)

    def tokens(texts: Sequence[str], labels: Path | None) -> Tensor:
        dataset = label_dataset(run, labels)
        rows = label_texts(texts, dataset, "token_ids")
        padded = torch.full((len(rows), settings.context), PAD_ID)
        for row, ids in zip(padded, rows, strict=True):
            kept = torch.from_numpy(ids)[: settings.context]
            row[: len(kept)] = kept
        return framed(padded, specials_of(read_manifest(dataset).tokenizer), settings.context)

    return TextSide(tokens, tower, joint.projection, (tower, joint))


def label_dataset(run: Path, labels: Path | None) -> Path:
    """The label dataset with the tokenizer that a run was trained with: the run's own, or `labels`.

    Older runs name it as their command did. A relative name is looked for in the working folder and in those above the
    run; of several, the one with the fingerprint of the run's labels is taken.
    """
    facts = json.loads((run / "data.json").read_bytes())
    named, expected = labels or local_path(facts["labels"]), facts["tokenizer_fingerprint"]
    bases = [Path()] if labels else [Path(), *run.resolve().parents]
    folders = [base / named for base in bases if Layout(base / named).manifest.is_file()]
    fix = "--set zeroshot.labels=OUT, or retrieval.labels, if it has moved"
    if not folders:
        problem = f"{run} was trained on the captions of {named}, and no manifest is there"
        raise UserError(problem, allowed="the output folder of its build-labels", fix=fix)
    own = facts.get("fingerprints", {}).get("labels")
    manifests = {folder: read_manifest(folder) for folder in folders}
    fitting = [folder for folder in folders if manifests[folder].tokenizer.fingerprint == expected]
    if not fitting:
        fingerprint = manifests[folders[0]].tokenizer.fingerprint
        problem = f"{run} was trained with the tokenizer {expected[:16]}, {folders[0]} has {fingerprint[:16]}"
        raise UserError(problem, allowed="a label dataset of the same tokenizer", fix=fix)
    return next((folder for folder in fitting if manifests[folder].fingerprint == own), fitting[0])


def open_clip_text_side(name: str, model: Any) -> TextSide:
    """The text side of open_clip's `model`, whose image features are in the common space already."""

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


def label_texts(texts: Sequence[str], dataset: Path, column: Column = "label_ids") -> list[np.ndarray]:
    """The label ids of each text as a caption of the label dataset would have them: int64, ascending, unique; or its
    `token_ids`, in order, at most `labels.context`. Pairs of words are not among them: the corpus chooses those.
    """
    settings = load_pipeline(Layout(dataset).config).labels
    try:
        tokenizer = make_tokenizer(settings)
    except UserError as error:
        raise UserError(f"texts cannot be labelled as in {dataset}: {error}") from None
    expected, current = read_manifest(dataset).tokenizer.fingerprint, tokenizer.fingerprint
    if expected != current:
        raise UserError(
            f"texts are labelled with the tokenizer {current[:16]}, {dataset} was with {expected[:16]}",
            allowed="the tokenizer, and the versions of ftfy and regex, that the labels were made with",
            fix="install these versions, or label again and train on that",
        )
    token_ids, token_offsets, label_ids, label_offsets = tokenizer.encode_rows(list(texts), settings.context)
    ids, offsets = (label_ids, label_offsets) if column == "label_ids" else (token_ids, token_offsets)
    return [row.astype(np.int64) for row in np.split(ids, offsets[1:-1])] if len(texts) else []


class Foreign(NamedTuple):
    """An encoder that is no trunk of this trainer, as `train lit` was given it."""

    spec: str
    weights: str | None
    weights_fingerprint: str


def foreign_encoder(run: Path) -> Foreign | None:
    """The frozen encoder of a `train lit` run, unless it is the trunk of RUN/config.yaml; None for all other runs."""
    facts = json.loads((run / "data.json").read_bytes()) if (run / "data.json").is_file() else {}
    encoder = facts.get("encoder")
    if encoder is None or encoder["by_config"]:
        return None
    return Foreign(encoder["spec"], encoder["weights"], encoder["fingerprint"])
