"""`train caption`: ClipCap (arXiv 2111.09734) on the features of frozen encoders; CIDEr-D of the test part, times 100 as papers tell it."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from labels.config import own_section
from labels.settings import Pipeline, Runtime
from labels.storage import fingerprint, write_json
from train.caption.batches import tokenized
from train.caption.decoder import BUILT_IN, make_decoder
from train.caption.ptb import ptb_tokens
from train.caption.training import Caption, Work, captions_of, make_captioner, train_captioner, trainer_settings
from train.distributed import World, distributed_world
from train.encoders.encoder import Encoder
from train.evals.cider import cider_d
from train.evals.data.captions import CaptionSet
from train.evals.features import Extractor
from train.evals.pixels import TRANSFORM
from train.evals.protocol import Score, work_folder
from train.language_model import LanguageModel, check_folder
from train.loop import Stopped, stop_signals
from train.weights import weights_fingerprint

_PERCENT = 100


class Captioning:
    """See `Evaluation`. Metrics, checkpoints and all captions lie in the cache's folder `caption`; the same command goes on there."""

    name, takes = "caption", "captions"

    def settings(self, pipeline: Pipeline) -> Caption:
        return own_section(pipeline, self.name, Caption)

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

    def unfit(self, encoder: Encoder) -> str | None:
        return None

    def scores(self, encoder: Encoder, data: CaptionSet, settings: Caption, extract: Extractor, seeds: Sequence[int]) -> list[Score]:
        features, found = [extract(encoder, part) for part in (data.trained, data.test)], []
        runtime = Runtime(device=extract.device.type, precision=extract.precision)  # type: ignore[arg-type]
        with work_folder(extract, self.name) as folder, distributed_world(runtime) as world, stop_signals() as stopping:
            for seed in seeds:
                seeded = runtime.model_copy(update={"seed": seed})
                found.append(_score(encoder, features, data, settings, extract, seeded, folder, world, stopping))
        return found


EVALUATION = Captioning()


def _score(
    encoder: Encoder, features: list[np.ndarray], data: CaptionSet, settings: Caption, extract: Extractor, runtime: Runtime, folder: Path,
    world: World, stopping: Callable[[], bool],
) -> Score:  # fmt: skip
    """Train the mapper of one seed, caption the test part, compare."""
    language = _language(settings, [caption for one in data.trained.captions for caption in one], runtime.seed)
    captioner = make_captioner(encoder.width, language, settings, runtime.seed)
    decoder = weights_fingerprint(language.model)
    chosen, images = settings.model_dump(exclude={"seeds", "beams"}), [data.trained.fingerprint, data.trained.modified_ns]
    work = Work.of(folder, [encoder.describe(), images, chosen, runtime.seed, decoder, TRANSFORM, extract.precision])
    pairs = tokenized(data.trained.captions, language.tokenizer, settings.max_tokens)
    if not train_captioner(captioner, features[0], pairs, trainer_settings(settings, runtime), work, world, stopping):
        raise Stopped(f"captioning by {encoder.name}")
    captions = captions_of(captioner, language, features[1], settings, runtime.precision, world.device)
    references = [[ptb_tokens(text) for text in one] for one in data.test.captions]
    values = [_PERCENT * one for one in cider_d([ptb_tokens(caption) for caption in captions], references)]
    file = work.folder / f"{data.part}-{fingerprint([data.test.fingerprint, settings.beams])}.json"
    if world.is_first:
        write_json(file, [{"image_id": key, "caption": caption} for key, caption in zip(data.test.keys, captions, strict=True)])
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
    """A folder with the fingerprint of its files' names, sizes and times: they decide the result, and reading them all takes long."""
    if decoder == BUILT_IN:
        return decoder
    about = [(file.name, (facts := file.stat()).st_size, facts.st_mtime_ns) for file in sorted(Path(decoder).iterdir())]
    return f"{decoder} ({fingerprint(about)})"
