"""Images decoded ahead of the device by threads, batch by batch, in memory that is allocated once; and what a net takes of them.

    numbers -> threads: bytes, pixels -> ring of uint8 batches -> device: normalised

B batch, S image side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.evals.encoders.encoder import ImageForm
from train.evals.pixels import DECODE_FAULTS
from train.threads import Threads

_BATCHES_AHEAD = 3


class Normaliser:
    """uint8 [B, S, S, 3] on the CPU -> float32 [B, 3, S, S] on the device, less mean, divided by deviation."""

    def __init__(self, form: ImageForm, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in form[1:])

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return (pixels.float().div(255) - self._mean) / self._std


class Slot(NamedTuple):
    """A decoded batch, overwritten when the next one is taken.

    images: uint8 [B, S, S, 3]. numbers: int64 [B], what was asked for. bad: numbers whose image cannot be decoded, with the reason.
    copied: to be called when the device has been sent the images.
    """

    images: Tensor
    numbers: np.ndarray
    bad: list[tuple[int, str]]
    copied: Callable[[], None]


def decoded(
    batches: Iterable[np.ndarray], size: int, side: int, picture: Callable[[int], np.ndarray], threads: int, device: torch.device
) -> Iterator[Slot]:
    """Batches in order. Every thread fills a part of a batch; at most `_BATCHES_AHEAD` wait, so that memory is bounded.

    Args:
        batches: numbers of images, int64, at most `size` at a time.
        picture: a number -> uint8 [S, S, 3]; called in threads. What Pillow raises for it is noted in the slot.
        device: where the batches go; for a GPU their memory is page-locked.
    """
    pinned = device.type == "cuda"
    ring = deque(torch.empty((size, side, side, 3), dtype=torch.uint8, pin_memory=pinned) for _ in range(_BATCHES_AHEAD + 1))
    asked = iter(batches)
    waiting: deque[tuple[Tensor, np.ndarray, list[Future[list[tuple[int, str]]]]]] = deque()

    def fill(memory: np.ndarray, numbers: np.ndarray) -> list[tuple[int, str]]:
        faults = []
        for at, number in enumerate(numbers.tolist()):
            try:
                memory[at] = picture(number)
            except DECODE_FAULTS as error:
                faults.append((number, f"{type(error).__name__}: {error}"))
        return faults

    with Threads(threads, "decode") as pool:

        def submit() -> None:
            numbers = next(asked, None)
            if numbers is None:
                return
            memory = ring.popleft()
            bounds = np.linspace(0, len(numbers), min(threads, len(numbers)) + 1).astype(int)
            futures = [pool.submit(fill, memory.numpy()[low:high], numbers[low:high]) for low, high in pairwise(bounds)]
            waiting.append((memory, numbers, futures))

        for _ in range(_BATCHES_AHEAD):
            submit()
        while waiting:
            memory, numbers, futures = waiting.popleft()
            bad = [fault for future in futures for fault in future.result()]
            copied = torch.cuda.Event() if pinned else None
            yield Slot(memory[: len(numbers)], numbers, bad, copied.record if copied else lambda: None)
            if copied:
                copied.synchronize()  # else the threads would overwrite what the GPU has yet to copy
            ring.append(memory)
            submit()
