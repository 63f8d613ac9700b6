"""Feeds the trainer: uint8 images and padded label ids, nothing else.

    Order: which samples -> threads: decode.load_rows (compiled) -> Ring of preallocated Slots -> Batch -> the loop
                        \\-> one thread: Readahead: what comes a window later, from disk or object store

No Python runs per sample. A batch is split among the threads; while the loop has one, the next are decoded. A damaged
JPEG is reported and excluded from the loss, any other damage ends the run with an error that names the file.
B batch (of this rank), S image side, H x W canvas, K label limit.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch

from labels.native import Decompressor
from labels.settings import Data
from labels.show.terminal import visible
from labels.storage import UserError
from train.data import decode
from train.data.dataset import BetonSet
from train.data.decode import BOX, Crops, Rows
from train.data.files import Threads
from train.data.image_index import BAD_INDEX, BAD_LABEL, BAD_READ, BAD_TABLE, OK, TABLE_BYTES, advise
from train.data.order import Order
from train.distributed import launch_variable

_MOST_WAITING = 64
_FIRST_SCRATCH_BYTES = 1 << 20
# More smooth nothing further, and of small batches the first gigabyte takes the CPU from the training for many seconds.
_MOST_BATCHES = 64


@dataclass(frozen=True)
class Batch:
    """One step's input. Tensors and arrays are overwritten when the next batch is taken."""

    images: torch.Tensor  # uint8 [B, S, S, 3]; where the device resamples, [B, H, W, 3]
    boxes: torch.Tensor | None  # where the device resamples, float32 [B, BOX]: the crops in the canvases
    label_ids: torch.Tensor  # int32 [B, K], padded with PAD_ID
    positions: np.ndarray  # int64 [B], as epochs: the samples' rows; augmentations depend on seed, epoch and row
    epochs: np.ndarray
    bad: int  # samples whose JPEG did not decode; they are grey, without labels, and so without loss
    copied: torch.cuda.Event | None = None  # on a GPU, recorded after the copies from this memory

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images, label ids and boxes on `device`; from page-locked memory the copies are asynchronous."""
        images, label_ids = self.images.to(device, non_blocking=True), self.label_ids.to(device, non_blocking=True)
        boxes = None if self.boxes is None else self.boxes.to(device, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return images, label_ids, boxes


class Loader:
    """Iterates over the batches of the steps [first_step, last_step), each time from the first.

    Its threads end with the iterator: when it is exhausted, when it is dropped after a `break`, and at the latest with
    the loader's own `with` block. `batch_size` counts all ranks and is a multiple of `world`; `seed` is of order and
    crops; `pinned` memory is for asynchronous copies to a GPU; with `device`, train/data/inputs.py resamples the crops;
    `centre`: the largest square from the middle instead of random crops.
    """

    def __init__(
        self,
        betons: BetonSet,
        settings: Data,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        pinned: bool = False,
        device: bool = False,
        centre: bool = False,
    ) -> None:
        self._betons, self._settings = betons, settings
        low, high = settings.crop_scale
        narrow, wide = settings.crop_ratio
        self.crops = Crops((low, high), (narrow, wide), settings.flip, seed, image_size, centre=centre, device=device)
        self.order = Order(betons.sizes, betons.quotas, settings.shuffle_block, settings.shuffle_window, seed)
        self._image_size, self._batch_size, self._pinned = image_size, batch_size, pinned
        self._rank, self._world, self._threads = rank, world, threads
        self._first_step, self._last_step = first_step, last_step
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        with (
            Readahead(self._betons, self.order, self._rank, self._world) as readahead,
            Threads(self._threads, "decode") as pool,
        ):

            def submit() -> None:
                while ring.free and (step := next(steps, None)) is not None:
                    filling.append(self._submit(step, ring.free.popleft(), pool, workers, readahead))

            submit()
            while filling:
                done = filling.popleft()
                for future in done.parts.result():
                    future.result()
                submit()  # before this batch is handed out, so that the threads decode the next ones meanwhile
                yield done.slot.batch(count_bad(self._betons, done.samples, done.slot.rows))
                if done.slot.copied is not None:
                    done.slot.copied.synchronize()  # else the threads would overwrite what the GPU has yet to copy
                ring.release(done.slot)
                submit()

    def _slot(self) -> Slot:
        batch, limit = self._batch_size // self._world, self._betons.label_limit
        return Slot(batch, self._image_size, limit, self._pinned, self.crops.device)

    def _submit(
        self, step: int, slot: Slot, pool: ThreadPoolExecutor, workers: deque[_Worker], readahead: Readahead
    ) -> _Filling:
        """Let the threads begin the batch of one step."""
        begin = step * self._batch_size
        readahead.follow(begin, begin + self._batch_size, first=step == self._first_step)
        samples, epochs = self.order.batch(step, self._batch_size, self._rank, self._world)
        samples, slot.epochs = self._betons.file_samples(samples), epochs
        return _Filling(slot, samples, pool.submit(self._fill_batch, pool, workers, slot, samples, epochs))

    def _fill_batch(
        self, pool: ThreadPoolExecutor, workers: deque[_Worker], slot: Slot, samples: np.ndarray, epochs: np.ndarray
    ) -> list[Future[None]]:
        """Where the device resamples, fit the canvas to the batch; then let all threads fill it."""
        if self.crops.device:
            with self._betons.held(samples):
                tables, limit, scratch = self._betons.tables, self._betons.label_limit, np.empty(TABLE_BYTES, np.uint8)
                slot.fit(*decode.canvas_shape(tables, samples, epochs, limit, self.crops, scratch))
        bounds = np.linspace(0, len(samples), min(self._threads, len(samples)) + 1).astype(int).tolist()
        return [pool.submit(self._fill_part, workers, slot, samples, epochs, *part) for part in pairwise(bounds)]

    def _fill_part(
        self, workers: deque[_Worker], slot: Slot, samples: np.ndarray, epochs: np.ndarray, begin: int, end: int
    ) -> None:
        worker, betons = workers.popleft(), self._betons  # as many workers as threads: there is always one
        part = (betons.tables, samples, epochs, begin, end, self.crops, betons.vocabulary, worker.decompressor.handle)
        try:
            with betons.held(samples[begin:end]):
                while needed := decode.load_rows(*part, worker.scratch, slot.rows):
                    worker.scratch = np.empty(needed, np.uint8)
        finally:
            workers.append(worker)


class _Worker:
    """What one thread keeps: its JPEG decoder and scratch memory, which grows to the largest image met."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(_FIRST_SCRATCH_BYTES, np.uint8)


@dataclass(frozen=True)
class _Filling:
    """A batch that is being filled; the first task submits one task for each part."""

    slot: Slot
    samples: np.ndarray
    parts: Future[list[Future[None]]]


class Slot:
    """Memory for one batch, as tensors for the loop and arrays for compiled code; it grows with the canvases."""

    def __init__(self, batch: int, size: int, limit: int, pinned: bool, device: bool) -> None:
        self._pixels = torch.empty(batch * size * size * 3, dtype=torch.uint8, pin_memory=pinned)
        self._boxes = torch.empty((batch, BOX), dtype=torch.float32, pin_memory=pinned)
        self._label_ids = torch.empty((batch, limit), dtype=torch.int32, pin_memory=pinned)
        self._positions, self._status = np.empty(batch, np.int64), np.empty(batch, np.uint8)
        self._device = device
        self.epochs = np.empty(batch, np.int64)
        self.copied = torch.cuda.Event() if pinned else None
        self.fit(size, size)

    def fit(self, height: int, width: int) -> None:
        """Use the memory for images of height x width pixels."""
        batch, needed = len(self._status), len(self._status) * height * width * 3
        if needed > len(self._pixels):
            self._pixels = torch.empty(needed, dtype=torch.uint8, pin_memory=self._pixels.is_pinned())
        self._images = self._pixels[:needed].view(batch, height, width, 3)
        tensors = self._images.numpy(), self._boxes.numpy(), self._label_ids.numpy()
        self.rows = Rows(*tensors, self._positions, self._status)

    @property
    def bytes(self) -> int:
        return self._pixels.nbytes + self._label_ids.nbytes

    def batch(self, bad: int) -> Batch:
        boxes = self._boxes if self._device else None
        return Batch(self._images, boxes, self._label_ids, self._positions, self.epochs, bad, self.copied)


class Ring:
    """Slots for batches decoded ahead: as many as `room` bytes hold of the largest slot, between two and `most`."""

    def __init__(self, make: Callable[[], Slot], room: int, most: int) -> None:
        self._make, self._room, self._most = make, room, max(most, 2)
        self._slots = [make(), make()]  # more when the first batch has shown how large they get
        self.free = deque(self._slots)  # to be filled next

    def release(self, slot: Slot) -> None:
        """Take back a slot: drop it if the slots have outgrown the room, else make more while there is room."""
        wanted = min(max(self._room // max(slot.bytes for slot in self._slots), 2), self._most)
        if len(self._slots) > wanted:
            self._slots.remove(slot)
            return
        self.free.append(slot)
        new = [self._make() for _ in range(wanted - len(self._slots))]
        self._slots += new
        self.free += new


class Readahead:
    """One thread that reads ahead of the decoding ones; use it in a `with` block.

    Blocks are requested a whole window before their samples come, so that disks read in long stretches and remote
    betons are fetched in time. The ranks of one machine share the disk's blocks. On many machines the disk is not read
    ahead: each would read all blocks for a part of their samples.
    """

    def __init__(self, betons: BetonSet, order: Order, rank: int, world: int) -> None:
        self._betons, self._order = betons, order
        self._one_machine = world == 1 or launch_variable("LOCAL_WORLD_SIZE", world, least=1) >= world
        self._rank, self._world = rank, world
        self._pool = Threads(1, "readahead")
        self._waiting: deque[Future[None]] = deque()
        self._scratch = np.empty(TABLE_BYTES, np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def follow(self, begin: int, end: int, *, first: bool) -> None:
        """The loader takes the positions [begin, end): read what comes a window later, with `first` also until then.

        Raises UserError where a file is gone, cut, or cannot be fetched.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._read, begin, end, first))

    def _read(self, begin: int, end: int, first: bool) -> None:
        blocks = self._order.readahead(begin, end, first=first)
        if not blocks:
            return
        self._betons.fetch(self._betons.numbers(self._samples(blocks)))
        own = blocks[self._rank :: self._world]
        if self._one_machine and own:
            advise(self._betons.tables, self._samples(own), self._betons.label_limit, self._scratch)

    def _samples(self, blocks: list[tuple[int, int]]) -> np.ndarray:
        return self._betons.file_samples(np.concatenate([np.arange(first, first + count) for first, count in blocks]))


def count_bad(betons: BetonSet, samples: np.ndarray, rows: Rows) -> int:
    """Print the samples [B] of a filled batch whose image did not decode, and count them.

    Raises UserError for damage of another kind, with the file and the sample.
    """
    bad = np.flatnonzero(rows.status != OK)
    for row in bad:
        sample, status = int(samples[row]), rows.status[row]
        name, number, out = betons.name(sample), betons.number(sample), betons.owner(sample).source.out
        index = rows.positions[row] - betons.tables.first_rows[number]
        fix = f"run `preprocess verify {out}`, then the build-labels command again"
        if status == BAD_LABEL:
            _raise_label(betons, sample, int(rows.labels[row].max()), fix)
        if status == BAD_INDEX:
            raise UserError(f"{name} has the index {index}, which is no row of its shard", fix=fix)
        if status == BAD_TABLE:
            raise UserError(f"{name}: its table entry points outside the file", fix=fix)
        if status == BAD_READ:
            _raise_unread(betons, sample, fix)
        print(visible(f"bad image, excluded from the loss: {name}, index {index}"), flush=True)
    return len(bad)


def _raise_label(betons: BetonSet, sample: int, label: int, fix: str) -> None:
    array, name = betons.label_array(sample), betons.name(sample)
    if array:
        name, fix = f"{array}, made for {name},", f"remove {array}; the same command makes it again"
    raise UserError(f"{name} has the label {label}", allowed=f"0 to {betons.vocabulary - 1}, the head's width", fix=fix)


def _raise_unread(betons: BetonSet, sample: int, fix: str) -> None:
    """Say why a sample could not be read from its beton, tar or label array."""
    image_file = betons.image_file(sample)
    for path in (betons.paths[betons.number(sample)], image_file, betons.label_array(sample)):
        if path is not None and not path.is_file():
            raise UserError(f"{path} disappeared while it was in use", fix="put it back; the same command resumes")
    span = betons.span(sample)
    position = f"at byte {span.offset} (it has {os.fstat(span.file).st_size} bytes now)"
    reason = f"it was cut, or its disk fails; wanted for {betons.name(sample)}"
    raise UserError(f"{image_file} cannot be read {position}: {reason}", fix=fix)
