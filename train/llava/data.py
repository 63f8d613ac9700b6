"""Training data of `train llava`: LLaVA's json, or captioned images, as batches of images and token ids.

    load_records: FILE.json with --images, or KIND:DIR -> Record (image, turns of human and gpt)
    conversation: turns -> the text of LLaVA-1.5's template `v1` -> ids and labels of T tokens, the image's among them
    record_batches: records -> RecordBatch, decoded and tokenized by threads ahead of the device

TEMPLATE replaces the language model's own chat template, so that training and lmms-eval use the same prompt. Images
are cropped to the central square, as in the training of the tower. B batch, T tokens, S image side.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from labels.show.terminal import count
from labels.storage import UserError, local_path
from train.data.inputs import feed_batches, pinned, rows_of_steps, stack_pinned
from train.distributed import World
from train.encoders.encoder import ImageForm
from train.evals.data.captions import CAPTION_KINDS, load_captions
from train.evals.data.images import EncodedImage, FileSpan
from train.evals.features import DECODE_FAULTS, decode

IMAGE = "<image>"
IGNORED = -100
"""The label of a token that is not learnt, as in transformers' losses."""
_QUESTION = f"{IMAGE}\nGive a brief description of the image."  # for captions: one of LLaVA's pre-training questions
_JSON = (
    '[{"id": ..., "image": FILE, "conversations": [{"from": "human", "value": "<image>\\n..."}, '
    '{"from": "gpt", "value": ...}, ...]}, ...]'
)


class Record(NamedTuple):
    """One image with the turns of human and gpt, alternating; the image's mark is in the first turn."""

    name: str
    image: EncodedImage
    turns: list[str]


def load_records(data: str, images: Path | None) -> list[Record]:
    """The records of LLaVA's json `data` with its folder of images (default: the json's), or of the training part of
    captioned data (KIND:DIR).

    Raises:
        UserError: see read_records and load_captions.
    """
    if data.partition(":")[0] not in CAPTION_KINDS:
        return read_records(local_path(data), images if images is not None else local_path(data).parent)
    if images is not None:
        fix = "omit --images: these data have their own"
        raise UserError(f"--images {images} was given with --data {data}", fix=fix)
    parts = load_captions(data)
    if "train" not in parts:
        raise UserError(
            f"--data {data} has no part 'train'", allowed=f"its parts: {', '.join(parts)}", fix="fix --data"
        )
    part = parts["train"]()
    rows = zip(part.keys, part.encoded, part.captions, strict=True)
    return [Record(key, image, [_QUESTION, caption]) for key, image, captions in rows for caption in captions]


def read_records(file: Path, images: Path) -> list[Record]:
    """All records that have an image; those without one, which teach a projector nothing, are skipped and counted.

    Raises:
        UserError: the file or a record has another form, or images are missing.
    """
    if not images.is_dir():
        raise UserError(f"no folder of images at {images}", fix="fix --images")
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no file at {file}", allowed=f"JSON: {_JSON}", fix="fix --data") from None
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: {error}", allowed=_JSON) from None
    if not isinstance(content, list):
        raise UserError(f"{file} holds a {type(content).__name__}", allowed=_JSON)
    entries = [(n, entry) for n, entry in enumerate(content) if not isinstance(entry, dict) or entry.get("image")]
    if not entries:
        raise UserError(f"{file} holds no record with an image", allowed=_JSON)
    if skipped := len(content) - len(entries):
        print(f"{file}: {skipped:,} of {count(len(content), 'record')} have no image and are skipped", flush=True)
    rows = [_parse(file, number, entry, images) for number, entry in entries]
    missing = [(name, path) for name, path, _ in rows if not path.is_file()]
    if missing:
        name, path = missing[0]
        raise UserError(
            f"{len(missing)} of {len(rows)} images are missing, the first: {path} of the record {name}",
            allowed=f"paths of `image` below {images}",
            fix="unpack the images there, or fix --images",
        )
    return [Record(name, FileSpan.of_file(path), turns) for name, path, turns in rows]


def _parse(file: Path, number: int, entry: Any, images: Path) -> tuple[str, Path, list[str]]:
    """Name, image file and turns of a record."""
    name = f"{entry.get('id', number)!r}" if isinstance(entry, dict) else f"number {number}"
    turns = entry.get("conversations") if isinstance(entry, dict) else None

    def wrong(what: str) -> UserError:
        return UserError(f"{file}: the record {name} {what}", allowed=_JSON, fix="fix or remove this record")

    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise wrong("has no conversations with turns of human and gpt")
    if not isinstance(entry["image"], str):
        raise wrong(f"has the image {entry['image']!r}, not one file")
    values = []
    for index, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker != ("human", "gpt")[index % 2] or not isinstance(value, str):
            raise wrong(f"has in turn {index + 1} `from` {speaker!r}")
        if (count := value.count(IMAGE)) != (index == 0):
            raise wrong(f"has the mark {IMAGE} {count} times in turn {index + 1}; it must be in turn 1, once")
        values.append(value.strip())
    return name, images / entry["image"], values


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = (
    SYSTEM
    + "{% for message in messages %}{% if message['role'] == 'user' %} USER: "
    + _TEXT
    + "{% else %} ASSISTANT: "
    + _TEXT
    + "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""Jinja, as transformers' tokenizers keep it. Contents are text, or lists of parts as chat interfaces send them."""


def conversation_text(turns: list[str], end: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as TEMPLATE writes it, and the spans of gpt's turns, each with its end token, the text `end`."""
    text, spans = SYSTEM, []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text += f" USER: {question} ASSISTANT:"
        begin = len(text)
        text += f" {answer}{end}"
        spans.append((begin, len(text)))
    return text, spans


def conversation_ids(
    turns: list[str], tokenizer: Any, image_token: int, image_tokens: int, limit: int
) -> tuple[list[int], list[int]]:
    """Token ids [T] and labels [T], not shifted; gpt's turns with their end tokens are learnt.

    Args:
        turns: of human and gpt, alternating.
        tokenizer: a fast one, which gives offsets; its image mark is one token.
        image_token: the id that stands for a patch; the mark becomes `image_tokens` of them.
        limit: T at most; longer conversations are cut at their end, but never within the image.
    """
    text, spans = conversation_text(turns, tokenizer.eos_token)
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = []
    labels: list[int] = []
    for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        learnt = any(first <= begin < end <= last for first, last in spans)
        copies = image_tokens if token == image_token else 1
        ids += [token] * copies
        labels += [token if learnt and token != image_token else IGNORED] * copies
    limit = max(limit, len(ids) - ids[::-1].index(image_token))
    return ids[:limit], labels[:limit]


@dataclass(frozen=True)
class RecordBatch:
    images: Tensor  # uint8 [B, S, S, 3]
    tokens: Tensor  # int64 [B, T, 2], ids and labels, padded with the pad token and IGNORED
    bad: int = 0  # an image that cannot be decoded is an error


class Reader(NamedTuple):
    """How a record becomes an image, uint8 [S, S, 3], and tokens, int64 [T, 2]."""

    form: ImageForm
    tokens: Callable[[list[str]], tuple[list[int], list[int]]]  # turns -> ids and labels
    pad: int  # the id of padding
    threads: int

    def __call__(self, record: Record) -> tuple[np.ndarray, Tensor]:
        """Raises UserError if the image cannot be decoded, or nothing that is learnt is within the limit of tokens."""
        try:
            image = decode(record.image.read(), self.form.side)
        except DECODE_FAULTS as error:
            problem = f"the image of the record {record.name}, {record.image.path}, cannot be decoded"
            raise UserError(f"{problem}: {type(error).__name__}: {error}", fix="fix it, or remove the record") from None
        tokens = torch.tensor(self.tokens(record.turns)).T
        if (tokens[1:, 1] == IGNORED).all():
            raise UserError(
                f"the record {record.name} has no answer within its first {len(tokens)} tokens",
                allowed="the beginning of an answer within llava.max_tokens and the language model's positions",
                fix="raise llava.max_tokens, or shorten the record's first question",
            )
        return image, tokens


def record_batches(
    records: Sequence[Record], read: Reader, size: int, seed: int, world: World, first_step: int, steps: int
) -> Iterator[RecordBatch]:
    """This rank's share of every batch from `first_step` on; the order is a function of (seed, epoch)."""
    share = world.share(size)

    def collate(_: np.ndarray, samples: list[tuple[np.ndarray, Tensor]]) -> RecordBatch:
        ids, labels = ([tokens[:, column] for _, tokens in samples] for column in (0, 1))
        tokens = torch.stack([pad_sequence(ids, True, read.pad), pad_sequence(labels, True, IGNORED)], dim=2)
        return RecordBatch(stack_pinned([image for image, _ in samples], world.device), pinned(tokens, world.device))

    return feed_batches(
        (rows[share] for rows in rows_of_steps(len(records), size, seed, first_step, steps)),
        lambda row: read(records[row]),
        collate,
        read.threads or len(os.sched_getaffinity(0)),
    )
