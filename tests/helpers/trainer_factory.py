"""A small label dataset with a small vocabulary, a configuration for the trainer, and functions that read a run."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from beton_factory import WORDS, build_out
from train.checkpoint import checkpoint_folders

CONFIG = """
train:
  samples: 1920
  batch_size: 16
  model:
    trunk: vit_tiny_patch16_224
    trunk_args: {patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}
    image_size: 16
  data: {threads: 2, flip: true, crop_scale: [0.5, 1.0]}
  optimizer: {lr: 4e-3, warmup_samples: 96, weight_decay: 0.1}
  runtime: {device: cpu, precision: fp32, threads: 1}
  checkpoint: {every_samples: 96, keep: 2}
  log: {every_seconds: 0.01, tensorboard: false}
"""
SAMPLES, STEPS = 100, 120


def small_out(folder: Path) -> Path:
    """A label dataset of 100 samples in three betons, with a vocabulary of 15 words."""
    words = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return build_out(folder, [40, 23, 37], f"labels.tokenizer={folder / 'tokenizer.json'}")


def small_config(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, lr) of every step, as metrics.jsonl has them."""
    return [(line["step"], line["loss"], line["lr"]) for line in lines(run) if "loss" in line]


def lines(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    folder = checkpoint_folders(run)[-1]
    return {
        f"{path.stem}.{name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: losses, weights, moments."""
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
