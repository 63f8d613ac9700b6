"""What several tests share: run factory."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from labels.config import dump_yaml
from labels.settings import Model, Pipeline, Train
from train.model import build_trunk

MODEL = Model(trunk="vit_tiny_patch16_224", trunk_args={"depth": 1, "embed_dim": 24, "num_heads": 2}, image_size=32)


def write_run(run: Path, *samples_seen: int) -> dict[int, torch.nn.Module]:
    """A run folder with one checkpoint a number, all of different weights."""
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
