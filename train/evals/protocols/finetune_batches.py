"""What fine-tuning's loop is fed: random crops of labelled images, mixed on the device.

N images, B batch (of this rank), S image side, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from labels.errors import UserError
from labels.settings import Positive, Section, Seeds
from train.data.feeder import rows_of_steps
from train.distributed import World
from train.encoders.encoder import ImageForm
from train.evals.data.images import LabelledImages
from train.evals.features import Normaliser, decoded_batches
from train.evals.pixels import decode_crop


class Finetune(Section):
    epochs: Positive = 50
    batch_size: Annotated[int, Field(ge=2)] = 1024
    base_lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    mixup: Annotated[float, Field(ge=0)] = 0.8
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    accumulation: Positive = 1
    seeds: Seeds = [0]

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, epochs {self.epochs}; allowed: less than epochs")
        return self


@dataclass(frozen=True)
class LabelledBatch:
    """images: uint8 [B, S, S, 3]. classes: int64 [B]. numbers: int64 [B], epoch * N + row. bad: none ever."""

    images: Tensor
    classes: Tensor
    numbers: np.ndarray
    bad: int = 0


def cropped_batches(
    data: LabelledImages, side: int, size: int, seed: int, threads: int, world: World, first_step: int, steps: int
) -> Iterator[LabelledBatch]:
    """This rank's share of every batch from `first_step` on: random resized crops and flips, all a function of (seed, epoch, row).

    Args:
        side: S. size: of the batch of all ranks, at most N. threads: that decode.

    Raises:
        UserError: an image cannot be decoded.
    """
    count, share = len(data), world.share(size)

    def numbers() -> Iterator[np.ndarray]:
        for step, rows in enumerate(rows_of_steps(count, size, seed, first_step, steps), start=first_step):
            epochs = np.arange(step * size, (step + 1) * size) // count
            yield (epochs * count + rows)[share]

    def picture(number: int) -> np.ndarray:
        epoch, row = divmod(number, count)
        return decode_crop(data.places[row].read(), side, seed, epoch, row)

    for batch in decoded_batches(numbers(), side, picture, threads, world.device):
        for number, reason in batch.bad:
            raise UserError(
                f"the image {data.keys[number % count]} of {data.directory} cannot be decoded ({reason})",
                allowed="whole image files that Pillow reads",
                mend="mend or remove it; `train probe` on the same data names all of them",
            )
        yield LabelledBatch(batch.images, torch.from_numpy(data.targets[batch.numbers % count]), batch.numbers)


class Mixing:
    """Called with a batch: normalised images float32 [B, 3, S, S] and targets float32 [B, C], mixed with one another, on the device.

    What is mixed how is a function of (seed, the batch's first number) alone.
    """

    def __init__(self, settings: Finetune, classes: int, form: ImageForm, seed: int, device: torch.device) -> None:
        self._normalise, self._classes, self._seed, self._device = Normaliser(form, device), classes, seed, device
        self._smoothing = settings.smoothing
        self._mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
        self._mixes = mixes(settings)

    def __call__(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        images, classes = self._normalise(batch.images).contiguous(), batch.classes.to(self._device)
        if not self._mixes:
            return images, mixup_target(classes, self._classes, smoothing=self._smoothing)
        with _numpy_seeded([self._seed, int(batch.numbers[0])]):
            return self._mixup(images, classes)


def mixes(settings: Finetune) -> bool:
    """Whether images are mixed at all; then timm mixes pairs, and batches are even."""
    return settings.mixup > 0 or settings.cutmix > 0


@contextmanager
def _numpy_seeded(numbers: list[int]) -> Iterator[None]:
    """numpy's global generator, which timm's Mixup draws from, seeded for a while."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(1))
    try:
        yield
    finally:
        np.random.set_state(before)
