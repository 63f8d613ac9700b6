"""Every key of pipeline.yaml: its type, its default, and the contradictions that are refused.

The comments beside the keys stand in pipeline.yaml; a test holds its values equal to the defaults here.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from labels.choices import Formula

_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}


def parse_count(value: Any) -> Any:
    """`512M` -> 512000000; numbers pass through, anything else is left for pydantic to refuse.

    Units: k or K (thousand), M (million), B (billion); decimal fractions such as `1.28B` must give whole numbers.
    """
    if isinstance(value, str) and value[-1:] in _UNITS:
        try:
            count = float(value[:-1]) * _UNITS[value[-1]]
        except ValueError:
            return value
        return round(count) if math.isfinite(count) and abs(count - round(count)) < 1e-3 else value
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class Section(BaseModel):
    """Unknown keys, values of another type, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Paths(Section):
    out: str = "out"
    run: str = "run"


class Labels(Section):
    tokenizer: Annotated[str, Field(min_length=1)] = "clip"
    context: Positive = 75
    idf: Formula = "smooth"
    stop_words: Literal["keep", "remove"] = "keep"
    wordnet: Annotated[str, Field(min_length=1)] = "auto"
    ngrams: Literal[1, 2] = 1
    ngram_classes: Annotated[int, BeforeValidator(parse_count), Field(gt=0)] = 16_384
    ngram_min_count: Annotated[int, BeforeValidator(parse_count), Field(gt=0)] = 100


class Build(Section):
    caption_key: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["auto"]
    subset: str | None = None
    metadata: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    engine: Literal["local", "ray"] = "local"
    max_bad_fraction: Fraction = 0.1
    duckdb_memory: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGT]i?B$")] = "1GiB"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    max_pixels: Count = 100_000_000


class Model(Section):
    trunk: str = "vit_base_patch16_clip_224"
    trunk_args: dict[str, Any] = {}
    image_size: Positive = 224


class Data(Section):
    threads: Annotated[int, Field(ge=0)] = 0
    prefetch_batches: Positive = 4
    crop_scale: Range = [0.9, 1.0]
    crop_ratio: Range = [0.75, 1.3333333333]
    flip: bool = False
    mean: Channels = [0.48145466, 0.4578275, 0.40821073]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] = [0.26862954, 0.26130258, 0.27577711]

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; allowed: 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; allowed: 0 < low <= high")
        return self


class Loss(Section):
    name: Literal["softmax"] = "softmax"
    idf: bool = True


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.98]
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    warmup_samples: Count = 512_000


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


class Checkpoint(Section):
    every_samples: Count = 1_000_000
    keep: Positive = 2


class Log(Section):
    every_seconds: Annotated[float, Field(gt=0)] = 10.0
    tensorboard: bool = True


class Train(Section):
    samples: Count = 12_800_000
    batch_size: Positive = 1024
    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    runtime: Runtime = Runtime()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.samples < self.batch_size:
            raise ValueError(f"samples is {self.samples}, less than one batch of batch_size {self.batch_size}")
        if self.optimizer.warmup_samples >= self.samples:
            raise ValueError(
                f"optimizer.warmup_samples is {self.optimizer.warmup_samples}, the whole run only {self.samples} samples; "
                "allowed: less than train.samples"
            )
        return self


class Probe(Section):
    weight_decay: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1, 2]
    max_iterations: Positive = 200
    batch_size: Positive = 256


class Pipeline(Section):
    """The whole file."""

    paths: Paths = Paths()
    labels: Labels = Labels()
    build: Build = Build()
    train: Train = Train()
    probe: Probe = Probe()
