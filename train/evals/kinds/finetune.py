"""`train finetune`: the whole encoder trained on the labels, MAE's end-to-end recipe (arXiv 2111.06377, table 9;
main_finetune.py).

places -> random crops and flips -> mixup or cutmix -> loop (FineTuned, AdamW with a rate for each layer) -> test part, once, at the end

Of the paper's recipe, RandAugment is left out; of its code, random erasing too. N samples, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from timm.data.mixup import Mixup, mixup_target
from timm.layers.drop import DropPath
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from labels.settings import Checkpoint, Log, Optimizer, Positive, Runtime, Section, Seeds, Train
from labels.storage import UserError, fingerprint
from train.data.inputs import rows_of_steps
from train.distributed import World, distributed_world, repeated_blocks
from train.encoders.encoder import Encoder, ImageForm
from train.encoders.load import load_encoder
from train.evals.data.images import LabelledImages
from train.evals.data.sets import DataSet
from train.evals.features import TRANSFORM, Extractor, Normaliser, decode, decode_crop, decoded_batches
from train.evals.protocol import Evaluation, Score, accuracies, work_folder
from train.loop import Stopped, stop_signals
from train.optim import adamw
from train.trainer import MakeOptimizer, train_model

# ---- finetune_batches: What fine-tuning's loop is fed: random crops of labelled images, mixed on the device.
#
# N images, B batch (of this rank), S image side, C classes.


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
    """This rank's share of every batch from `first_step` on: random resized crops and flips, all a function of (seed,
    epoch, row).

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
        return decode_crop(data.encoded[row].read(), side, seed, epoch, row)

    for batch in decoded_batches(numbers(), side, picture, threads, world.device):
        for number, reason in batch.bad:
            raise UserError(
                f"the image {data.keys[number % count]} of {data.directory} cannot be decoded ({reason})",
                allowed="whole image files that Pillow reads",
                fix="fix or remove it; `train probe` on the same data names all of them",
            )
        yield LabelledBatch(batch.images, torch.from_numpy(data.targets[batch.numbers % count]), batch.numbers)


class Mixing:
    """Called with a batch: normalised images float32 [B, 3, S, S] and targets float32 [B, C], mixed with one another,
    on the device.

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


# ---- finetune_model: What is fine-tuned: an encoder's own net with a linear head; its rates layer by layer, and its
# drop path.
#
# B batch, S image side, W feature width, C classes.


_HEAD_STD = 2e-5
_NOT_DECAYED = (
    "*pos_embed*",
    "*positional_embedding*",
    "*position_embedding*",
    "*cls_token*",
    "*class_embedding*",
    "*reg_token*",
)
_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
_AFTER_ALL = "a name that no matcher knows"


class FineTuned(nn.Module):
    """Trunk and head: normalised images [B, 3, S, S] and targets [B, C] that sum to 1 -> the batch's mean cross entropy.

    The head's weight is drawn from N(0, 2e-5), truncated, its bias 0 (MAE's main_finetune.py).

    Args:
        trunk: normalised images -> features [B, W].
    """

    def __init__(self, trunk: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.loss = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.head(self.trunk(images)), targets)

    def group_matcher(self, coarse: bool = False) -> Any:
        """timm's interface: the name of a trained parameter -> the number of its layer, from 0."""
        numbers = {f"trunk.{name}": number for name, number in layers(self.trunk).items()}
        last = max(numbers.values())
        return lambda name: numbers.get(name, last)


def layers(trunk: nn.Module) -> dict[str, int]:
    """The layer of every trained parameter of a trunk; the highest number is the head's, whether or not the trunk has
    something there.

    timm's nets group themselves. Of others: what comes before the blocks is layer 0, then block after block, then the
    rest (BEiT's, MAE's). Blocks that nothing reads (beyond `--layer`) do not count: the last one that is read is next
    to the head.
    """
    held = getattr(trunk, "net", trunk)  # a readout holds the model as `net`
    before = "net." if held is not trunk else ""
    trained = [name for name, parameter in held.named_parameters() if parameter.requires_grad]
    if hasattr(held, "group_matcher"):
        names = [(name, None) for name in (*trained, _AFTER_ALL)]
        numbers: Any = group_with_matcher(names, held.group_matcher(coarse=False), reverse=True)  # type: ignore[operator, arg-type]
    else:
        numbers = _by_blocks(held, trained)
    return {f"{before}{name}": number for name, number in numbers.items()}


def _by_blocks(net: nn.Module, trained: Sequence[str]) -> dict[str, int]:
    blocks = [block for name in repeated_blocks(net) if any(one.startswith(block := f"{name}.") for one in trained)]
    numbers, begun, last = {_AFTER_ALL: len(blocks) + 1}, 0, len(blocks) + 1
    for name in trained:
        within = next((number for number, block in enumerate(blocks, start=1) if name.startswith(block)), None)
        begun = within or begun
        # open_clip's projection is a parameter of the tower, so listed first
        after = begun == len(blocks) or name.rpartition(".")[2] == "proj"
        numbers[name] = within or (last if after else begun)
    return numbers


def set_drop_path(trunk: nn.Module, rate: float) -> float:
    """Drop residual branches while training: never in the first block, `rate` in the last, linearly between, as timm's
    `drop_path_rate`.

    Args:
        trunk: unfrozen; blocks without a trained parameter do not count.

    Returns:
        `rate`, or 0.0 where the architecture has no place for it.
    """
    read = [module for module in trunk.modules() if any(parameter.requires_grad for parameter in module.parameters())]
    blocks = [(module, names) for module in read if (names := _drop_paths(module))]
    for number, (block, names) in enumerate(blocks):
        share = rate * number / max(len(blocks) - 1, 1)
        for name in names:
            setattr(block, name, DropPath(share) if share else nn.Identity())
    return rate if blocks else 0.0


def _drop_paths(module: nn.Module) -> list[str]:
    return [
        name for name in _DROP_PATHS if hasattr(module, name) and isinstance(getattr(module, name), nn.Module | None)
    ]


def train_what_is_read(model: FineTuned, side: int) -> None:
    """Unfreeze all parameters that the loss depends on: not a pooler, nor blocks beyond `--layer`, that nothing reads.

    Args:
        model: frozen or not, on the CPU or the device. side: S.
    """
    model.requires_grad_(True).eval()
    device = model.head.weight.device
    images = torch.zeros(2, 3, side, side, device=device)
    model(images, torch.full((2, model.head.out_features), 1 / model.head.out_features, device=device)).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def make_layer_decayed(layer_decay: float) -> MakeOptimizer:
    """A maker of AdamW whose rate falls by the factor `layer_decay` with every layer below the head."""

    def make(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
        groups = param_groups_layer_decay(
            model, settings.weight_decay, no_weight_decay_list=_NOT_DECAYED, layer_decay=layer_decay
        )
        return adamw(groups, settings)

    return make


_SAVE_EVERY_MINUTES = 10.0


class FineTune(Evaluation):
    name, takes, section = "finetune", "classes", Finetune

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
        return (
            None
            if any(True for _ in encoder.net.parameters())
            else "it has no weights to train; give run:, timm:, open_clip: or hf:"
        )

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        with work_folder(extract, self.name) as folder:
            return [self._score(encoder, data, settings, extract, seed, folder) for seed in seeds]

    def _score(
        self, frozen: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seed: int, folder: Path
    ) -> Score:
        encoder = load_encoder(frozen.requested, seed=seed)  # its own weights, which training changes
        where: Any = {"device": extract.device.type, "precision": extract.precision}
        runtime = Runtime(**where, accumulation=settings.accumulation, seed=seed)
        with distributed_world(runtime) as world, stop_signals() as stopping:
            train = train_settings(settings, runtime, len(data.train), world)
            model, drop_path = make_model(encoder, len(data.classes), settings.drop_path, seed, world)
            images = [data.train.fingerprint, data.train.modified_ns]
            identity = fingerprint(
                [
                    encoder.describe(),
                    images,
                    settings.model_dump(exclude={"seeds"}),
                    seed,
                    world.size,
                    TRANSFORM,
                    extract.precision,
                ]
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
        about = {
            "batch_size": train.batch_size,
            "steps": steps,
            "learning_rate": train.optimizer.lr,
            "drop_path": drop_path,
        }
        return Score("fine-tuned", seed, metrics, about)


EVALUATION = FineTune()


def batch_size(samples: int, settings: Finetune, ranks: int) -> int:
    """The batch that is asked for, or as much of it as the training part has; it can be shared out and, where it is
    mixed, paired.

    Raises:
        UserError: no such batch is left.
    """
    unit = settings.accumulation * ranks * (2 if mixes(settings) else 1)
    size = min(settings.batch_size, samples) // unit * unit
    if not size:
        raise UserError(
            f"finetune.batch_size is {settings.batch_size}, the training part has {samples} images, and a batch is shared out in {unit}",
            allowed=f"a batch and a training part of {unit} images or more",
            fix="--set finetune.accumulation=1, or a larger finetune.batch_size",
        )
    return size


def train_settings(settings: Finetune, runtime: Runtime, samples: int, world: World) -> Train:
    """The trainer's section for `epochs` over a training part of `samples`: the whole budget in whole batches."""
    size = batch_size(samples, settings, world.size)
    lr = settings.base_lr * size / 256
    total = max(settings.epochs * samples // size, 1) * size
    warmup = min(settings.warmup_epochs * samples, total - 1)
    return Train(
        samples=total,
        batch_size=size,
        runtime=runtime,
        log=Log(tensorboard=False),
        optimizer=Optimizer(
            lr=lr,
            betas=[0.9, 0.999],
            eps=1e-8,
            weight_decay=settings.weight_decay,
            warmup_samples=warmup,
            clip_norm=settings.clip_norm,
        ),
        checkpoint=Checkpoint(every_samples=total, every_minutes=_SAVE_EVERY_MINUTES, keep=1),
    )


def make_model(encoder: Encoder, classes: int, drop_path: float, seed: int, world: World) -> tuple[FineTuned, float]:
    """The encoder's net with a new head drawn from `seed`, on the device, all that is read to be trained; and the drop
    path it took.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FineTuned(encoder.net, encoder.width, classes)
    train_what_is_read(model, encoder.images.side)
    return model.to(world.device), set_drop_path(model.trunk, drop_path)


def logits(model: FineTuned, encoder: Encoder, data: DataSet, extract: Extractor) -> Tensor:
    """Logits [N, C] of the test part's central crops, float32 on the CPU."""
    net = nn.Sequential(model.trunk, model.head).eval()
    whole = Encoder(encoder.requested, net, encoder.images, len(data.classes), encoder.seeded, {})
    found = extract.stream(
        whole, data.test, np.arange(len(data.test)), lambda encoded, side, row: decode(encoded, side)
    )
    return torch.cat([part.cpu() for part in found])
