"""What the loader hands over, and the preallocated memory behind it.

B batch (of this rank), S image side, H x W canvas, K label limit.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from train.data.decode import Rows
from train.pixels import BOX


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
    """Memory for one batch: as tensors for the loop, as arrays for compiled code. Canvases take more of it when they have to."""

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
        self.rows = Rows(self._images.numpy(), self._boxes.numpy(), self._label_ids.numpy(), self._positions, self._status)

    @property
    def bytes(self) -> int:
        return self._pixels.nbytes + self._label_ids.nbytes

    def batch(self, bad: int) -> Batch:
        """What it holds now, for the loop."""
        boxes = self._boxes if self._device else None
        return Batch(self._images, boxes, self._label_ids, self._positions, self.epochs, bad, self.copied)


class Ring:
    """Slots for batches decoded ahead: as many as `room` bytes hold of the largest, canvases counted as they are; two at least.

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
        """The loop is done with it. Slots that have grown beyond the room are dropped as they come, others made while there is room."""
        wanted = min(max(self._room // max(one.bytes for one in self._slots), 2), self._most)
        if len(self._slots) > wanted:
            self._slots.remove(slot)
            return
        self.free.append(slot)
        new = [self._make() for _ in range(wanted - len(self._slots))]
        self._slots += new
        self.free += new
