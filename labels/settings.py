"""Every key of pipeline.yaml: its type, its default, and the contradictions that are rejected.

pipeline.yaml has the comments of the keys; a test keeps its values equal to these defaults. A loss, tokenizer family or
evaluator is one file in a folder `kinds/`: no list names it, `names_in` lists the folder without an import, since
`labels` is below these packages and `--help` must not wait for torch.
"""

import ast
import math
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from labels import Combination, Formula

LOSSES = "train.losses.kinds"
EVALUATORS = "train.evals.kinds"
TOKENIZERS = "labels.tokenizers.kinds"
_ROOT = Path(__file__).parent.parent


def names_in(package: str) -> list[str]:
    """The kinds of a package in alphabetical order: its modules, without those that begin with `_`."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(_folders(package)) if not name.startswith("_"))


def summary(package: str, name: str) -> str:
    """The first paragraph of a kind's docstring, without importing it."""
    finder = next(finder for finder, found, _ in pkgutil.iter_modules(_folders(package)) if found == name)
    source = finder.find_spec(name, None).loader.get_source(name)  # type: ignore
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]


def _folders(package: str) -> list[str]:
    imported = sys.modules.get(package)
    return list(imported.__path__) if imported else [str(_ROOT / package.replace(".", "/"))]


# The built-in `recipes`: differences from the section `train`. pipeline.yaml has their commands and published results.
_SHORT: dict[str, Any] = {  # of both schedules with a global batch of 16,384
    "batch_size": 16_384,
    "model": {"trunk": "vit_b16"},
    "data": {"crop_scale": [0.9, 1.0]},
    "optimizer": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2, "warmup_samples": "8.192M"},
    "checkpoint": {"every_samples": "50M"},
}

RECIPES: dict[str, dict[str, Any]] = {
    "superclass-512m": {"samples": "512M"} | _SHORT,
    "superclass-1.28b": {"samples": "1.28B"} | _SHORT,
    "superclass-12.8b": {
        "samples": "12.8B",
        "batch_size": 90_112,
        "model": {"trunk": "vit_l16", "grad_checkpointing": True},
        "data": {"crop_scale": [0.4, 1.0], "color_jitter_probability": 0.8, "grey_probability": 0.2},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.2, "warmup_samples": "901.12M"},
        "checkpoint": {"every_samples": "275M"},
    },
}


_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_count(value: Any) -> Any:
    """`512M` -> 512000000, `1.28B` -> 1280000000; pydantic rejects what is no whole number."""
    count = _with_unit(value, _UNITS, 1)
    return value if count is None or abs(count - round(count)) >= 1e-3 else round(count)


def parse_size(value: Any) -> Any:
    """`1.5GiB` -> bytes; other values are returned for pydantic to check."""
    size = _with_unit(value, _SIZES, 3)
    return value if size is None else round(size)


def _with_unit(value: Any, units: Mapping[str, float], length: int) -> float | None:
    """A string with a unit of `length` characters as a number; None for any other value."""
    if not isinstance(value, str) or value[-length:] not in units:
        return None
    try:
        number = float(value[:-length]) * units[value[-length:]]
    except ValueError:
        return None
    return number if math.isfinite(number) else None


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
PositiveChannels = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
Jitter = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=4, max_length=4)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what NumPy, torch and compiled code all take


class Section(BaseModel):
    """Unknown keys, values of another type, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# Marks of keys of `train`. A resumed run may have another value: what is computed stays the same, but for rounding.
MAY_CHANGE = "may change when a run resumes"
# As MAY_CHANGE; and a key of the machine or of files, which `train report` does not count as part of the recipe.
MACHINE = "machine"


def marked_keys(section: type[Section], *marks: str) -> dict[str, Any]:
    """The keys with one of the marks, as `include` and `exclude` of pydantic's `model_dump` take them."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if set(marks) & {mark for mark in field.metadata if isinstance(mark, str)}:
            keys[name] = True
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= {name: inner} if (inner := marked_keys(field.annotation, *marks)) else {}
    return keys


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
    ngram_classes: PositiveCount = 16_384
    ngram_min_count: PositiveCount = 100


class ShorterSide(Section):
    shorter_side: Annotated[int, Field(ge=16)]


class Build(Section):
    caption_key: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["auto"]
    subset: str | None = None
    metadata: str | None = None
    workers: NotNegative = 0
    engine: Literal["local", "ray"] = "local"
    max_bad_fraction: Fraction = 0.1
    duckdb_memory: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGT]i?B$")] = "1GiB"
    images: Literal["original"] | ShorterSide = "original"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    jpeg_subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"
    max_pixels: Count = 100_000_000
    decode_check: Literal["none", "header", "full"] = "header"
    beton_samples: PositiveCount = 10_000
    beton_size: PositiveFloat = 4.0
    shuffle_window: Positive = 1
    shuffle_seed: NotNegative = 0


class Model(Section):
    trunk: str = "vit_b16"
    trunk_args: dict[str, Any] = {}
    image_size: Positive = 224
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = False
    compile: Annotated[bool, MAY_CHANGE] = False


class Validation(Section):
    held_out: Annotated[float, Field(gt=0, le=0.5)] | Annotated[str, Field(min_length=1)] | None = None
    every_samples: Annotated[PositiveCount, MAY_CHANGE] = 1_000_000
    samples: Annotated[PositiveCount, MAY_CHANGE] = 10_000


class Visual(Section):
    combination: Combination = "idf*gain"
    floor: Annotated[float, Field(ge=0)] = 0.01
    at: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.1, 0.3]
    samples: PositiveCount = 50_000


class Data(Section):
    threads: Annotated[NotNegative, MAY_CHANGE] = 0
    prefetch: Annotated[Size, MAY_CHANGE] = 2**30
    shuffle_block: Positive = 64
    shuffle_window: Positive = 1024
    subset: str | None = None
    metadata: str | None = None
    verify: Annotated[bool, MACHINE] = False
    cache: Annotated[str, MACHINE] = "~/.cache/superclass"
    cache_size: Annotated[Size, MACHINE] = 100 * 2**30
    crop_scale: Range = [0.9, 1.0]
    crop_ratio: Range = [0.75, 1.3333333333]
    flip: bool = False
    resample: Literal["auto", "device", "host"] = "auto"
    color_jitter: Jitter = [0.32, 0.32, 0.32, 0.08]
    color_jitter_probability: Fraction = 0.0
    grey_probability: Fraction = 0.0
    mean: Channels = [0.48145466, 0.4578275, 0.40821073]
    std: PositiveChannels = [0.26862954, 0.26130258, 0.27577711]

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; allowed: 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; allowed: 0 < low <= high")
        if self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter is {self.color_jitter}; allowed for the last, the hue: 0 to 0.5")
        return self


def _known_loss(name: str) -> str:
    if name not in (names := names_in(LOSSES)):
        allowed = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
        raise PydanticCustomError("loss", "Input should be {names}", {"names": allowed})
    return name


class Loss(Section):
    name: Annotated[str, AfterValidator(_known_loss)] = "softmax"
    idf: bool = True
    memory: Annotated[Size, MAY_CHANGE] = 128 << 20
    split_vocabulary: Annotated[bool | Literal["auto"], MAY_CHANGE] = False
    gamma_negative: Annotated[float, Field(ge=0)] = 4.0
    gamma_positive: Annotated[float, Field(ge=0)] = 1.0
    clip: Annotated[float, Field(ge=0, lt=1)] = 0.05

    @model_validator(mode="after")
    def _powers(self) -> Self:
        if 0 < self.gamma_negative < 1:
            allowed = "0, or 1 and more (below 1 the slope has no bound)"
            raise ValueError(f"gamma_negative is {self.gamma_negative}; allowed: {allowed}")
        return self


class Optimizer(Section):
    name: Literal["adamw", "muon"] = "adamw"
    muon_lr: PositiveFloat | None = None
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown_samples: Count | None = None
    lr: PositiveFloat = 5e-4
    betas: Betas = [0.9, 0.98]
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    warmup_samples: Count = 512_000
    clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class Runtime(Section):
    device: Annotated[Literal["auto", "cpu", "cuda"], MACHINE] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    accumulation: Annotated[Positive, MAY_CHANGE] = 1
    parallel: Annotated[Literal["ddp", "fsdp"], MAY_CHANGE] = "ddp"
    threads: Annotated[NotNegative, MACHINE] = 0
    seed: Seed = 0
    max_skipped_steps: Annotated[Positive, MAY_CHANGE] = 20
    peak_tflops: Annotated[PositiveFloat | None, MACHINE] = None


class Checkpoint(Section):
    every_samples: PositiveCount = 1_000_000
    every_minutes: PositiveFloat | None = None
    keep: Positive = 2
    keep_every: NotNegative = 0


class Log(Section):
    every_seconds: PositiveFloat = 10.0
    tensorboard: bool = True
    wandb: Annotated[str, Field(min_length=1)] | None = None


class Train(Section):
    samples: Count = 12_800_000
    batch_size: Positive = 1024
    model: Model = Model()
    data: Data = Data()
    validation: Validation = Validation()
    weights: Annotated[str, Field(min_length=1)] = "idf"
    visual: Visual = Visual()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    runtime: Runtime = Runtime()
    checkpoint: Annotated[Checkpoint, MACHINE] = Checkpoint()
    log: Annotated[Log, MACHINE] = Log()

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.samples < self.batch_size:
            raise ValueError(f"samples is {self.samples}, less than one batch of batch_size {self.batch_size}")
        if self.optimizer.warmup_samples >= self.samples:
            given = f"optimizer.warmup_samples is {self.optimizer.warmup_samples}"
            raise ValueError(f"{given}, the whole run only {self.samples} samples; allowed: less than train.samples")
        if self.optimizer.name == "adamw" and self.optimizer.muon_lr is not None:
            given = f"optimizer.muon_lr is {self.optimizer.muon_lr}, optimizer.name adamw"
            raise ValueError(f"{given}; allowed: null, or optimizer.name muon")
        if self.optimizer.schedule == "cosine" and self.optimizer.cooldown_samples is not None:
            given = f"optimizer.cooldown_samples is {self.optimizer.cooldown_samples}, optimizer.schedule cosine"
            raise ValueError(f"{given}; allowed: null, or optimizer.schedule wsd")
        if self.cooldown and self.optimizer.warmup_samples > self.cooldown[0]:
            given = f"optimizer.warmup_samples is {self.optimizer.warmup_samples}, the cooldown begins at"
            raise ValueError(f"{given} {self.cooldown[0]}; allowed: a warm-up that ends before")
        if self.batch_size % self.runtime.accumulation:
            given = f"batch_size is {self.batch_size}, runtime.accumulation {self.runtime.accumulation}"
            raise ValueError(f"{given}; allowed: a divisor of batch_size")
        if self.weights == "visual" and self.validation.held_out is None:
            raise ValueError("weights is visual, validation.held_out is null; allowed: held-out samples, e.g. 0.02")
        if self.weights != "idf" and not self.loss.idf:
            raise ValueError(f"weights is {self.weights}, loss.idf is false; allowed: true")
        return self

    @property
    def cooldown(self) -> list[int] | None:
        """The samples seen where the cooldown of schedule wsd begins and ends, in whole batches; None with cosine."""
        if self.optimizer.schedule == "cosine":
            return None
        given, steps = self.optimizer.cooldown_samples, self.samples // self.batch_size
        cooldown = self.samples / 5 if given is None else given
        return [max(steps - round(cooldown / self.batch_size), 0) * self.batch_size, steps * self.batch_size]


class TextTower(Section):
    embed_dim: Positive = 512
    width: Positive = 512
    heads: Positive = 8
    layers: Positive = 12
    context: Annotated[int, Field(ge=3)] = 77

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, heads {self.heads}; allowed: a divisor of width")
        return self


class Features(Section):
    batch_size: Positive = 256
    threads: NotNegative = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def _once(values: list[Any]) -> list[Any]:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{repeated[0]} comes {values.count(repeated[0])} times; allowed: each value once")
    return values


# Each value once: a repeated one would count twice in means and deviations.
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_once)]
PositiveOnce = Annotated[list[Positive], Field(min_length=1), AfterValidator(_once)]


def within_budget(section: Any, samples: int, batch_size: int, optimizer: Any) -> Any:
    if not optimizer.warmup_samples < samples >= batch_size:
        raise ValueError(
            f"samples is {samples}, batch_size {batch_size}, optimizer.warmup_samples {optimizer.warmup_samples}; "
            "allowed: samples of one batch at least, and more than those of the warm-up"
        )
    return section


class AdapterOptimizer(Section):
    lr: PositiveFloat = 2e-5
    betas: Betas = [0.9, 0.999]
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_samples: Count = 200_000
    clip_norm: PositiveFloat | None = None


class LlavaOptimizer(AdapterOptimizer):
    lr: PositiveFloat = 1e-3
    eps: PositiveFloat = 1e-8
    warmup_samples: Count = 16_740


class Llava(Section):
    layer: int = -2
    class_token: bool = False
    max_tokens: Positive = 2048
    samples: Count = 558_000
    batch_size: Positive = 256
    optimizer: LlavaOptimizer = LlavaOptimizer()

    @model_validator(mode="after")
    def _budget(self) -> Self:
        return within_budget(self, self.samples, self.batch_size, self.optimizer)


class Pipeline(Section):
    """The whole file. `evaluators`: the unchecked sections of the evaluators, by name."""

    paths: Paths = Paths()
    labels: Labels = Labels()
    build: Build = Build()
    train: Train = Train()
    text_tower: TextTower = TextTower()
    llava: Llava = Llava()
    features: Features = Features()
    evaluators: dict[str, dict[str, Any]] = {}
    recipes: dict[str, dict[str, Any]] = RECIPES

    @model_validator(mode="before")
    @classmethod
    def _evaluators_sections(cls, values: Any) -> Any:
        """`probe: {...}` becomes `evaluators: {probe: {...}}`, which the evaluator checks (`config.own_section`)."""
        names = names_in(EVALUATORS)
        if not isinstance(values, dict) or not isinstance(values.get("evaluators", {}), dict):
            return values
        sections = dict(values.get("evaluators", {}))
        if unknown := sorted(set(sections) - set(names)):
            raise ValueError(f"evaluators: there is no evaluator {unknown[0]!r}; allowed: {', '.join(names)}")
        for name in set(names) & set(values):
            above = values[name] if values[name] is not None else {}
            sections[name] = sections.get(name, {}) | above if isinstance(above, dict) else above
        return {key: value for key, value in values.items() if key not in names} | {"evaluators": sections}
