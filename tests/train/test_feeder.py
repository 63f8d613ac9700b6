"""Batches in order, no more than a few ahead; errors come with their batch; threads end with the generator."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from train.data.inputs import feed_batches, stack_pinned


def feeder_threads() -> int:
    return sum(thread.name.startswith("feeder") for thread in threading.enumerate())


def collate(rows: np.ndarray, samples: list[int]) -> list[tuple[int, int]]:
    return list(zip(rows.tolist(), samples, strict=True))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_batches_come_in_order_whatever_takes_longest(threads: int) -> None:
    def sample(row: int) -> int:
        time.sleep(0.003 * (row % 4 == 0))
        return row * row

    batches = [np.arange(start, start + size) for start, size in ((0, 5), (5, 1), (6, 7), (13, 2))]
    fed = list(feed_batches(batches, sample, collate, threads))
    assert fed == [[(row, row * row) for row in rows.tolist()] for rows in batches]
    assert list(feed_batches([], sample, collate, threads)) == [] and feeder_threads() == 0


def test_few_batches_are_made_ahead() -> None:
    requested: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(100):
            requested.append(number)
            yield np.array([number])

    fed = feed_batches(batches(), lambda row: row, collate, 2)
    for number in range(10):
        next(fed)
        assert len(requested) == number + 3
    fed.close()
    assert feeder_threads() == 0 and len(requested) == 12


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_comes_with_its_batch_and_ends_the_threads(threads: int) -> None:
    def sample(row: int) -> int:
        if row == 5:
            raise ValueError("row 5")
        return row

    fed = feed_batches((np.arange(start, start + 2) for start in range(0, 40, 2)), sample, collate, threads)
    assert next(fed) == [(0, 0), (1, 1)] and next(fed) == [(2, 2), (3, 3)]
    with pytest.raises(ValueError, match="row 5"):
        next(fed)
    assert feeder_threads() == 0


def test_stacking_takes_flipped_images_too() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    stacked = stack_pinned([image[:, ::-1], image], torch.device("cpu"))
    assert stacked.dtype == torch.uint8 and np.array_equal(stacked.numpy(), [image[:, ::-1], image])
