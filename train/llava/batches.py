"""Records -> batches: images decoded and conversations tokenized by threads, ahead of the device. B batch, T tokens, S image side."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from labels.errors import UserError
from train.data.feeder import feed_batches, pinned, rows_of_steps, stack_pinned
from train.distributed import World
from train.encoders.encoder import ImageForm
from train.evals.pixels import DECODE_FAULTS, decode
from train.llava.data import Record
from train.llava.prompt import IGNORED


@dataclass(frozen=True)
class TalkBatch:
    """images: uint8 [B, S, S, 3]. talk: int64 [B, T, 2], ids and labels, padded with the end token and IGNORED. bad: none ever."""

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
                mend="mend it, or remove the record",
            ) from None
        talk = torch.tensor(self.tokens(record.turns)).T
        if (talk[1:, 1] == IGNORED).all():
            raise UserError(
                f"the record {record.name} has no answer within its first {len(talk)} tokens",
                allowed="some of an answer within llava.max_tokens and the language model's positions",
                mend="raise llava.max_tokens, or shorten the record's first question",
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
