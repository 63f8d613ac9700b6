"""`train finetune`: the whole encoder trained on the labels, MAE's end-to-end recipe (arXiv 2111.06377, table 9;
main_finetune.py).

encoded images -> random crops and flips -> mixup or cutmix (`Mixing`, on the device) -> the training loop (`FineTuned`:
the encoder's net and a linear head; AdamW with a rate for each layer) -> test part, once, after the last epoch

The RandAugment of the paper's recipe and the random erasing of its code are missing. Metrics and checkpoints are in a
work folder named by the fingerprint of everything that determines the result: the same command resumes there.

N training images, B batch (of this rank), S image side, W feature width, C classes.
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
from train.evals.protocol import Evaluation, Score, accuracies, hits, work_folder
from train.loop import Stopped, stop_signals
from train.optim import adamw
from train.trainer import MakeOptimizer, train_model


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
        if next(encoder.net.parameters(), None) is None:
            return "it has no weights to train; give run:, timm:, open_clip: or hf:"
        return None

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        with work_folder(extract, self.name) as folder:
            return [self._score(encoder, data, settings, extract, seed, folder) for seed in seeds]

    def _score(
        self, frozen: Encoder, data: DataSet, settings: Finetune, extract: Extractor, seed: int, folder: Path
    ) -> Score:
        encoder = load_encoder(frozen.requested, seed=seed)  # its own weights, which training changes
        device: Any = {"device": extract.device.type, "precision": extract.precision}
        runtime = Runtime(**device, accumulation=settings.accumulation, seed=seed)
        with distributed_world(runtime) as world, stop_signals() as stopping:
            train = train_settings(settings, runtime, len(data.train), world)
            model, drop_path = make_model(encoder, len(data.classes), settings.drop_path, seed, world)
            images, chosen = [data.train.fingerprint, data.train.state], settings.model_dump(exclude={"seeds"})
            facts = [encoder.describe(), images, chosen, seed, world.size, TRANSFORM, extract.precision]
            identity = fingerprint(facts)
            mixing = Mixing(settings, len(data.classes), encoder.images, seed, world.device)

            def batches(first_step: int, steps: int) -> Iterator[LabelledBatch]:
                side, size = encoder.images.side, train.batch_size
                return cropped_batches(data.train, side, size, seed, extract.threads, world, first_step, steps)

            make = make_layer_decayed(settings.layer_decay)
            if not train_model(model, batches, mixing, train, folder / identity, identity, world, stopping, make):
                raise Stopped(f"fine-tuning of {encoder.name}")
            found, y = logits(model, encoder, data, extract), torch.from_numpy(data.test.targets)
        about = {"batch_size": train.batch_size, "steps": train.samples // train.batch_size}
        about |= {"learning_rate": train.optimizer.lr, "drop_path": drop_path}
        return Score("fine-tuned", seed, accuracies(found, y), about, correct=hits(found, y))


EVALUATION = FineTune()


# -- the budget

_SAVE_EVERY_MINUTES = 10.0


def batch_size(samples: int, settings: Finetune, ranks: int) -> int:
    """The requested batch, or as much of it as the training part has: divisible among ranks and accumulation, and even
    where images are mixed.
    """
    unit = settings.accumulation * ranks * (2 if mixes(settings) else 1)
    size = min(settings.batch_size, samples) // unit * unit
    if not size:
        problem = f"finetune.batch_size is {settings.batch_size}, the training part has {samples} images"
        raise UserError(
            f"{problem}, and a batch is divided by {unit}",
            allowed=f"a batch and a training part of {unit} images or more",
            fix="--set finetune.accumulation=1, or a larger finetune.batch_size",
        )
    return size


def train_settings(settings: Finetune, runtime: Runtime, samples: int, world: World) -> Train:
    """The trainer's section for `epochs` over a training part of `samples`: the whole budget in whole batches."""
    size = batch_size(samples, settings, world.size)
    total = max(settings.epochs * samples // size, 1) * size
    optimizer = Optimizer(
        lr=settings.base_lr * size / 256,
        betas=[0.9, 0.999],
        eps=1e-8,
        weight_decay=settings.weight_decay,
        warmup_samples=min(settings.warmup_epochs * samples, total - 1),
        clip_norm=settings.clip_norm,
    )
    checkpoint = Checkpoint(every_samples=total, every_minutes=_SAVE_EVERY_MINUTES, keep=1)
    log = Log(tensorboard=False)
    return Train(samples=total, batch_size=size, runtime=runtime, log=log, optimizer=optimizer, checkpoint=checkpoint)


# -- batches


@dataclass(frozen=True)
class LabelledBatch:
    images: Tensor  # uint8 [B, S, S, 3]
    classes: Tensor  # int64 [B]
    numbers: np.ndarray  # int64 [B], epoch * N + row
    bad: int = 0


def cropped_batches(
    data: LabelledImages, side: int, size: int, seed: int, threads: int, world: World, first_step: int, steps: int
) -> Iterator[LabelledBatch]:
    """This rank's share of every batch from `first_step` on: random resized crops and flips, all a function of (seed,
    epoch, row).

    `size`: of the batch of all ranks, at most N. An image that cannot be decoded is a UserError.
    """
    count, share = len(data), world.share(size)

    def numbers() -> Iterator[np.ndarray]:
        for step, rows in enumerate(rows_of_steps(count, size, seed, first_step, steps), start=first_step):
            epochs = np.arange(step * size, (step + 1) * size) // count
            yield (epochs * count + rows)[share]

    def crop(number: int) -> np.ndarray:
        epoch, row = divmod(number, count)
        return decode_crop(data.encoded[row].read(), side, seed, epoch, row)

    for batch in decoded_batches(numbers(), side, crop, threads, world.device):
        for number, reason in batch.bad:
            raise UserError(
                f"an image of the {data.part} part cannot be decoded: {data.locate(number % count)} ({reason})",
                allowed="whole image files that Pillow reads",
                fix="fix or remove it; `train probe` on the same data names all of them",
            )
        yield LabelledBatch(batch.images, torch.from_numpy(data.targets[batch.numbers % count]), batch.numbers)


class Mixing:
    """Batch -> normalised images float32 [B, 3, S, S] and targets float32 [B, C], mixed, on the device.

    The mixing is a function of (seed, the batch's first number) alone.
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
    """Seed numpy's global generator, which timm's Mixup draws from, inside the block."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(1))
    try:
        yield
    finally:
        np.random.set_state(before)


# -- the model: its layers' rates, drop path, and which parameters are trained

_HEAD_STD = 2e-5  # MAE's main_finetune.py
_POSITIONS_AND_TOKENS = "pos_embed positional_embedding position_embedding cls_token class_embedding reg_token"
_NOT_DECAYED = [f"*{name}*" for name in _POSITIONS_AND_TOKENS.split()]
_DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
_AFTER_ALL = "a name that no matcher knows"


class FineTuned(nn.Module):
    """Normalised images [B, 3, S, S] and targets [B, C] that sum to 1 -> the batch's mean cross entropy.

    `trunk` maps images to features [B, W]. The head's weight is drawn from a truncated normal, its bias is 0.
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


def make_model(encoder: Encoder, classes: int, drop_path: float, seed: int, world: World) -> tuple[FineTuned, float]:
    """The encoder's net with a new head drawn from `seed`, on the device, and the drop path that was set."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FineTuned(encoder.net, encoder.width, classes)
    train_what_is_read(model, encoder.images.side)
    return model.to(world.device), set_drop_path(model.trunk, drop_path)


def make_layer_decayed(layer_decay: float) -> MakeOptimizer:
    """A maker of AdamW whose rate falls by the factor `layer_decay` with every layer below the head."""

    def make(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
        options: dict[str, Any] = {"no_weight_decay_list": _NOT_DECAYED, "layer_decay": layer_decay}
        return adamw(param_groups_layer_decay(model, settings.weight_decay, **options), settings)

    return make


def layers(trunk: nn.Module) -> dict[str, int]:
    """The layer of every trained parameter of a trunk; the highest number is the head's, whether or not the trunk has
    something there.

    timm's nets group themselves. For others, as in BEiT and MAE: what comes before the blocks is layer 0, then block
    after block, then the rest. Blocks that nothing reads (beyond `--layer`) do not count.
    """
    net = getattr(trunk, "net", trunk)  # a readout has the model as `net`
    prefix = "net." if net is not trunk else ""
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    if hasattr(net, "group_matcher"):
        names, matcher = [(name, None) for name in (*trained, _AFTER_ALL)], net.group_matcher(coarse=False)  # type: ignore[operator]
        numbers: Any = group_with_matcher(names, matcher, reverse=True)  # type: ignore[arg-type]
    else:
        numbers = _by_blocks(net, trained)
    return {f"{prefix}{name}": number for name, number in numbers.items()}


def _by_blocks(net: nn.Module, trained: Sequence[str]) -> dict[str, int]:
    prefixes = (f"{name}." for name in repeated_blocks(net))
    blocks = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in trained)]
    last = len(blocks) + 1
    numbers, newest = {_AFTER_ALL: last}, 0
    for name in trained:
        block = next((number for number, prefix in enumerate(blocks, start=1) if name.startswith(prefix)), None)
        newest = block or newest
        # open_clip's projection is a parameter of the tower, so listed first
        after = newest == len(blocks) or name.rpartition(".")[2] == "proj"
        numbers[name] = block or (last if after else newest)
    return numbers


def set_drop_path(trunk: nn.Module, rate: float) -> float:
    """Drop residual branches while training: never in the first trained block, `rate` in the last, linearly between, as
    timm's `drop_path_rate`. Returns `rate`, or 0.0 if the architecture has no drop path.
    """
    trained = [module for module in trunk.modules() if any(weight.requires_grad for weight in module.parameters())]
    blocks = [(module, names) for module in trained if (names := _drop_paths(module))]
    for number, (block, names) in enumerate(blocks):
        share = rate * number / max(len(blocks) - 1, 1)
        for name in names:
            setattr(block, name, DropPath(share) if share else nn.Identity())
    return rate if blocks else 0.0


def _drop_paths(module: nn.Module) -> list[str]:
    return [name for name in _DROP_PATHS if isinstance(getattr(module, name, ""), nn.Module | None)]


def train_what_is_read(model: FineTuned, side: int) -> None:
    """Unfreeze all parameters that the loss depends on: not a pooler, nor blocks beyond `--layer`."""
    model.requires_grad_(True).eval()
    device, classes = model.head.weight.device, model.head.out_features
    images, targets = torch.zeros(2, 3, side, side), torch.full((2, classes), 1 / classes)
    model(images.to(device), targets.to(device)).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


# -- the test part


def logits(model: FineTuned, encoder: Encoder, data: DataSet, extract: Extractor) -> Tensor:
    """Logits [*, C] of the test part's central crops, float32 on the CPU."""
    net = nn.Sequential(model.trunk, model.head).eval()
    classifier = Encoder(encoder.requested, net, encoder.images, len(data.classes), encoder.seeded, {})
    centre = lambda encoded, side, row: decode(encoded, side)  # noqa: E731
    return torch.cat([part.cpu() for part in extract.stream(classifier, data.test, np.arange(len(data.test)), centre)])
