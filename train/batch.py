"""What the loader hands over, and the preallocated memory behind it.

B batch (of this rank), S image side, K label limit.
"""

from dataclasses import dataclass

import numpy as np
import torch

from train.decode import Rows


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


class Slot:
    """Memory for one batch: as tensors for the loop, as arrays for compiled code."""

    def __init__(self, batch: int, size: int, limit: int, pinned: bool) -> None:
        self.images = torch.empty((batch, size, size, 3), dtype=torch.uint8, pin_memory=pinned)
        self.label_ids = torch.empty((batch, limit), dtype=torch.int32, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None
        self.rows = Rows(self.images.numpy(), self.label_ids.numpy(), np.empty(batch, np.int64), np.empty(batch, np.uint8))

    @property
    def bytes(self) -> int:
        return self.images.nbytes + self.label_ids.nbytes

    def batch(self, bad: int) -> Batch:
        """What it holds now, for the loop."""
        return Batch(self.images, self.label_ids, bad, self.copied)
