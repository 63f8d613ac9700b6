"""One mapper on one encoder's features, trained over the one loop, and the captions it gives.

features [N, W], captions -> Pairs -> loop (Captioner, AdamW) -> WORK (metrics, checkpoints) -> beam search over the test part
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from labels.settings import AdapterOptimizer, Checkpoint, Count, Log, Optimizer, Positive, Runtime, Section, Seeds, Train, within_budget
from labels.storage import fingerprint
from train.caption.batches import PairBatch, Pairs, pair_batches
from train.caption.decoder import BUILT_IN, SmallDecoder
from train.caption.mapper import MlpMapper, TransformerMapper
from train.distributed import World
from train.evals.captioner import Captioner
from train.language_model import LanguageModel
from train.precision import autocast_dtype
from train.trainer import train_model


class Caption(Section):
    decoder: Annotated[str, Field(min_length=1)] = "built-in"
    train_decoder: bool = False
    built_in: SmallDecoder = SmallDecoder()
    mapper: Literal["transformer", "mlp"] = "transformer"
    mapper_layers: Positive = 8
    prefix: Positive = 40
    max_tokens: Annotated[int, Field(ge=2)] = 40
    beams: Positive = 5
    samples: Count = 5_660_000
    batch_size: Positive = 40
    optimizer: AdapterOptimizer = AdapterOptimizer()
    seeds: Seeds = [0]

    @model_validator(mode="after")
    def _budget(self) -> Self:
        return within_budget(self, self.samples, self.batch_size, self.optimizer)


_GENERATED_AT_ONCE = 64
_SAVE_EVERY_MINUTES = 10.0


@dataclass(frozen=True)
class Work:
    """A folder of metrics and checkpoints, and the fingerprint of all that decides what stands in it."""

    folder: Path
    identity: str

    @classmethod
    def of(cls, folder: Path, facts: object) -> "Work":
        """A folder below `folder` named by the facts: the same facts resume the same training."""
        identity = fingerprint(facts)
        return cls(folder / identity, identity)


def trainer_settings(caption: Caption, runtime: Runtime) -> Train:
    """The trainer's section for the budget and the optimiser of captioning."""
    return Train(
        samples=caption.samples, batch_size=caption.batch_size, runtime=runtime, optimizer=Optimizer(**caption.optimizer.model_dump()),
        log=Log(tensorboard=False), checkpoint=Checkpoint(every_samples=caption.samples, every_minutes=_SAVE_EVERY_MINUTES, keep=1),
    )  # fmt: skip


def make_captioner(width: int, language: LanguageModel, settings: Caption, seed: int) -> Captioner:
    """Mapper and decoder for features of `width`, the mapper drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.mapper == "mlp":
            mapper: torch.nn.Module = MlpMapper(width, settings.prefix, language.width)
        else:
            mapper = TransformerMapper(width, settings.prefix, language.width, settings.mapper_layers)
    return Captioner(mapper, language, train_decoder=settings.train_decoder or language.name == BUILT_IN)


def train_captioner(
    captioner: Captioner, features: np.ndarray, pairs: Pairs, settings: Train, work: Work, world: World, stopping: Callable[[], bool]
) -> bool:
    """Train, or go on; see train_model.

    Args:
        captioner: moved to the device.
        features: float32 [N, W], of the images that `pairs` count.
    """
    captioner.place(world.device)

    def inputs(batch: PairBatch) -> tuple[Tensor, Tensor]:
        return batch.features.to(world.device, non_blocking=True), batch.ids.to(world.device, non_blocking=True)

    def batches(first_step: int, steps: int) -> Iterator[PairBatch]:
        return pair_batches(features, pairs, settings.batch_size, settings.runtime.seed, world, first_step, steps)

    return train_model(captioner, batches, inputs, settings, work.folder, work.identity, world, stopping)


def captions_of(
    captioner: Captioner, language: LanguageModel, features: np.ndarray, settings: Caption, precision: str, device: torch.device
) -> list[str]:
    """A caption for every row of features [N, W]."""
    captioner.eval()
    found: list[str] = []
    dtype = autocast_dtype(precision, device)
    for part in torch.from_numpy(features).split(_GENERATED_AT_ONCE):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found += captioner.generate(part.to(device), language, beams=settings.beams, max_tokens=settings.max_tokens)
    return found
