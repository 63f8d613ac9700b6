"""`train caption`: ClipCap (arXiv 2111.09734) on the features of frozen encoders; CIDEr-D of the test part, times 100
as papers tell it.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from labels.manifest import PAD_ID
from labels.settings import (
    AdapterOptimizer,
    Checkpoint,
    Count,
    Log,
    Optimizer,
    Positive,
    Runtime,
    Section,
    Seeds,
    Train,
    within_budget,
)
from labels.storage import fingerprint, write_json
from train.checkpoint import weights_fingerprint
from train.data.inputs import feed_batches, pinned, rows_of_steps
from train.distributed import World, distributed_world
from train.encoders.encoder import Encoder
from train.evals.captioner import (
    BUILT_IN,
    Captioner,
    LanguageModel,
    MlpMapper,
    SmallDecoder,
    TransformerMapper,
    check_folder,
    make_decoder,
)
from train.evals.cider import cider_d, ptb_tokens
from train.evals.data.captions import CaptionSet
from train.evals.features import TRANSFORM, Extractor
from train.evals.protocol import Evaluation, Score, work_folder
from train.loop import Stopped, stop_signals
from train.optim import autocast_dtype
from train.trainer import train_model

# ---- batches: What the loop is fed: pairs of an image's features and one of its captions, every pair once an epoch.
#
# N images, M pairs, B batch, W feature width, T tokens of the longest caption in a batch.


class Pairs(NamedTuple):
    """`image` int64 [M]: which image; `ids`: the tokens of its caption, the end token last."""

    image: np.ndarray
    ids: list[list[int]]


@dataclass(frozen=True)
class PairBatch:
    """features: float32 [B, W]. ids: int64 [B, T], padded with PAD_ID. bad: none ever."""

    features: Tensor
    ids: Tensor
    bad: int = 0


def tokenized(captions: Sequence[Sequence[str]], tokenizer: Any, max_tokens: int) -> Pairs:
    """All pairs of images and captions; a caption is cut so that it has `max_tokens` with its end token."""
    flat = [caption for one in captions for caption in one]
    ids = tokenizer(flat, add_special_tokens=False)["input_ids"]
    image = np.repeat(np.arange(len(captions)), [len(one) for one in captions])
    return Pairs(image, [[*one[: max_tokens - 1], tokenizer.eos_token_id] for one in ids])


def pair_batches(
    features: np.ndarray, pairs: Pairs, size: int, seed: int, world: World, first_step: int, steps: int
) -> Iterator[PairBatch]:
    """This rank's share of every batch from `first_step` on; the order is a function of (seed, epoch)."""
    share = world.share(size)

    def collate(rows: np.ndarray, ids: list[Tensor]) -> PairBatch:
        padded = pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
        return PairBatch(
            pinned(torch.from_numpy(features[pairs.image[rows]]), world.device), pinned(padded, world.device)
        )

    batches = (rows[share] for rows in rows_of_steps(len(pairs.ids), size, seed, first_step, steps))
    return feed_batches(batches, lambda row: torch.tensor(pairs.ids[row]), collate, threads=1)


# ---- training: One mapper on one encoder's features, trained over the one loop, and the captions it gives.
#
# features [N, W], captions -> Pairs -> loop (Captioner, AdamW) -> WORK (metrics, checkpoints) -> beam search over the test part


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
        samples=caption.samples,
        batch_size=caption.batch_size,
        runtime=runtime,
        optimizer=Optimizer(**caption.optimizer.model_dump()),
        log=Log(tensorboard=False),
        checkpoint=Checkpoint(every_samples=caption.samples, every_minutes=_SAVE_EVERY_MINUTES, keep=1),
    )


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
    captioner: Captioner,
    features: np.ndarray,
    pairs: Pairs,
    settings: Train,
    work: Work,
    world: World,
    stopping: Callable[[], bool],
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
    captioner: Captioner,
    language: LanguageModel,
    features: np.ndarray,
    settings: Caption,
    precision: str,
    device: torch.device,
) -> list[str]:
    """A caption for every row of features [N, W]."""
    captioner.eval()
    found: list[str] = []
    dtype = autocast_dtype(precision, device)
    for part in torch.from_numpy(features).split(_GENERATED_AT_ONCE):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found += captioner.generate(part.to(device), language, beams=settings.beams, max_tokens=settings.max_tokens)
    return found


_PERCENT = 100


class Captioning(Evaluation):
    """Metrics, checkpoints and all captions lie in the cache's folder `caption`; the same command
    goes on there.
    """

    name, takes, section = "caption", "captions", Caption

    def describe(self, settings: Caption) -> str:
        trained = settings.train_decoder or settings.decoder == BUILT_IN
        return (
            f"ClipCap: {settings.mapper} mapper, prefix {settings.prefix}, {'trained' if trained else 'frozen'} decoder "
            f"{_decoder_told(settings.decoder)}, {settings.samples:,} pairs, beam search of {settings.beams}; CIDEr-D x 100"
        )

    def check(self, data: CaptionSet, settings: Caption) -> None:
        if settings.decoder != BUILT_IN:
            check_folder(Path(settings.decoder))
        _ = data.overlap  # refuses

    def scores(
        self, encoder: Encoder, data: CaptionSet, settings: Caption, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        features, found = [extract(encoder, part) for part in (data.trained, data.test)], []
        runtime = Runtime(device=extract.device.type, precision=extract.precision)  # type: ignore[arg-type]
        with work_folder(extract, self.name) as folder, distributed_world(runtime) as world, stop_signals() as stopping:
            for seed in seeds:
                seeded = runtime.model_copy(update={"seed": seed})
                found.append(_score(encoder, features, data, settings, extract, seeded, folder, world, stopping))
        return found


EVALUATION = Captioning()


def _score(
    encoder: Encoder,
    features: list[np.ndarray],
    data: CaptionSet,
    settings: Caption,
    extract: Extractor,
    runtime: Runtime,
    folder: Path,
    world: World,
    stopping: Callable[[], bool],
) -> Score:
    """Train the mapper of one seed, caption the test part, compare."""
    language = _language(settings, [caption for one in data.trained.captions for caption in one], runtime.seed)
    captioner = make_captioner(encoder.width, language, settings, runtime.seed)
    decoder = weights_fingerprint(language.model)
    chosen, images = (
        settings.model_dump(exclude={"seeds", "beams"}),
        [data.trained.fingerprint, data.trained.modified_ns],
    )
    work = Work.of(folder, [encoder.describe(), images, chosen, runtime.seed, decoder, TRANSFORM, extract.precision])
    pairs = tokenized(data.trained.captions, language.tokenizer, settings.max_tokens)
    if not train_captioner(captioner, features[0], pairs, trainer_settings(settings, runtime), work, world, stopping):
        raise Stopped(f"captioning by {encoder.name}")
    captions = captions_of(captioner, language, features[1], settings, runtime.precision, world.device)
    references = [[ptb_tokens(text) for text in one] for one in data.test.captions]
    values = [_PERCENT * one for one in cider_d([ptb_tokens(caption) for caption in captions], references)]
    file = work.folder / f"{data.part}-{fingerprint([data.test.fingerprint, settings.beams])}.json"
    if world.is_first:
        write_json(
            file, [{"image_id": key, "caption": caption} for key, caption in zip(data.test.keys, captions, strict=True)]
        )
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    about = {"decoder_weights": decoder, "captions": str(file), "test_images_in_train": data.overlap}
    variant = f"caption, {'built-in decoder' if settings.decoder == BUILT_IN else Path(settings.decoder).name}"
    return Score(variant, runtime.seed, {"cider": statistics.fmean(values)}, about, standard_error=error)


def _language(settings: Caption, captions: Sequence[str], seed: int) -> LanguageModel:
    positions = settings.prefix + settings.max_tokens
    language = make_decoder(settings.decoder, captions, settings.built_in, positions, seed)
    language.check_room(positions, "caption.prefix and caption.max_tokens")
    return language


def _decoder_told(decoder: str) -> str:
    """A folder with the fingerprint of its files' names, sizes and times: they decide the result, and reading them all
    takes long.
    """
    if decoder == BUILT_IN:
        return decoder
    about = [(file.name, (facts := file.stat()).st_size, facts.st_mtime_ns) for file in sorted(Path(decoder).iterdir())]
    return f"{decoder} ({fingerprint(about)})"
