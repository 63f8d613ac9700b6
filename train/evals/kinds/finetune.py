"""`train finetune`: the whole encoder trained on the labels, MAE's end-to-end recipe (arXiv 2111.06377, table 9; main_finetune.py).

places -> random crops and flips -> mixup or cutmix -> loop (FineTuned, AdamW with a rate for each layer) -> test part, once, at the end

Of the paper's recipe, RandAugment is left out; of its code, random erasing too. N samples, C classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from labels.config import own_section
from labels.errors import UserError
from labels.settings import Checkpoint, Log, Optimizer, Pipeline, Runtime, Train
from labels.storage import fingerprint
from train.distributed import World, distributed_world
from train.encoders.encoder import Encoder
from train.encoders.load import load_encoder
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.pixels import TRANSFORM, decode
from train.evals.protocol import Score, accuracies, work_folder
from train.evals.protocols.finetune_batches import Finetune, LabelledBatch, Mixing, cropped_batches, mixes
from train.evals.protocols.finetune_model import FineTuned, make_layer_decayed, set_drop_path, train_what_is_read
from train.loop import Stopped, stop_signals
from train.trainer import train_model

_SAVE_EVERY_MINUTES = 10.0


class FineTune:
    """See `Evaluation`."""

    name, takes = "finetune", "classes"

    def settings(self, pipeline: Pipeline) -> Finetune:
        return own_section(pipeline, self.name, Finetune)

    def describe(self, settings: Finetune) -> str:
        mixed = f"mixup {settings.mixup:g}, cutmix {settings.cutmix:g}" if mixes(settings) else "no mixing"
        return (
            f"end-to-end fine-tuning, MAE's recipe without RandAugment and random erasing: {settings.epochs} epochs, "
            f"layer decay {settings.layer_decay:g}, weight decay {settings.weight_decay:g}, {mixed}, "
            f"label smoothing {settings.smoothing:g}; the last epoch is tested"
        )

    def check(self, data: DataSet, settings: Finetune) -> None:
        batch_size(len(data.train), settings, ranks=1)

    def unfit(self, encoder: Encoder) -> str | None:
        return None if any(True for _ in encoder.net.parameters()) else "it has no weights to train; give run:, timm:, open_clip: or hf:"

    def scores(self, encoder: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seeds: Sequence[int]) -> list[Score]:
        with work_folder(extract, self.name) as folder:
            return [self._score(encoder, data, settings, extract, seed, folder) for seed in seeds]

    def _score(self, frozen: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seed: int, folder: Path) -> Score:
        encoder = load_encoder(frozen.asked, seed=seed)  # its own weights, which training changes
        runtime = Runtime(device=extract.device.type, precision=extract.precision, accumulation=settings.accumulation, seed=seed)  # type: ignore[arg-type]
        with distributed_world(runtime) as world, stop_signals() as stopping:
            train = train_settings(settings, runtime, len(data.train), world)
            model, drop_path = make_model(encoder, len(data.classes), settings.drop_path, seed, world)
            images = [data.train.fingerprint, data.train.modified_ns]
            identity = fingerprint(
                [encoder.describe(), images, settings.model_dump(exclude={"seeds"}), seed, world.size, TRANSFORM, extract.precision]
            )
            mixing = Mixing(settings, len(data.classes), encoder.images, seed, world.device)

            def batches(first_step: int, steps: int) -> Iterator[LabelledBatch]:
                side, size = encoder.images.side, train.batch_size
                return cropped_batches(data.train, side, size, seed, extract.threads, world, first_step, steps)

            make = make_layer_decayed(settings.layer_decay)
            if not train_model(model, batches, mixing, train, folder / identity, identity, world, stopping, make):
                raise Stopped(f"fine-tuning of {encoder.name}")
            metrics = accuracies(logits(model, encoder, data, extract), torch.from_numpy(data.test.targets))
        steps = train.samples // train.batch_size
        about = {"batch_size": train.batch_size, "steps": steps, "learning_rate": train.optimizer.lr, "drop_path": drop_path}
        return Score("fine-tuned", seed, metrics, about)


EVALUATION = FineTune()


def batch_size(samples: int, settings: Finetune, ranks: int) -> int:
    """The batch that is asked for, or as much of it as the training part has; it can be shared out and, where it is mixed, paired.

    Raises:
        UserError: no such batch is left.
    """
    unit = settings.accumulation * ranks * (2 if mixes(settings) else 1)
    size = min(settings.batch_size, samples) // unit * unit
    if not size:
        raise UserError(
            f"finetune.batch_size is {settings.batch_size}, the training part has {samples} images, and a batch is shared out in {unit}",
            allowed=f"a batch and a training part of {unit} images or more",
            mend="--set finetune.accumulation=1, or a larger finetune.batch_size",
        )
    return size


def train_settings(settings: Finetune, runtime: Runtime, samples: int, world: World) -> Train:
    """The trainer's section for `epochs` over a training part of `samples`: the whole budget in whole batches."""
    size = batch_size(samples, settings, world.size)
    lr = settings.base_lr * size / 256
    total = max(settings.epochs * samples // size, 1) * size
    warmup = min(settings.warmup_epochs * samples, total - 1)
    return Train(
        samples=total, batch_size=size, runtime=runtime, log=Log(tensorboard=False),
        optimizer=Optimizer(
            lr=lr, betas=[0.9, 0.999], eps=1e-8, weight_decay=settings.weight_decay, warmup_samples=warmup, clip_norm=settings.clip_norm
        ),
        checkpoint=Checkpoint(every_samples=total, every_minutes=_SAVE_EVERY_MINUTES, keep=1),
    )  # fmt: skip


def make_model(encoder: Encoder, classes: int, drop_path: float, seed: int, world: World) -> tuple[FineTuned, float]:
    """The encoder's net with a new head drawn from `seed`, on the device, all that is read to be trained; and the drop path it took."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FineTuned(encoder.net, encoder.width, classes)
    train_what_is_read(model, encoder.images.side)
    return model.to(world.device), set_drop_path(model.trunk, drop_path)


def logits(model: FineTuned, encoder: Encoder, data: DataSet, extract: Extractor) -> Tensor:
    """Logits [N, C] of the test part's central crops, float32 on the CPU."""
    net = nn.Sequential(model.trunk, model.head).eval()
    whole = Encoder(encoder.asked, net, encoder.images, len(data.classes), encoder.seeded, {})
    found = extract.stream(whole, data.test, np.arange(len(data.test)), lambda encoded, side, row: decode(encoded, side))
    return torch.cat([part.cpu() for part in found])
