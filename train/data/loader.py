"""Feeds the trainer: uint8 images and padded label ids, nothing else.

    train/data/order.py (which samples) -> threads: train/data/decode.py (compiled) -> ring of preallocated batches -> the loop
                                  \\-> one thread: train/ahead.py (the disk)

B batch (of this rank), S image side, K label limit.
"""

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np

from labels.native import Decompressor
from labels.settings import Data
from train.ahead import Ahead
from train.batch import Batch, Ring, Slot
from train.data import decode
from train.data.dataset import BetonSet
from train.data.image_index import TABLE_BYTES
from train.data.order import Order
from train.faults import count_bad
from train.pixels import Crops
from train.threads import Threads

_FIRST_SCRATCH_BYTES = 1 << 20
# More would smooth nothing further, and of small batches the first gigabyte takes the processor from the training for many seconds.
_MOST_BATCHES = 64


class _Worker:
    """What one thread keeps: its JPEG decoder and scratch memory, which grows to the largest image met."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(_FIRST_SCRATCH_BYTES, np.uint8)


@dataclass(frozen=True)
class _Filling:
    """A batch that the threads are at; one of them begins by handing out its parts."""

    slot: Slot
    samples: np.ndarray
    parts: Future[list[Future[None]]]


class Loader:
    """Iterates over the batches of steps first_step, first_step + 1, ... last_step - 1, each time anew.

    Its threads end with the iterator: when it is exhausted, when it is dropped after a `break`, and at the latest with the loader's
    own `with` block.

    Args:
        betons: the open set.
        settings: `train.data`.
        image_size: S.
        batch_size: over all ranks; a multiple of `world`.
        seed: of order and crops.
        first_step, last_step: what to iterate over; the steps before are not touched.
        rank, world: this process among all.
        threads: decoding threads.
        pinned: page-locked memory, for asynchronous copies to a GPU.
        device: leave crops as the decoder gives them, to be resampled by train/data/inputs.py; else they are resampled here.
    """

    def __init__(
        self, betons: BetonSet, settings: Data, *, image_size: int, batch_size: int, seed: int, first_step: int, last_step: int,
        rank: int = 0, world: int = 1, threads: int = 1, pinned: bool = False, device: bool = False,
    ) -> None:  # fmt: skip
        self._betons, self._settings = betons, settings
        low, high = settings.crop_scale
        narrow, wide = settings.crop_ratio
        self.crops = Crops((low, high), (narrow, wide), settings.flip, seed, image_size, centre=False, device=device)
        self.order = Order(betons.sizes, betons.quotas, settings.shuffle_block, settings.shuffle_window, seed)
        self._image_size, self._batch_size, self._pinned = image_size, batch_size, pinned
        self._rank, self._world, self._threads = rank, world, threads
        self._first_step, self._last_step = first_step, last_step
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for iterator in list(self._running):
            iterator.close()

    def __iter__(self) -> Iterator[Batch]:
        iterator = self._batches()
        self._running.add(iterator)
        return iterator

    def _batches(self) -> Generator[Batch]:
        steps = iter(range(self._first_step, self._last_step))
        workers = deque(_Worker() for _ in range(self._threads))
        most = min(self._last_step - self._first_step + 1, _MOST_BATCHES)
        ring, filling = Ring(self._slot, self._settings.prefetch, most), deque[_Filling]()
        with Ahead(self._betons, self.order, self._rank, self._world) as ahead, Threads(self._threads, "decode") as pool:

            def submit() -> None:
                while ring.free and (step := next(steps, None)) is not None:
                    filling.append(self._submit(step, ring.free.popleft(), pool, workers, ahead))

            submit()
            while filling:
                done = filling.popleft()
                for future in done.parts.result():
                    future.result()
                submit()  # before this batch goes out, so that the threads are at the next ones while the loop has it
                yield done.slot.batch(count_bad(self._betons, done.samples, done.slot.rows))
                if done.slot.copied is not None:
                    done.slot.copied.synchronize()  # else the threads would overwrite what the GPU has yet to copy
                ring.give_back(done.slot)
                submit()

    def _slot(self) -> Slot:
        return Slot(self._batch_size // self._world, self._image_size, self._betons.label_limit, self._pinned, self.crops.device)

    def _submit(self, step: int, slot: Slot, pool: ThreadPoolExecutor, workers: deque[_Worker], ahead: Ahead) -> _Filling:
        """Let the threads begin the batch of one step."""
        begin = step * self._batch_size
        ahead.follow(begin, begin + self._batch_size, first=step == self._first_step)
        samples, epochs = self.order.batch(step, self._batch_size, self._rank, self._world)
        samples, slot.epochs = self._betons.chosen(samples), epochs
        return _Filling(slot, samples, pool.submit(self._hand_out, pool, workers, slot, samples, epochs))

    def _hand_out(
        self, pool: ThreadPoolExecutor, workers: deque[_Worker], slot: Slot, samples: np.ndarray, epochs: np.ndarray
    ) -> list[Future[None]]:
        """Where the device resamples, fit the canvas to the batch; then let all threads fill it."""
        if self.crops.device:
            with self._betons.held(samples):
                scratch = np.empty(TABLE_BYTES, np.uint8)
                slot.fit(*decode.canvas_shape(self._betons.tables, samples, epochs, self._betons.label_limit, self.crops, scratch))
        bounds = np.linspace(0, len(samples), min(self._threads, len(samples)) + 1).astype(int).tolist()
        parts = pairwise(bounds)
        return [pool.submit(self._fill, workers, slot, samples, epochs, *part) for part in parts]

    def _fill(self, workers: deque[_Worker], slot: Slot, samples: np.ndarray, epochs: np.ndarray, begin: int, end: int) -> None:
        worker = workers.popleft()  # as many workers as threads: there is always one
        try:
            with self._betons.held(samples[begin:end]):
                while needed := decode.load_rows(
                    self._betons.tables, samples, epochs, begin, end, self.crops, self._betons.vocabulary,
                    worker.decompressor.handle, worker.scratch, slot.rows,
                ):  # fmt: skip
                    worker.scratch = np.empty(needed, np.uint8)
        finally:
            workers.append(worker)
