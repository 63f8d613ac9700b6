"""Feeds the trainer: uint8 images and padded label ids, nothing else.

    train/order.py (which samples) -> threads: train/decode.py (compiled) -> ring of preallocated batches -> the loop

B batch (of this rank), S image side, K label limit.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from labels.errors import UserError
from labels.settings import Data
from train import decode
from train.betons import BetonSet
from train.jpeg import Decompressor
from train.order import batch_samples


@dataclass(frozen=True)
class Batch:
    """One step's input. The tensors are overwritten when the next batch is taken.

    Attributes:
        images: uint8 [B, S, S, 3].
        label_ids: int32 [B, K], padded with PAD_ID.
        bad: samples whose JPEG did not decode; they are grey, without labels, and so without loss.
        copied: on a GPU, what tells that the copies have left this memory.
    """

    images: torch.Tensor
    label_ids: torch.Tensor
    bad: int
    copied: torch.cuda.Event | None = None

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and label ids on `device`; from page-locked memory the copies run behind the caller's back."""
        images, label_ids = self.images.to(device, non_blocking=True), self.label_ids.to(device, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return images, label_ids


class _Slot:
    """Preallocated memory for one batch: as tensors for the loop, as arrays for compiled code."""

    def __init__(self, batch: int, size: int, limit: int, pinned: bool) -> None:
        self.images = torch.empty((batch, size, size, 3), dtype=torch.uint8, pin_memory=pinned)
        self.label_ids = torch.empty((batch, limit), dtype=torch.int32, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None
        self.rows = decode.Rows(self.images.numpy(), self.label_ids.numpy(), np.empty(batch, np.int64), np.empty(batch, np.uint8))


class _Worker:
    """What one thread keeps: its JPEG decoder and scratch memory, which grows to the largest image met."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(1 << 20, np.uint8)


class Loader:
    """Iterates over the batches of steps first_step, first_step + 1, ... last_step - 1; use it in a `with` block.

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
    """

    def __init__(
        self, betons: BetonSet, settings: Data, *, image_size: int, batch_size: int, seed: int, first_step: int, last_step: int,
        rank: int = 0, world: int = 1, threads: int = 1, pinned: bool = False,
    ) -> None:  # fmt: skip
        self._betons, self._seed = betons, seed
        low, high = settings.crop_scale
        narrow, wide = settings.crop_ratio
        self._crops = decode.Crops((low, high), (narrow, wide), settings.flip, seed)
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._steps = iter(range(first_step, last_step))
        share = batch_size // world
        # One slot is with the loop while the others are being filled.
        slots = min(settings.prefetch_batches, max(last_step - first_step, 1)) + 1
        self._free = deque(_Slot(share, image_size, betons.label_limit, pinned) for _ in range(slots))
        self._filling: deque[tuple[_Slot, np.ndarray, list[Future[None]]]] = deque()
        self._workers = deque(_Worker() for _ in range(threads))
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._bounds = np.linspace(0, share, min(threads, share) + 1).astype(int)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while len(self._free) > 1 and self._submit():
            pass
        while self._filling:
            slot, samples, futures = self._filling.popleft()
            for future in futures:
                future.result()
            yield Batch(slot.images, slot.label_ids, self._check(slot, samples), slot.copied)
            if slot.copied is not None:
                slot.copied.synchronize()  # else the threads would overwrite what the GPU has yet to copy
            self._free.append(slot)
            self._submit()

    def _submit(self) -> bool:
        """Let the threads begin the next step's batch; False when there is none."""
        step = next(self._steps, None)
        if step is None:
            return False
        slot = self._free.popleft()
        samples, epochs = batch_samples(step, self._batch_size, self._rank, self._world, self._betons.samples, self._seed)
        parts = zip(self._bounds[:-1], self._bounds[1:], strict=True)
        futures = [self._pool.submit(self._fill, slot, samples, epochs, int(begin), int(end)) for begin, end in parts]
        self._filling.append((slot, samples, futures))
        return True

    def _fill(self, slot: _Slot, samples: np.ndarray, epochs: np.ndarray, begin: int, end: int) -> None:
        worker = self._workers.popleft()  # as many workers as threads: there is always one
        try:
            while needed := decode.load_rows(
                self._betons.tables, samples, epochs, begin, end, self._crops, self._betons.vocabulary,
                worker.decompressor.handle, worker.scratch, slot.rows,
            ):  # fmt: skip
                worker.scratch = np.empty(needed, np.uint8)
        finally:
            self._workers.append(worker)

    def _check(self, slot: _Slot, samples: np.ndarray) -> int:
        """Number of bad images in a batch; damage of another kind is an error that names the sample."""
        if not slot.rows.status.any():
            return 0
        for row in np.flatnonzero(slot.rows.status):
            name = self._betons.name(int(samples[row]))
            mend = f"run `preprocess verify {self._betons.out}`, then the build-labels command again"
            if slot.rows.status[row] == decode.BAD_LABEL:
                worst, array = int(slot.label_ids[row].max()), self._betons.label_array(int(samples[row]))
                if array:
                    name, mend = f"{array}, made for {name},", f"remove {array}; the same command makes it anew"
                raise UserError(f"{name} has the label {worst}", allowed=f"0 to {self._betons.vocabulary - 1}, the head's width", mend=mend)
            if slot.rows.status[row] == decode.BAD_INDEX:
                raise UserError(f"{name} has the index {slot.rows.indices[row]}, which is no row of its shard", mend=mend)
            if slot.rows.status[row] == decode.BAD_TABLE:
                raise UserError(f"{name}: its table entry points outside the file", mend=mend)
            print(f"bad image, left out of the loss: {name}, index {slot.rows.indices[row]}", flush=True)
        return int(np.count_nonzero(slot.rows.status))
