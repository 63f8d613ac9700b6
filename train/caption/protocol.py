"""`train caption`: ClipCap on the features of frozen encoders; CIDEr-D of the test part as a table and a result JSON."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from labels.errors import UserError
from labels.files import own_partials, write_json
from labels.settings import Caption, Pipeline
from train.caption.batches import tokenized
from train.caption.cider import cider_d
from train.caption.decoder import BUILT_IN, make_decoder
from train.caption.ptb import ptb_tokens
from train.caption.training import Work, captions_of, make_captioner, train_captioner, trainer_settings
from train.distributed import World, world
from train.evals.data.captions import load_captions, published_name
from train.evals.data.images import CaptionedImages
from train.evals.data.overlap import find_overlap
from train.evals.encoders.encoder import Encoder, EncoderSpec
from train.evals.encoders.load import load_encoder
from train.evals.features import Extractor
from train.evals.pixels import TRANSFORM
from train.language_model import LanguageModel, check_folder
from train.signals import stop_signals
from train.weights import weights_fingerprint

_PUBLISHED = ("coco", "karpathy", "flickr30k")
_VERSIONS = ("torch", "timm", "transformers", "numpy", "pillow")
_PERCENT = 100  # papers tell CIDEr times 100


@dataclass(frozen=True)
class CaptionData:
    """Both parts; `test_part` is the name of the one that is tested, `overlap` how many of its images the training part holds too."""

    name: str
    train: CaptionedImages
    test: CaptionedImages
    test_part: str
    overlap: int


def run_captioning(encoders: Sequence[EncoderSpec], data: str, part: str | None, pipeline: Pipeline, extract: Extractor, out: Path) -> bool:
    """Train a mapper for every encoder and seed, caption the test part, print a row for each encoder, write the result.

    Args:
        data: KIND:DIR, see train/evals/data/captions.py. part: which part is tested; None: `test` where there is one, else `val`.
        extract: with a cache.
        out: the result JSON. Beside it lies <name>.work/ with metrics, checkpoints and all captions; the same command goes on there.

    Returns:
        False when a signal stopped it; what was trained so far is saved.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    settings = pipeline.caption
    if out.is_dir():
        raise UserError(f"--out {out} is a directory", allowed="the path of a file", mend=f"--out {out / 'caption.json'}")
    loaded = [load_encoder(asked) for asked in encoders]  # all of them: a mistake in the last one must not cost the others' time
    if settings.decoder != BUILT_IN:
        check_folder(Path(settings.decoder))
    parts = load_caption_data(data, part, extract.cache)
    with world(pipeline.train.runtime) as here, stop_signals() as stopping, nullcontext() if here.is_first else own_partials():
        rows = []
        for encoder in loaded:
            if here.is_first:
                print(f"caption: {encoder.name}: {len(parts.train)} + {len(parts.test)} images, width {encoder.width}", flush=True)
            row = _measure(encoder, parts, pipeline, extract, out.with_suffix(".work"), here, stopping)
            if row is None:
                return False
            rows.append(row)
        if here.is_first:
            write_json(out, _result(parts, pipeline, extract, rows))
            _print(parts, rows)
    return True


def load_caption_data(spec: str, part: str | None, cache: Path | None) -> CaptionData:
    """The training part and the one to test.

    Raises:
        UserError: a part is missing, or, in data that are not published ones, both hold the same image.
    """
    found = load_captions(spec)
    tested = part or ("test" if "test" in found else "val")
    for name in ("train", tested):
        if name not in found:
            raise UserError(f"--data {spec} has no part {name!r}", allowed=f"its parts: {', '.join(found)}", mend="mend --part or the data")
    train, test = found["train"], found[tested]
    overlap = find_overlap(train, test, cache)
    if overlap.images and spec.partition(":")[0] in _PUBLISHED:
        print(f"{spec}: {overlap.images} test images are training images too, as published; the result says so", flush=True)
    elif overlap.images:
        raise UserError(
            f"{overlap.images} of {len(test)} test images are training images too, "
            f"the first: {overlap.test_key} of {test.directory} is {overlap.train_key} of {train.directory}, byte by byte",
            allowed="a test part that the training part has nothing of",
            mend="remove them from one of the two parts",
        )
    return CaptionData(published_name(spec), train, test, tested, overlap.images)


def _measure(
    encoder: Encoder, data: CaptionData, pipeline: Pipeline, extract: Extractor, folder: Path, here: World, stopping: Callable[[], bool]
) -> dict[str, Any] | None:
    """All seeds of one encoder as a row; None when it was stopped."""
    settings, began, seeds, scores = pipeline.caption, time.monotonic(), [], []
    for seed in settings.seeds:
        drawn = load_encoder(encoder.asked, seed=seed) if encoder.seeded else encoder
        found = _captioned(drawn, data, pipeline, extract, folder, seed, here, stopping)
        if found is None:
            return None
        captions, facts = found
        candidates = [ptb_tokens(caption) for caption in captions]
        scores = [_PERCENT * one for one in cider_d(candidates, [[ptb_tokens(text) for text in one] for one in data.test.captions])]
        told = [{"image_id": key, "caption": caption} for key, caption in zip(data.test.keys, captions, strict=True)]
        if here.is_first:
            write_json(facts["captions"], told)
        seeds.append({"seed": seed, "cider": statistics.fmean(scores), **facts, "captions": str(facts["captions"])})
    values = [one["cider"] for one in seeds]
    return {
        "encoder": encoder.name,
        "variant": f"caption, {'built-in decoder' if settings.decoder == BUILT_IN else Path(settings.decoder).name}",
        "description": encoder.describe(),
        "seed_varies": f"the mapper and the order{' and the encoder' if encoder.seeded else ''}",
        "metrics": ["cider"],
        "cider": statistics.fmean(values),
        "cider_std": statistics.stdev(values) if len(values) > 1 else None,
        "cider_standard_error": statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "seeds": seeds,
        "seconds": round(time.monotonic() - began, 2),
    }


def _captioned(
    encoder: Encoder, data: CaptionData, pipeline: Pipeline, extract: Extractor, folder: Path, seed: int, here: World,
    stopping: Callable[[], bool],
) -> tuple[list[str], dict[str, Any]] | None:  # fmt: skip
    """The test part's captions and facts for the result; None when it was stopped."""
    settings, train = pipeline.caption, trainer_settings(pipeline.train, pipeline.caption, seed)
    language = _language(settings, [caption for one in data.train.captions for caption in one], seed)
    features = [extract(encoder, part) for part in (data.train, data.test)]
    captioner = make_captioner(encoder.width, language, settings, seed)
    weights = {"encoder_weights": encoder.describe()["weights"], "decoder_weights": weights_fingerprint(language.model)}
    identity = [encoder.describe(), data.train.fingerprint, settings.model_dump(exclude={"seeds", "beams"}), seed, weights]
    work = Work.of(folder, [*identity, TRANSFORM, extract.precision])
    pairs = tokenized(data.train.captions, language.tokenizer, settings.max_tokens)
    if not train_captioner(captioner, features[0], pairs, train, work, here, stopping):
        return None
    captions = captions_of(captioner, language, features[1], settings, train.runtime.precision, here.device)
    return captions, {**weights, "captions": work.folder / f"{data.test_part}.json"}


def _language(settings: Caption, captions: Sequence[str], seed: int) -> LanguageModel:
    positions = settings.prefix + settings.max_tokens
    language = make_decoder(settings.decoder, captions, settings.built_in, positions, seed)
    language.check_room(positions, "caption.prefix and caption.max_tokens")
    return language


def _result(data: CaptionData, pipeline: Pipeline, extract: Extractor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = pipeline.caption
    trained = settings.train_decoder or settings.decoder == BUILT_IN
    return {
        "protocol": f"ClipCap: {settings.mapper} mapper, prefix {settings.prefix}, {'trained' if trained else 'frozen'} decoder "
        f"{settings.decoder}, {settings.samples:,} pairs, beam search of {settings.beams}; CIDEr-D x 100 on the part {data.test_part}",
        "transform": TRANSFORM,
        "settings": settings.model_dump(),
        "precision": extract.precision,
        "data": data.name,
        "train": data.train.describe(),
        "test": data.test.describe(),
        "test_images_in_train": data.overlap,
        "device": str(extract.device),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _VERSIONS}},
        "results": rows,
    }


def _print(data: CaptionData, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{data.name}: CIDEr-D x 100 of {len(data.test)} images")
    for column in ("encoder", "variant", "CIDEr", "± seeds", "± test size", "seconds"):
        table.add_column(column, justify="left" if column in ("encoder", "variant") else "right", overflow="fold")
    for row in rows:
        numbers = [row["cider"], row["cider_std"], row["cider_standard_error"]]
        table.add_row(row["encoder"], row["variant"], *("-" if one is None else f"{one:.1f}" for one in numbers), f"{row['seconds']:.0f}")
    Console().print(table)
