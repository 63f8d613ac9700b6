"""What the loop is fed: pairs of an image's features and one of its captions, every pair once an epoch.

N images, M pairs, B batch, W feature width, T tokens of the longest caption in a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from labels.schema import PAD_ID
from train.data.feeder import feed_batches, pinned, rows_of_steps
from train.distributed import World


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
        return PairBatch(pinned(torch.from_numpy(features[pairs.image[rows]]), world.device), pinned(padded, world.device))

    batches = (rows[share] for rows in rows_of_steps(len(pairs.ids), size, seed, first_step, steps))
    return feed_batches(batches, lambda row: torch.tensor(pairs.ids[row]), collate, threads=1)
