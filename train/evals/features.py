"""Features of a frozen encoder, extracted once for each encoder and data set, whatever protocols ask for them.

    places -> threads: bytes, pixels (pixels.py) -> ring of preallocated uint8 batches -> device: normalise, encoder -> [N, W]

N samples, B batch, S image side, W feature width.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labels.errors import UserError
from labels.files import fingerprint, whole_file
from labels.settings import Features
from train.evals.data.images import Images, Place
from train.evals.encoders.encoder import Encoder, ImageForm
from train.evals.pixels import DECODE_FAULTS, TRANSFORM, decode

_BATCHES_AHEAD = 3
_BAD_SHOWN = 5
Decode = Callable[[bytes, int, int], np.ndarray]
"""Encoded image, S, row of the data set -> uint8 [S, S, 3]."""


@dataclass(frozen=True)
class Extractor:
    """Gives features, and keeps them in `cache` under a fingerprint of encoder, data, transform and precision.

    device: where encoders run. settings: section `features`. cache: a folder, or None: nothing is kept.
    """

    device: torch.device
    settings: Features
    cache: Path | None = None

    def __call__(self, encoder: Encoder, data: Images) -> np.ndarray:
        """Features of every sample, in the data's order: float32 [N, W]. The encoder is moved to the device and left there.

        Raises:
            UserError: images that cannot be decoded (all are named or counted), or features that are not finite.
        """
        key = fingerprint([encoder.describe(), data.fingerprint, data.modified_ns, TRANSFORM, self.precision])
        file = self.cache / f"{key}.npy" if self.cache else None
        return np.load(file, allow_pickle=False) if file and file.is_file() else self._extract(encoder, data, file)

    @property
    def precision(self) -> str:
        """What encoders compute in: bf16 (autocast) or fp32; `auto` means bf16 on a GPU."""
        if self.settings.precision != "auto":
            return self.settings.precision
        return "bf16" if self.device.type == "cuda" else "fp32"

    def stream(self, encoder: Encoder, data: Images, rows: np.ndarray, decoded_by: Decode) -> Iterator[Tensor]:
        """Features of some rows, in their order, batch by batch: float32 [B, W] on the device; decoded ahead by threads.

        Args:
            rows: int [R], any order, also repeated.
            decoded_by: makes the pixels.

        Raises:
            UserError: images that cannot be decoded.
        """
        net, normalise = encoder.net.to(self.device), _Normaliser(encoder.images, self.device)
        threads = self.settings.threads or len(os.sched_getaffinity(0))
        bad: list[str] = []
        for slot in _decoded(data.places, rows, self.settings.batch_size, encoder.images.side, decoded_by, threads, self.device):
            bad += [f"{data.keys[row]} ({reason})" for row, reason in slot.bad]
            if bad:
                continue  # after the first bad image only the decoding goes on, to count the others
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                features = net(normalise(slot.images)).float()
            slot.copied()
            yield features
        if bad:
            rest = f" and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
            raise UserError(
                f"{len(bad)} of {len(rows)} images of {data.directory} cannot be decoded: {', '.join(bad[:_BAD_SHOWN])}{rest}",
                allowed="whole image files that Pillow reads",
                mend="mend or remove them: leaving them out here would make accuracies on other copies of the data differ",
            )

    def _extract(self, encoder: Encoder, data: Images, file: Path | None) -> np.ndarray:
        features = np.empty((len(data), encoder.width), np.float32)
        done = 0
        for found in self.stream(encoder, data, np.arange(len(data)), lambda encoded, side, row: decode(encoded, side)):
            features[done : done + len(found)] = found.cpu().numpy()
            done += len(found)
        if not np.isfinite(features).all():
            bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise UserError(
                f"the encoder {encoder.name!r} gives features that are not finite, first for {data.keys[bad]}",
                mend="probe an earlier checkpoint: the weights of this one have diverged",
            )
        if file:
            with whole_file(file) as partial, open(partial, "wb") as stream:
                np.save(stream, features)
        return features


class _Normaliser:
    """uint8 [B, S, S, 3] on the CPU -> float32 [B, 3, S, S] on the device, less mean, divided by deviation."""

    def __init__(self, form: ImageForm, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in form[1:])

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return (pixels.float().div(255) - self._mean) / self._std


class _Slot(NamedTuple):
    """A decoded batch [B, S, S, 3]; rows that cannot be decoded, with the reason; `copied` is called when the device has been sent it."""

    images: Tensor
    bad: list[tuple[int, str]]
    copied: Callable[[], None]


def _decoded(
    places: Sequence[Place], rows: np.ndarray, size: int, side: int, decoded_by: Decode, threads: int, device: torch.device
) -> Iterator[_Slot]:
    """Batches in order. Every thread fills a part of a batch; at most `_BATCHES_AHEAD` wait, so that memory is bounded."""
    pinned = device.type == "cuda"
    size = min(size, max(len(rows), 1))
    ring = deque(torch.empty((size, side, side, 3), dtype=torch.uint8, pin_memory=pinned) for _ in range(_BATCHES_AHEAD + 1))
    starts = iter(range(0, len(rows), size))
    waiting: deque[tuple[Tensor, int, list[Future[list[tuple[int, str]]]]]] = deque()

    def fill(memory: np.ndarray, batch: np.ndarray) -> list[tuple[int, str]]:
        faults = []
        for at, row in enumerate(batch):
            try:
                memory[at] = decoded_by(places[row].read(), side, int(row))
            except DECODE_FAULTS as error:
                faults.append((int(row), f"{type(error).__name__}: {error}"))
        return faults

    with ThreadPoolExecutor(threads, "decode") as pool:

        def submit() -> None:
            start = next(starts, None)
            if start is None:
                return
            memory, batch = ring.popleft(), rows[start : start + size]
            bounds = np.linspace(0, len(batch), min(threads, len(batch)) + 1).astype(int)
            parts = pairwise(bounds)
            futures = [pool.submit(fill, memory.numpy()[low:high], batch[low:high]) for low, high in parts]
            waiting.append((memory, len(batch), futures))

        for _ in range(_BATCHES_AHEAD):
            submit()
        while waiting:
            memory, count, futures = waiting.popleft()
            bad = [fault for future in futures for fault in future.result()]
            copied = torch.cuda.Event() if pinned else None
            yield _Slot(memory[:count], bad, copied.record if copied else lambda: None)
            if copied:
                copied.synchronize()  # else the threads would overwrite what the GPU has yet to copy
            ring.append(memory)
            submit()
