"""Feeds the trainer: uint8 images and padded label ids, nothing else.

    train/data/order.py (which samples) -> threads: train/data/decode.py (compiled) -> ring of preallocated batches -> the loop
                                  \\-> one thread: train/data/loader.py (the disk)

B batch (of this rank), S image side, K label limit.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import torch

from labels.native import Decompressor
from labels.settings import Data
from labels.storage import UserError
from train.data import decode
from train.data.dataset import BetonSet
from train.data.decode import BOX, Crops, Rows
from train.data.files import Threads
from train.data.image_index import BAD_INDEX, BAD_LABEL, BAD_READ, BAD_TABLE, OK, TABLE_BYTES, advise
from train.data.order import Order

# ---- ahead: Reads ahead of the loader: blocks are asked for a whole window before their samples come, so that disks
# read in long stretches.
#
# On one machine only: of many, each would read all blocks for its part of their samples.


_MOST_WAITING = 64


class Ahead:
    """One thread beside the decoding ones; use it in a `with` block.

    Args:
        betons: the set.
        order: of its samples.
        rank, world: this process among all; the ranks of one machine share the work.
    """

    def __init__(self, betons: BetonSet, order: Order, rank: int, world: int) -> None:
        self._betons, self._order = betons, order
        self._one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) >= world
        self._rank, self._world = rank, world
        self._pool = Threads(1, "ahead")
        self._waiting: deque[Future[None]] = deque()
        self._scratch = np.empty(TABLE_BYTES, np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def follow(self, begin: int, end: int, *, first: bool) -> None:
        """The loader now takes the positions [begin, end): read what comes a window later; `first`, what comes until
        then too.

        Raises:
            UserError: a file is gone, cut, or cannot be fetched.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._read, begin, end, first))

    def _read(self, begin: int, end: int, first: bool) -> None:
        blocks = self._order.readahead(begin, end, first=first)
        if not blocks:
            return
        self._betons.bring(self._betons.numbers(self._samples(blocks)))
        own = blocks[self._rank :: self._world]
        if self._one_machine and own:
            advise(self._betons.tables, self._samples(own), self._betons.label_limit, self._scratch)

    def _samples(self, blocks: list[tuple[int, int]]) -> np.ndarray:
        return self._betons.chosen(np.concatenate([np.arange(first, first + count) for first, count in blocks]))


# ---- batch: What the loader hands over, and the preallocated memory behind it.
#
# B batch (of this rank), S image side, H x W canvas, K label limit.


@dataclass(frozen=True)
class Batch:
    """One step's input. Tensors and arrays are overwritten when the next batch is taken.

    Attributes:
        images: uint8 [B, S, S, 3]; where the device resamples, [B, H, W, 3].
        boxes: where the device resamples, float32 [B, BOX]: the crops in the canvases; otherwise None.
        label_ids: int32 [B, K], padded with PAD_ID.
        positions, epochs: int64 [B], what augmentations of a sample depend on beside the seed.
        bad: samples whose JPEG did not decode; they are grey, without labels, and so without loss.
        copied: on a GPU, what tells that the copies have left this memory.
    """

    images: torch.Tensor
    boxes: torch.Tensor | None
    label_ids: torch.Tensor
    positions: np.ndarray
    epochs: np.ndarray
    bad: int
    copied: torch.cuda.Event | None = None

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images, label ids and boxes on `device`; from page-locked memory the copies run behind the caller's back."""
        images, label_ids = self.images.to(device, non_blocking=True), self.label_ids.to(device, non_blocking=True)
        boxes = None if self.boxes is None else self.boxes.to(device, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return images, label_ids, boxes


class Slot:
    """Memory for one batch: as tensors for the loop, as arrays for compiled code. Canvases take more of it when they
    have to.
    """

    def __init__(self, batch: int, size: int, limit: int, pinned: bool, device: bool) -> None:
        self._pixels = torch.empty(batch * size * size * 3, dtype=torch.uint8, pin_memory=pinned)
        self._boxes = torch.empty((batch, BOX), dtype=torch.float32, pin_memory=pinned)
        self._label_ids = torch.empty((batch, limit), dtype=torch.int32, pin_memory=pinned)
        self._positions, self._status = np.empty(batch, np.int64), np.empty(batch, np.uint8)
        self._device = device
        self.epochs = np.empty(batch, np.int64)
        self.copied = torch.cuda.Event() if pinned else None
        self.fit(size, size)

    def fit(self, rows: int, columns: int) -> None:
        """Make images of rows x columns pixels of the memory."""
        batch, needed = len(self._status), len(self._status) * rows * columns * 3
        if needed > len(self._pixels):
            self._pixels = torch.empty(needed, dtype=torch.uint8, pin_memory=self._pixels.is_pinned())
        self._images = self._pixels[:needed].view(batch, rows, columns, 3)
        self.rows = Rows(
            self._images.numpy(), self._boxes.numpy(), self._label_ids.numpy(), self._positions, self._status
        )

    @property
    def bytes(self) -> int:
        return self._pixels.nbytes + self._label_ids.nbytes

    def batch(self, bad: int) -> Batch:
        """What it holds now, for the loop."""
        boxes = self._boxes if self._device else None
        return Batch(self._images, boxes, self._label_ids, self._positions, self.epochs, bad, self.copied)


class Ring:
    """Slots for batches decoded ahead: as many as `room` bytes hold of the largest, canvases counted as they are; two
    at least.

    Args:
        make: a new slot.
        room: bytes.
        most: no more slots than that.

    Attributes:
        free: slots to be filled next.
    """

    def __init__(self, make: Callable[[], Slot], room: int, most: int) -> None:
        self._make, self._room, self._most = make, room, max(most, 2)
        self._slots = [make(), make()]  # how large they get, the first batch shows
        self.free = deque(self._slots)

    def give_back(self, slot: Slot) -> None:
        """The loop is done with it. Slots that have grown beyond the room are dropped as they come, others made while
        there is room.
        """
        wanted = min(max(self._room // max(one.bytes for one in self._slots), 2), self._most)
        if len(self._slots) > wanted:
            self._slots.remove(slot)
            return
        self.free.append(slot)
        new = [self._make() for _ in range(wanted - len(self._slots))]
        self._slots += new
        self.free += new


# ---- faults: What is wrong with samples that did not load: damage is an error that names the file; a bad JPEG is told
# and left out of the loss.


def count_bad(betons: BetonSet, samples: np.ndarray, rows: Rows) -> int:
    """Number of bad images in a batch, each told in a line.

    Args:
        betons: the set.
        samples: int64 [B], the batch's sample numbers.
        rows: the batch, filled.

    Raises:
        UserError: damage of another kind; names the file and the sample.
    """
    bad = np.flatnonzero(rows.status != OK)
    for row in bad:
        sample, status = int(samples[row]), int(rows.status[row])
        if status == BAD_LABEL:
            _raise_label(betons, sample, int(rows.labels[row].max()))
        opened = betons.owner(sample)
        index = rows.positions[row] - betons.tables.first_rows[betons.number(sample)]
        fix = f"run `preprocess verify {opened.source.out}`, then the build-labels command again"
        if status == BAD_INDEX:
            raise UserError(f"{betons.name(sample)} has the index {index}, which is no row of its shard", fix=fix)
        if status == BAD_TABLE:
            raise UserError(f"{betons.name(sample)}: its table entry points outside the file", fix=fix)
        if status == BAD_READ:
            _raise_unread(betons, sample, fix)
        print(f"bad image, left out of the loss: {betons.name(sample)}, index {index}", flush=True)
    return len(bad)


def _raise_label(betons: BetonSet, sample: int, label: int) -> None:
    array, name = betons.label_array(sample), betons.name(sample)
    fix = f"run `preprocess verify {betons.owner(sample).source.out}`, then the build-labels command again"
    if array:
        name, fix = f"{array}, made for {name},", f"remove {array}; the same command makes it again"
    raise UserError(f"{name} has the label {label}", allowed=f"0 to {betons.vocabulary - 1}, the head's width", fix=fix)


def _raise_unread(betons: BetonSet, sample: int, fix: str) -> None:
    """Say why a sample could not be read: of its beton or tar, or of its label array."""
    for path in (betons.paths[betons.number(sample)], betons.image_file(sample), betons.label_array(sample)):
        if path is not None and not path.is_file():
            raise UserError(f"{path} disappeared while it was in use", fix="put it back; the same command goes on")
    span = betons.span(sample)
    size = os.fstat(span.file).st_size
    raise UserError(
        f"{betons.image_file(sample)} cannot be read at byte {span.offset} (it has {size} bytes now): it was cut, or its disk fails; "
        f"wanted for {betons.name(sample)}",
        fix=fix,
    )


_FIRST_SCRATCH_BYTES = 1 << 20
# More would smooth nothing further, and of small batches the first gigabyte takes the processor from the training for
# many seconds.
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
    """Iterates over the batches of steps first_step, first_step + 1, ... last_step - 1, each time again.

    Its threads end with the iterator: when it is exhausted, when it is dropped after a `break`, and at the latest with
        the loader's
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
        device: leave crops as the decoder gives them, to be resampled by train/data/inputs.py; else they are resampled
            here.
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
    ) -> None:
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            Ahead(self._betons, self.order, self._rank, self._world) as ahead,
            Threads(self._threads, "decode") as pool,
        ):

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
        return Slot(
            self._batch_size // self._world, self._image_size, self._betons.label_limit, self._pinned, self.crops.device
        )

    def _submit(
        self, step: int, slot: Slot, pool: ThreadPoolExecutor, workers: deque[_Worker], ahead: Ahead
    ) -> _Filling:
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
                slot.fit(
                    *decode.canvas_shape(
                        self._betons.tables, samples, epochs, self._betons.label_limit, self.crops, scratch
                    )
                )
        bounds = np.linspace(0, len(samples), min(self._threads, len(samples)) + 1).astype(int).tolist()
        parts = pairwise(bounds)
        return [pool.submit(self._fill, workers, slot, samples, epochs, *part) for part in parts]

    def _fill(
        self, workers: deque[_Worker], slot: Slot, samples: np.ndarray, epochs: np.ndarray, begin: int, end: int
    ) -> None:
        worker = workers.popleft()  # as many workers as threads: there is always one
        try:
            with self._betons.held(samples[begin:end]):
                while needed := decode.load_rows(
                    self._betons.tables,
                    samples,
                    epochs,
                    begin,
                    end,
                    self.crops,
                    self._betons.vocabulary,
                    worker.decompressor.handle,
                    worker.scratch,
                    slot.rows,
                ):
                    worker.scratch = np.empty(needed, np.uint8)
        finally:
            workers.append(worker)
