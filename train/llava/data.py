"""Image-text pairs in LLaVA's json format, or captioned images told in it.

[{"id": ..., "image": "path below --images", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from":
"gpt", "value": ...}]}]
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

from labels.storage import UserError
from train.data.inputs import feed_batches, pinned, rows_of_steps, stack_pinned
from train.distributed import World
from train.encoders.encoder import ImageForm
from train.evals.data.captions import CAPTION_KINDS, load_captions
from train.evals.data.images import EncodedImage, FileSpan
from train.evals.features import DECODE_FAULTS, decode

IMAGE = "<image>"
ASKED = f"{IMAGE}\nGive a brief description of the image."
"""What is asked of a captioned image: one of the questions of LLaVA's own pre-training data."""
_SHAPE = '[{"id": ..., "image": FILE, "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}, ...]'


class Record(NamedTuple):
    """One image and what is said of it: human's and gpt's turns, one after the other; the image's mark stands in the
    first.
    """

    name: str
    place: EncodedImage
    turns: list[str]


def load_records(data: str, images: Path | None) -> list[Record]:
    """The records of a file of LLaVA's json with its folder of images, or of the training part of captioned data
    (KIND:DIR).

    Raises:
        UserError: see read_records and load_captions.
    """
    if data.partition(":")[0] in CAPTION_KINDS:
        if images is not None:
            raise UserError(
                f"--images {images} was given with --data {data}", fix="leave --images out: the data have their own"
            )
        parts = load_captions(data)
        if "train" not in parts:
            raise UserError(
                f"--data {data} has no part 'train'", allowed=f"its parts: {', '.join(parts)}", fix="fix --data"
            )
        part = parts["train"]
        rows = zip(part.keys, part.encoded, part.captions, strict=True)
        return [Record(key, place, [ASKED, caption]) for key, place, captions in rows for caption in captions]
    return read_records(Path(data), images if images is not None else Path(data).parent)


def read_records(file: Path, images: Path) -> list[Record]:
    """All records that have an image; those without one, which teach a projector nothing, are left out and told.

    Raises:
        UserError: the file or a record has another form, or images are missing.
    """
    if not images.is_dir():
        raise UserError(f"no folder of images at {images}", fix="fix --images")
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no file at {file}", allowed=f"JSON: {_SHAPE}", fix="fix --data") from None
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: {error}", allowed=_SHAPE) from None
    if not isinstance(content, list):
        raise UserError(f"{file} holds a {type(content).__name__}", allowed=_SHAPE)
    records = [
        _record(file, number, one, images)
        for number, one in enumerate(content)
        if not isinstance(one, dict) or one.get("image")
    ]
    if not records:
        raise UserError(f"{file} holds no record with an image", allowed=_SHAPE)
    if len(records) < len(content):
        print(
            f"{file}: {len(content) - len(records)} of {len(content)} records have no image and are left out",
            flush=True,
        )
    gone = [record for record in records if not record.place.path.is_file()]
    if gone:
        raise UserError(
            f"{len(gone)} of {len(records)} images are missing, the first: {gone[0].place.path} of the record {gone[0].name}",
            allowed=f"paths of `image` below {images}",
            fix="unpack the images there, or fix --images",
        )
    return records


def _record(file: Path, number: int, found: Any, images: Path) -> Record:
    name = f"{found.get('id', number)!r}" if isinstance(found, dict) else f"number {number}"
    turns = found.get("conversations") if isinstance(found, dict) else None

    def wrong(what: str) -> UserError:
        return UserError(f"{file}: the record {name} {what}", allowed=_SHAPE, fix="fix or remove this record")

    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise wrong("has no conversations of human and gpt by turns")
    if not isinstance(found["image"], str):
        raise wrong(f"has the image {found['image']!r}: one file is wanted")
    values = []
    for place, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker != ("human", "gpt")[place % 2] or not isinstance(value, str):
            raise wrong(f"has in turn {place + 1} `from` {speaker!r}")
        if value.count(IMAGE) != (place == 0):
            raise wrong(
                f"has the mark {IMAGE} {value.count(IMAGE)} times in turn {place + 1}: once in the first is wanted"
            )
        values.append(value.strip())
    path = images / found["image"]
    return Record(name, FileSpan.of_file(path) if path.is_file() else FileSpan(path, 0, 0), values)


# ---- prompt: Conversations as LLaVA-1.5 writes them (its template `v1`): for training here and, saved with the
# tokenizer, for every evaluation.
#
# T tokens of a conversation, the image's tokens among them.


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
    + "{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""Jinja, as tokenizers of transformers keep it. Contents are text, or lists of parts as chat interfaces send them."""
IGNORED = -100
"""The label of a token that is not learnt, as transformers' losses have it."""


def written(turns: list[str], end: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as TEMPLATE writes it, and where in the text gpt's turns stand with their end tokens.

    Args:
        turns: human's and gpt's by turns, the image's mark in the first.
        end: the end token's text.
    """
    text, spans = SYSTEM, []
    for number in range(0, len(turns), 2):
        text += f" USER: {turns[number]} ASSISTANT:"
        begin = len(text)
        text += f" {turns[number + 1]}{end}"
        spans.append((begin, len(text)))
    return text, spans


def conversation_ids(
    turns: list[str], tokenizer: Any, image_token: int, image_tokens: int, most: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; learnt are gpt's turns with their end tokens.

    Args:
        turns: human's and gpt's by turns, the image's mark in the first.
        tokenizer: one of the `tokenizers` library, which tells where tokens stand; its image mark is one token.
        image_token: the id that stands for a patch. image_tokens: how many the mark becomes.
        most: T at most; what is longer is cut at its end, but never within the image.

    Returns:
        ids, labels: both of length T, the labels not shifted.
    """
    text, spans = written(turns, tokenizer.eos_token)
    found = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = []
    labels: list[int] = []
    for token, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token == image_token:
            ids += [image_token] * image_tokens
            labels += [IGNORED] * image_tokens
            continue
        ids.append(token)
        labels.append(token if any(first <= begin < end <= last for first, last in spans) else IGNORED)
    most = max(most, len(ids) - ids[::-1].index(image_token))
    return ids[:most], labels[:most]


# ---- batches: Records -> batches: images decoded and conversations tokenized by threads, ahead of the device. B batch, T tokens, S image side.


@dataclass(frozen=True)
class TalkBatch:
    """images: uint8 [B, S, S, 3]. talk: int64 [B, T, 2], ids and labels, padded with the end token and IGNORED. bad:
    none ever.
    """

    images: Tensor
    talk: Tensor
    bad: int = 0


class Reader(NamedTuple):
    """How a record becomes tensors. `tokens`: turns -> ids and labels. `pad`: the id that fills up."""

    form: ImageForm
    tokens: Callable[[list[str]], tuple[list[int], list[int]]]
    pad: int
    threads: int

    def __call__(self, record: Record) -> tuple[np.ndarray, Tensor]:
        """uint8 [S, S, 3] and int64 [T, 2].

        Raises:
            UserError: the image cannot be decoded, or nothing that is learnt is left of the conversation.
        """
        try:
            image = decode(record.place.read(), self.form.side)
        except DECODE_FAULTS as error:
            raise UserError(
                f"the image of the record {record.name}, {record.place.path}, cannot be decoded: {type(error).__name__}: {error}",
                fix="fix it, or remove the record",
            ) from None
        talk = torch.tensor(self.tokens(record.turns)).T
        if (talk[1:, 1] == IGNORED).all():
            raise UserError(
                f"the record {record.name} has no answer within its first {len(talk)} tokens",
                allowed="some of an answer within llava.max_tokens and the language model's positions",
                fix="raise llava.max_tokens, or shorten the record's first question",
            )
        return image, talk


def talk_batches(
    records: Sequence[Record], read: Reader, size: int, seed: int, world: World, first_step: int, steps: int
) -> Iterator[TalkBatch]:
    """This rank's share of every batch from `first_step` on; the order is a function of (seed, epoch)."""
    share = world.share(size)

    def collate(_: np.ndarray, samples: list[tuple[np.ndarray, Tensor]]) -> TalkBatch:
        ids, labels = ([talk[:, column] for _, talk in samples] for column in (0, 1))
        talk = torch.stack([pad_sequence(ids, True, read.pad), pad_sequence(labels, True, IGNORED)], dim=2)
        return TalkBatch(stack_pinned([image for image, _ in samples], world.device), pinned(talk, world.device))

    return feed_batches(
        (rows[share] for rows in rows_of_steps(len(records), size, seed, first_step, steps)),
        lambda row: read(records[row]),
        collate,
        read.threads or len(os.sched_getaffinity(0)),
    )
