"""The loop on batches made in code: a tiny model, any loss, any number of ranks; no files but the metrics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from labels.config import load_pipeline
from labels.settings import Train
from train.checkpoint import Tensors, snapshot
from train.distributed import World
from train.loop import Budget, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.trainer import make_train_state

VOCABULARY, STEPS, BATCH = 31, 6, 16  # a vocabulary that ranks cannot share evenly


@dataclass(frozen=True)
class Made:
    images: torch.Tensor
    label_ids: torch.Tensor
    bad: int = 0


def settings(*overrides: str) -> Train:
    """`train` for the tiny model. A large eps: with a small one AdamW makes whole steps of gradients that are nothing
    but rounding.
    """
    tiny = "{trunk: vit_b16, trunk_args: {patch_size: 8, depth: 2, embed_dim: 24, num_heads: 2}, image_size: 16}"
    keys = [
        f"batch_size={BATCH}",
        f"samples={BATCH * STEPS}",
        f"model={tiny}",
        "optimizer={lr: 1e-3, warmup_samples: 32, eps: 1e-3}",
    ]
    keys += ["runtime={device: cpu, precision: fp32}", "log={every_seconds: 1000, tensorboard: false}", *overrides]
    return load_pipeline(None, [f"train.{key}" for key in keys]).train


def batches(world: World, spoil: dict[int, float] | None = None) -> list[Made]:
    """This rank's share of every batch; `spoil` puts a number into an image of a step."""
    made = []
    for step in range(STEPS):
        dice = np.random.default_rng(step)
        images = torch.from_numpy(dice.standard_normal((BATCH, 3, 16, 16), np.float32))
        ids = np.sort(np.stack([dice.permutation(VOCABULARY)[:5] for _ in range(BATCH)]), axis=1).astype(np.int32)
        ids[::3, 3:] = -1
        if spoil and step in spoil:
            images[-1, 0, 0, 0] = spoil[step]
        share = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
        made.append(Made(images[share], torch.from_numpy(ids)[share]))
    return made


def train_in_this_process(
    run: Path, train: Train, world: World, spoil: dict[int, float] | None = None
) -> tuple[TrainState, Tensors]:
    """Train on `batches`; the metrics are in `run`."""
    run.mkdir(parents=True, exist_ok=True)
    train_state = make_train_state(train, torch.linspace(0.5, 3.0, VOCABULARY), world)
    metrics = Metrics(run, world, train, steps=STEPS, first_step=0, skipped=(0, 0), speed=Speed(1, 1e3), trackers=[])
    budget = Budget(STEPS, 2, 0)
    try:
        run_loop(
            batches(world, spoil),
            lambda batch: (batch.images, batch.label_ids),
            train_state,
            train,
            budget,
            world,
            metrics,
            save=lambda _: None,
            stopping=lambda: False,
        )
    finally:
        metrics.close()
    return train_state, snapshot(train_state, world.is_first)
