"""Features of a frozen encoder, extracted once for each encoder and data set, whatever protocols ask for them.

    places -> threads (train/data/feeder.py): bytes, pixels (pixels.py), uint8 batches -> device: normalise, encoder -> [N, W]

N samples, B batch, S image side, W feature width.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labels.errors import UserError
from labels.settings import Features
from labels.storage import fingerprint, whole_file
from train.data.feeder import feed_batches, stack_pinned
from train.encoders.encoder import Encoder, ImageForm
from train.evals.data.images import Images
from train.evals.pixels import DECODE_FAULTS, TRANSFORM, decode

_BAD_SHOWN = 5
Decode = Callable[[bytes, int, int], np.ndarray]
"""Encoded image, S, row of the data set -> uint8 [S, S, 3]."""


class Normaliser:
    """uint8 [B, S, S, 3] on the CPU -> float32 [B, 3, S, S] on the device, less mean, divided by deviation."""

    def __init__(self, form: ImageForm, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in form[1:])

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return (pixels.float().div(255) - self._mean) / self._std


class DecodedBatch(NamedTuple):
    """images: uint8 [B, S, S, 3], on the CPU. numbers: int64 [B]. bad: numbers whose image cannot be decoded (black), with the reason."""

    images: Tensor
    numbers: np.ndarray
    bad: list[tuple[int, str]]


def decoded_batches(
    batches: Iterable[np.ndarray], side: int, picture: Callable[[int], np.ndarray], threads: int, device: torch.device
) -> Iterator[DecodedBatch]:
    """Images decoded ahead by threads, in order.

    Args:
        batches: numbers of images, int64 [B].
        side: S.
        picture: a number -> uint8 [S, S, 3]; called in threads. What Pillow raises for it is noted in the batch.
        device: where the batches go.
    """

    def sample(number: int) -> np.ndarray | str:
        try:
            return picture(number)
        except DECODE_FAULTS as error:
            return f"{type(error).__name__}: {error}"

    def collate(numbers: np.ndarray, samples: list[np.ndarray | str]) -> DecodedBatch:
        black = np.zeros((side, side, 3), np.uint8)
        images = stack_pinned([black if isinstance(found, str) else found for found in samples], device)
        bad = [(int(number), found) for number, found in zip(numbers, samples, strict=True) if isinstance(found, str)]
        return DecodedBatch(images, numbers, bad)

    return feed_batches(batches, sample, collate, threads)


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

    @property
    def threads(self) -> int:
        """How many threads decode."""
        return self.settings.threads or len(os.sched_getaffinity(0))

    def stream(self, encoder: Encoder, data: Images, rows: np.ndarray, decoded_by: Decode) -> Iterator[Tensor]:
        """Features of some rows, in their order, batch by batch: float32 [B, W] on the device; decoded ahead by threads.

        Args:
            rows: int [R], any order, also repeated.
            decoded_by: makes the pixels.

        Raises:
            UserError: images that cannot be decoded.
        """
        net, normalise = encoder.net.to(self.device), Normaliser(encoder.images, self.device)
        side, size = encoder.images.side, min(self.settings.batch_size, max(len(rows), 1))
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        bad: list[str] = []
        picture = lambda row: decoded_by(data.places[row].read(), side, row)  # noqa: E731
        for batch in decoded_batches(batches, side, picture, self.threads, self.device):
            bad += [f"{data.keys[row]} ({reason})" for row, reason in batch.bad]
            if bad:
                continue  # after the first bad image only the decoding goes on, to count the others
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                features = net(normalise(batch.images)).float()
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
