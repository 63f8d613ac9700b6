"""Batches made ahead of the device by threads, where a sample is made by a Python call: evaluations, fine-tuning,
captioning, LLaVA.

    rows of a batch -> threads: sample(row) for each, then collate(rows, samples) -> tensors, in page-locked memory for a GPU

`train run` has a loader of its own: there the samples of a batch are made by compiled code, without Python
    (train/data/loader.py).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from train.data.files import Threads

_BATCHES_AHEAD = 2
Sample = TypeVar("Sample")
FedBatch = TypeVar("FedBatch")


def feed_batches(
    batches: Iterable[np.ndarray],
    sample: Callable[[int], Sample],
    collate: Callable[[np.ndarray, list[Sample]], FedBatch],
    threads: int,
) -> Generator[FedBatch]:
    """Batches in order. While the caller has one, `_BATCHES_AHEAD` more are made or wait, so that memory is bounded.

    The threads end with the generator: when it is exhausted, closed or dropped, or when an error leaves it.

    Args:
        batches: the rows of each batch, int64 [B].
        sample: makes what stands in one row; called in threads, each of which has a part of a batch.
        collate: the rows and what `sample` made of them -> the batch; called in a thread.
        threads: that call `sample`.

    Raises:
        what `sample` and `collate` raise, when their batch is taken.
    """

    def make_part(rows: np.ndarray) -> list[Sample]:
        return [sample(row) for row in rows.tolist()]

    def make_batch(rows: np.ndarray, parts: list[Future[list[Sample]]]) -> FedBatch:
        return collate(rows, [made for part in parts for made in part.result()])

    ahead: deque[Future[FedBatch]] = deque()
    with Threads(
        threads + 1, "feeder"
    ) as pool:  # one more, since make_batch waits for its parts, which are submitted before it
        for rows in batches:
            bounds = np.linspace(0, len(rows), min(threads, len(rows)) + 1).astype(int)
            parts = [pool.submit(make_part, rows[low:high]) for low, high in pairwise(bounds)]
            ahead.append(pool.submit(make_batch, rows, parts))
            if len(ahead) > _BATCHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def stack_pinned(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays of one shape as one tensor [B, ...] on the CPU; for a GPU page-locked, so that `to(device,
    non_blocking=True)` does not wait.

    torch gives such memory out again only when the copies from it are done.
    """
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    stacked = torch.empty((len(arrays), *arrays[0].shape), dtype=dtype, pin_memory=device.type == "cuda")
    np.stack(arrays, out=stacked.numpy())
    return stacked


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in page-locked memory, where `device` is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def rows_of_steps(count: int, size: int, seed: int, first_step: int, steps: int) -> Iterator[np.ndarray]:
    """The rows, int64 [size], of each step's batch: one permutation of [0, count) after the other, without a gap."""
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first_step, steps):
        positions, rows = np.arange(step * size, (step + 1) * size), np.empty(size, np.int64)
        for number in range(positions[0] // count, positions[-1] // count + 1):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed, number]).permutation(count)
            in_epoch = positions // count == number
            rows[in_epoch] = order[positions[in_epoch] % count]
        yield rows
