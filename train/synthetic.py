"""Random images and labels, made once on the device: `train run --synthetic` shows what the model alone can do, without loader and disk.

B batch (of this rank), S image side, V vocabulary, K label limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from labels.schema import PAD_ID
from labels.settings import Train
from train.distributed import World

_LABELS_OF_A_SAMPLE = 12


@dataclass(frozen=True)
class SyntheticBatch:
    """images float32 [B, 3, S, S], as normalised as real ones; label_ids int32 [B, K], padded with PAD_ID; no image is bad."""

    images: torch.Tensor
    label_ids: torch.Tensor
    bad: int = 0


def synthetic_batches(settings: Train, vocabulary: int, label_limit: int, world: World, steps: int) -> Iterator[SyntheticBatch]:
    """The same batch, once a step."""
    share, size = settings.batch_size // world.size, settings.model.image_size
    dice = torch.Generator(world.device).manual_seed(settings.runtime.seed + world.rank)
    images = torch.randn((share, 3, size, size), generator=dice, device=world.device)
    label_ids = torch.full((share, label_limit), PAD_ID, dtype=torch.int32, device=world.device)
    filled = min(_LABELS_OF_A_SAMPLE, label_limit, vocabulary)
    drawn = torch.randint(vocabulary, (share, 2 * filled), generator=dice, device=world.device)
    for row, ids in enumerate(drawn):
        distinct = ids.unique()[:filled]  # ascending and distinct, as label rows are
        label_ids[row, : len(distinct)] = distinct.int()
    batch = SyntheticBatch(images, label_ids)
    return (batch for _ in range(steps))


def synthetic_inputs(batch: SyntheticBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model takes: there is nothing left to do."""
    return batch.images, batch.label_ids
