"""Records -> batches: images decoded and conversations tokenized by threads, one batch ahead. B batch, T tokens, S image side."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from labels.errors import UserError
from train.distributed import World
from train.evals.encoders.encoder import ImageForm
from train.evals.pixels import DECODE_FAULTS, decode
from train.feeder import rows_of_steps
from train.llava.prompt import IGNORED
from train.llava.records import Record
from train.threads import Threads


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

    def __call__(self, record: Record) -> tuple[Tensor, Tensor]:
        """uint8 [S, S, 3] and int64 [T, 2].

        Raises:
            UserError: the image cannot be decoded, or nothing that is learnt is left of the conversation.
        """
        try:
            image = torch.tensor(decode(record.place.read(), self.form.side))
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
    share = slice(world.rank * size // world.size, (world.rank + 1) * size // world.size)
    with Threads(read.threads or len(os.sched_getaffinity(0)), "llava") as pool:
        waiting = None
        for rows in rows_of_steps(len(records), size, seed, first_step, steps):
            coming = [pool.submit(read, records[row]) for row in rows[share]]
            if waiting is not None:
                yield _batch([future.result() for future in waiting], read.pad)
            waiting = coming
        if waiting is not None:
            yield _batch([future.result() for future in waiting], read.pad)


def _batch(rows: list[tuple[Tensor, Tensor]], pad: int) -> TalkBatch:
    talk = torch.tensor([pad, IGNORED]).repeat(len(rows), max(len(one) for _, one in rows), 1)
    for row, (_, one) in enumerate(rows):
        talk[row, : len(one)] = one
    return TalkBatch(torch.stack([image for image, _ in rows]), talk)
