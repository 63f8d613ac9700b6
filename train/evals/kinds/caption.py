"""`train caption`: ClipCap (arXiv 2111.09734) on the features of frozen encoders; CIDEr-D of the test part, times 100
as papers report it.

features [N, W], captions -> `Pairs` -> the training loop (`Captioner`, AdamW) -> beam search over the test part ->
`ptb_tokens` -> `cider_d`. Metrics, checkpoints and captions are in a work folder named by the fingerprint of everything
that determines them: the same command resumes there. CIDEr-D equals pycocoevalcap's to the last digits on the same
tokens; the tokens follow Stanford's tokenizer on captions, not on newswire.

N images, M pairs of an image and a caption, B batch, W feature width, T tokens of the longest caption in a batch.
"""

import math
import re
import statistics
from collections import Counter
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
from labels.storage import UserError, fingerprint, local_path, write_json
from train.checkpoint import weights_fingerprint
from train.data.inputs import feed_batches, pinned, rows_of_steps
from train.distributed import World, distributed_world
from train.encoders.encoder import Encoder
from train.evals.captioner import (
    BUILT_IN,
    Captioner,
    LanguageModel,
    SmallDecoder,
    check_folder,
    make_decoder,
    make_mapper,
)
from train.evals.data.captions import CaptionSet
from train.evals.data.images import file_states
from train.evals.features import TRANSFORM, Extractor
from train.evals.protocol import Evaluation, Score, work_folder
from train.loop import Stopped, stop_signals
from train.optim import autocast_dtype
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


class Captioning(Evaluation):
    name, takes, section = "caption", "captions", Caption

    def describe(self, settings: Caption) -> str:
        trained = settings.train_decoder or settings.decoder == BUILT_IN
        decoder = f"{'trained' if trained else 'frozen'} decoder {_decoder_name(settings.decoder)}"
        return (
            f"ClipCap: {settings.mapper} mapper, prefix {settings.prefix}, {decoder}, {settings.samples:,} pairs, "
            f"beam search of {settings.beams}; CIDEr-D x 100"
        )

    def check(self, data: CaptionSet, settings: Caption) -> None:
        if settings.decoder != BUILT_IN:
            check_folder(local_path(settings.decoder))
        _ = data.overlap  # a UserError if test images are also in the training part
        _check_scorable(data)

    def scores(
        self, encoder: Encoder, data: CaptionSet, settings: Caption, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        train_x, test_x = extract(encoder, data.trained), extract(encoder, data.test)
        runtime = Runtime(device=extract.device.type, precision=extract.precision)  # type: ignore[arg-type]
        images, texts = [data.trained.fingerprint, data.trained.state], data.trained.captions
        chosen = settings.model_dump(exclude={"seeds", "beams"})
        references = [[ptb_tokens(caption) for caption in captions] for captions in data.test.captions]
        about_test = fingerprint([data.test.fingerprint, settings.beams])
        scores = []
        with work_folder(extract, self.name) as folder, distributed_world(runtime) as world, stop_signals() as stopping:
            for seed in seeds:
                language = _language(settings, texts, seed)
                captioner = make_captioner(encoder.width, language, settings, seed)
                weights = weights_fingerprint(language.model)
                facts = [encoder.describe(), images, chosen, seed, weights, TRANSFORM, extract.precision]
                work = folder / fingerprint(facts)
                pairs = tokenized(texts, language.tokenizer, settings.max_tokens)
                train = train_settings(settings, runtime.model_copy(update={"seed": seed}))
                if not train_captioner(captioner, train_x, pairs, train, work, world, stopping):
                    raise Stopped(f"captioning by {encoder.name}")
                captions = generate(captioner, language, test_x, settings, extract.precision, world.device)
                values = [100 * score for score in cider_d(list(map(ptb_tokens, captions)), references)]
                file = work / f"{data.part}-{about_test}.json"
                if world.is_first:
                    rows = zip(data.test.keys, captions, strict=True)
                    write_json(file, [{"image_id": key, "caption": caption} for key, caption in rows])
                error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
                about = {"decoder_weights": weights, "captions": str(file), "test_images_in_train": data.overlap}
                decoder = "built-in decoder" if settings.decoder == BUILT_IN else local_path(settings.decoder).name
                cider: dict[str, float | None] = {"cider": statistics.fmean(values)}
                scores.append(Score(f"caption, {decoder}", seed, cider, about, standard_error=error))
        return scores


EVALUATION = Captioning()


def _check_scorable(data: CaptionSet) -> None:
    """CIDEr-D weighs an n-gram by the images that lack it: captions are not scored where no image lacks any."""
    ngrams = ({n for caption in captions for n in _ngrams(ptb_tokens(caption))} for captions in data.test.captions)
    first = next(ngrams)
    if all(of_image == first for of_image in ngrams):
        images = "one image" if len(data.test) == 1 else f"{len(data.test)} images with equal captions"
        raise UserError(
            f"the part {data.part} of {data.name} has {images}: CIDEr-D would be 0 for any caption",
            allowed="two test images or more, with different captions: n-grams that all images have weigh nothing",
            fix="caption more images",
        )


def _decoder_name(decoder: str) -> str:
    """A folder with the fingerprint of its files' names and states: reading all of them would take long."""
    if decoder == BUILT_IN:
        return decoder
    files = sorted(local_path(decoder).iterdir())
    return f"{decoder} ({fingerprint([[file.name for file in files], file_states(files)])})"


# -- training and captions


def _language(settings: Caption, captions: Sequence[Sequence[str]], seed: int) -> LanguageModel:
    positions = settings.prefix + settings.max_tokens
    flat = [caption for captions_of_image in captions for caption in captions_of_image]
    language = make_decoder(settings.decoder, flat, settings.built_in, positions, seed)
    language.check_positions(positions, "caption.prefix and caption.max_tokens")
    return language


def make_captioner(width: int, language: LanguageModel, settings: Caption, seed: int) -> Captioner:
    """Mapper, drawn from `seed`, and decoder for features of `width`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = make_mapper(settings.mapper, width, settings.prefix, language.width, settings.mapper_layers)
    return Captioner(mapper, language, train_decoder=settings.train_decoder or language.name == BUILT_IN)


class Pairs(NamedTuple):
    image: np.ndarray  # int64 [M], which image
    ids: list[list[int]]  # M captions' tokens, the end token last


@dataclass(frozen=True)
class PairBatch:
    features: Tensor  # float32 [B, W]
    ids: Tensor  # int64 [B, T], padded with PAD_ID
    bad: int = 0


def tokenized(captions: Sequence[Sequence[str]], tokenizer: Any, max_tokens: int) -> Pairs:
    """All pairs of images and captions; a caption is cut so that it has `max_tokens` with its end token."""
    flat = [caption for captions_of_image in captions for caption in captions_of_image]
    ids = tokenizer(flat, add_special_tokens=False)["input_ids"]
    image = np.repeat(np.arange(len(captions)), list(map(len, captions)))
    return Pairs(image, [[*row[: max_tokens - 1], tokenizer.eos_token_id] for row in ids])


def pair_batches(
    features: np.ndarray, pairs: Pairs, size: int, seed: int, world: World, first_step: int, steps: int
) -> Iterator[PairBatch]:
    """This rank's share of every batch from `first_step` on: every pair once per epoch, ordered by the seed."""
    share = world.share(size)

    def collate(rows: np.ndarray, ids: list[Tensor]) -> PairBatch:
        padded = pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
        of_images = torch.from_numpy(features[pairs.image[rows]])
        return PairBatch(pinned(of_images, world.device), pinned(padded, world.device))

    batches = (rows[share] for rows in rows_of_steps(len(pairs.ids), size, seed, first_step, steps))
    return feed_batches(batches, lambda row: torch.tensor(pairs.ids[row]), collate, threads=1)


def train_settings(caption: Caption, runtime: Runtime) -> Train:
    """The trainer's section for the budget and the optimizer of captioning."""
    return Train(
        samples=caption.samples,
        batch_size=caption.batch_size,
        runtime=runtime,
        optimizer=Optimizer(**caption.optimizer.model_dump()),
        log=Log(tensorboard=False),
        checkpoint=Checkpoint(every_samples=caption.samples, every_minutes=_SAVE_EVERY_MINUTES, keep=1),
    )


def train_captioner(
    captioner: Captioner,
    features: np.ndarray,
    pairs: Pairs,
    settings: Train,
    work: Path,
    world: World,
    stopping: Callable[[], bool],
) -> bool:
    """Train on the device, or resume from `work`, which is named by its fingerprint; see train_model."""
    captioner.place(world.device)

    def inputs(batch: PairBatch) -> tuple[Tensor, Tensor]:
        return batch.features.to(world.device, non_blocking=True), batch.ids.to(world.device, non_blocking=True)

    def batches(first_step: int, steps: int) -> Iterator[PairBatch]:
        return pair_batches(features, pairs, settings.batch_size, settings.runtime.seed, world, first_step, steps)

    return train_model(captioner, batches, inputs, settings, work, work.name, world, stopping)


def generate(
    captioner: Captioner,
    language: LanguageModel,
    features: np.ndarray,
    settings: Caption,
    precision: str,
    device: torch.device,
) -> list[str]:
    """A caption for every row of features [N, W]."""
    captioner.eval()
    captions: list[str] = []
    dtype = autocast_dtype(precision, device)
    for part in torch.from_numpy(features).split(_GENERATED_AT_ONCE):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            captions += captioner.generate(part.to(device), language, settings.beams, settings.max_tokens)
    return captions


# CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726), as pycocoevalcap's `CiderScorer`
#
# For n = 1..4, with h the count of an n-gram in the candidate, r in a reference, and N images:
#
#     idf = log N - log max(1, df)      df: images with a reference that contains it
#     sim_n = sum min(h idf, r idf) r idf / (|h idf| |r idf|) * exp(-(l_h - l_r)^2 / (2 * 6^2))     l: number of bigrams
#     score of an image = 10 * mean over references of the mean over n of sim_n

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
Ngram = tuple[str, ...]


class _TfIdf(NamedTuple):
    vectors: list[dict[Ngram, float]]  # one for each n
    norms: list[float]
    length: int  # number of bigrams


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The score, 0 to 10, of each image's candidate: tokens of one caption, and of one or more references, per image.

    Document frequencies are counted over all references. With a single image every idf is log 1 = 0, and so is the
    score.
    """
    if len(candidates) != len(references) or not all(references):
        problem = f"{len(candidates)} candidates for {len(references)} images"
        raise ValueError(f"{problem}; each needs one, and a reference or more")
    counted = [[_ngrams(tokens) for tokens in of_image] for of_image in references]
    frequencies = Counter(ngram for of_image in counted for ngram in set().union(*of_image))
    log_images = math.log(max(len(references), 1))
    scores = []
    for tokens, of_image in zip(candidates, counted, strict=True):
        candidate = _tf_idf(_ngrams(tokens), frequencies, log_images)
        similar = [_similarity(candidate, _tf_idf(reference, frequencies, log_images)) for reference in of_image]
        scores.append(_SCALE * math.fsum(similar) / len(similar))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    spans = ((start, start + n) for n in range(1, _LONGEST + 1) for start in range(len(tokens) - n + 1))
    return Counter(tuple(tokens[start:stop]) for start, stop in spans)


def _tf_idf(counts: Counter[Ngram], frequencies: Counter[Ngram], log_images: float) -> _TfIdf:
    vectors: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequencies[ngram])))
    norms = [math.sqrt(math.fsum(value * value for value in vector.values())) for vector in vectors]
    return _TfIdf(vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _TfIdf, reference: _TfIdf) -> float:
    total = 0.0
    norms = zip(candidate.norms, reference.norms, strict=True)
    for h, r, (h_norm, r_norm) in zip(candidate.vectors, reference.vectors, norms, strict=True):
        dot = math.fsum(min(value, r[ngram]) * r[ngram] for ngram, value in h.items() if ngram in r)
        total += dot / (h_norm * r_norm) if h_norm and r_norm else dot
    difference = candidate.length - reference.length
    return total / _LONGEST * math.exp(-(difference**2) / (2 * _SIGMA**2))


# Captions as COCO's evaluation splits them: PTB tokens in lower case, punctuation removed
#
# After pycocoevalcap's tokenizer, which calls Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) and
# drops a list of tokens. Quirks that decide a score are kept: a bracket becomes the word `-lrb-`, since the list has
# brackets in capitals, and `!!!` stays, since the list has the single mark alone. On 10,000 web captions 98% have
# identical tokens, and the score of a set differs by 0.1%.

_REMOVED = frozenset(
    ['"', "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_MARKS = "\u2018 \u2019 \u201c \u201d \u2013 \u2014 \u2026 \u00bd \u00bc \u00be \u00a2 \u00a3 \u20ac"
_SPELLINGS = dict(
    zip(_MARKS.split(), ["`", "'", "``", "''", "--", "--", "...", "1/2", "1/4", "3/4", "cents", "#", "$"], strict=True)
) | {
    "\u00ad": "",
    "\u200b": "",
    "&amp;": "&",
    "&quot;": '"',
    "&apos;": "'",
    "&nbsp;": " ",
}
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|"
    "maj|sgt|cpl|pvt|capt|ste?|ave|pres|hon|brig|mt|inc|cos?|corp|ltd|assn|univ|sq|jr|sr|bros|blvd|rd|esq|vs|etc|al|ca|cf|ct|ft|nos?|oz|pp|figs?|"
    "prop|bldg|tel|tenn|wash|tex|calif|mass|conn|fla|ala|minn"
)
_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)*"
_TOKEN = re.compile(
    "|".join(
        (
            r"</?[a-z][^<>]*>",  # SGML
            r"https?://[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`]",  # addresses
            r"[\w.%+-]+@[\w-]+(?:\.[\w-]+)+|(?:[\w-]+\.)+(?:com|net|org|edu)\b(?:/[^\s<>\"|()]*[^\s<>\"|.!?(){},;:'`])?",
            r"[@#][a-z_]\w*|&#\d+;",
            # written as one word, split
            r"'t(?=is\b|was\b)|can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|got|wan)(?=(?:na|ta)\b)",
            r"'n'|'em\b|(?<!\d)'\d\d(?:s\b|(?!\w))|o'clock\b|ma'am\b|[dlo]'(?!s\b)[^\W\d_]+",
            rf"{_LETTER}+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b",  # contractions
            rf"(?:{_ABBREVIATIONS})\.(?!\w)|{_LETTER}(?:\.{_LETTER})*\.(?!{_LETTER})",
            rf"{_LETTER}&{_LETTER}(?!\w)|(?:at&t|c\+\+|c#)(?!\w)",
            r"[:;=][-o*]?[()dp](?!\w)",  # faces
            r"[-+]?\d+:\d\d(?=[ap]m\b)|\d+(?:[-/]\d+)+(?![\w-])",  # times, spans, fractions
            r"[^\W_]+(?:[.,]\d+)?(?:[-_/][^\W_]+)*(?:[-_][^\W_]+)+",  # joined
            rf"{_WORD}(?:[/_][^\W_]+)*",
            r"\d+[^\W\d_][^\W_]*(?:/[^\W_]+)*|[-+]?(?:\d*(?:[.:,]\d+)+)|\d+(?:/[^\W_]+)*|\d",  # numbers
            r"\.\.+|!(?:[!?])+|\?(?:[!?])+|--+|\*+|``|''|[^\w\s]|\w",
        )
    )
)


def ptb_tokens(caption: str) -> list[str]:
    """The tokens of a caption that scores are counted over; line breaks count as spaces."""
    text = caption.lower()
    for mark, spelling in _SPELLINGS.items():
        text = text.replace(mark, spelling)
    # A tag may contain spaces; the scorer splits at them once more.
    tokens = (part for match in _TOKEN.finditer(text) for part in _written(match.group()).split())
    return [token for token in tokens if token not in _REMOVED]


def _written(token: str) -> str:
    """A token as Stanford's tokenizer writes it: dots, dashes and brackets have one form."""
    if len(token) > 1 and set(token) == {"."}:
        return "..."
    if len(token) > 1 and set(token) == {"-"}:
        return "--"
    if len(token) <= 3 and token[0] in _BRACKETS | {":": "", ";": "", "=": ""}:
        return "".join(_BRACKETS.get(mark, mark) for mark in token)
    return token
