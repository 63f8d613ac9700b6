"""Folders of small untrained encoders: runs with checkpoints, and models in Hugging Face's format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labels.config import dump_yaml
from labels.settings import Model, Pipeline, Train
from train.model import build_trunk

MODEL = Model(trunk="vit_tiny_patch16_224", trunk_args={"depth": 1, "embed_dim": 24, "num_heads": 2}, image_size=32)
VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def write_run(run: Path, *samples_seen: int) -> dict[int, torch.nn.Module]:
    """A run folder with a checkpoint for each number, all with different weights."""
    run.mkdir()
    dump_yaml(run / "config.yaml", Pipeline(train=Train(model=MODEL)))
    trunks = {}
    for number in samples_seen:
        folder = run / "checkpoints" / f"samples-{number:012d}"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        trunks[number] = build_trunk(MODEL).eval()
        save_file(trunks[number].state_dict(), folder / "trunk.safetensors")
    return trunks


def write_hf(folder: Path, model: Any, side: int = 32, **processor) -> Path:
    model.save_pretrained(folder)
    kind, size = {"image_processor_type": "ViTImageProcessor"}, {"size": {"height": side, "width": side}}
    words = kind | size | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3} | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    return folder
