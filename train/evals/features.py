"""Features of a frozen encoder, extracted once for each encoder and data set, whatever protocols ask for them.

    places -> threads (train/data/inputs.py): bytes, pixels (pixels.py), uint8 batches -> device: normalise, encoder -> [N, W]

N samples, B batch, S image side, W feature width.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from labels.native import Decompressor, njit, tj_error, tj_header
from labels.settings import Features
from labels.storage import UserError, atomic_write, fingerprint
from train.data.decode import BOX, DONE, Crops, Window, decode_row, shrink_to_fill, shrunk
from train.data.inputs import feed_batches, stack_pinned
from train.data.order import flipped, random_crop
from train.encoders.encoder import Encoder, ImageForm
from train.evals.data.images import Images

# ---- pixels: Image bytes -> pixels, the same for every encoder. S image side.
#
# bytes -> PIL (RGB, alpha on white) -> shorter side to S, bicubic, centre crop -> uint8 [S, S, 3]
# plain JPEGs -> plain_jpeg.py: the same pixels within two levels, compiled


TRANSFORM = "RGB, alpha on white, shorter side to image_size (bicubic, antialiased: PIL's, for plain JPEGs within two levels), centre crop"
_JPEG_START = b"\xff\xd8"
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of RandomResizedCrop: shares of the area, width to height."""
DECODE_FAULTS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are no whole image."""


def decode(encoded: bytes, side: int) -> np.ndarray:
    """Image bytes of any kind that Pillow reads -> uint8 [S, S, 3]: shorter side to S, bicubic, centre crop.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: Pillow's own, for bytes that are no whole image.
    """
    plain = _plain_jpeg(encoded, side, None)
    if plain is not None:
        return plain
    with Image.open(BytesIO(encoded)) as image:
        image.draft(None, (2 * side, 2 * side))  # lets the JPEG decoder halve big images, never below twice the side
        rgb = _to_rgb(image)
    short = min(rgb.size)
    left, top = (rgb.width - short) / 2, (rgb.height - short) / 2
    return _resize(rgb, side, (left, top, left + short, top + short))


def decode_crop(encoded: bytes, side: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """The same with RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3) and a flip of one half: uint8 [S, S, 3].

    The crop is a function of (seed, epoch, index) alone.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: as for `decode`.
    """
    plain = _plain_jpeg(encoded, side, (seed, epoch, index))
    if plain is not None:
        return plain
    from train.data.order import flipped, random_crop  # compiled: only for those who augment

    with Image.open(BytesIO(encoded)) as image:
        rgb = _to_rgb(image)
    left, top, width, height = random_crop(rgb.width, rgb.height, CROP_SCALE, CROP_RATIO, seed, epoch, index)
    pixels = _resize(rgb, side, (left, top, left + width, top + height))
    return pixels[:, ::-1] if flipped(seed, epoch, index) else pixels


def _plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """As decode_plain_jpeg; None also for what is no JPEG, and where libturbojpeg is missing: Pillow gives these pixels
    slower.
    """
    if not encoded.startswith(_JPEG_START) or not _turbojpeg():
        return None

    return decode_plain_jpeg(encoded, side, crop)


@cache
def _turbojpeg() -> bool:
    from labels.native import load_turbojpeg

    try:
        load_turbojpeg()
    except UserError:
        return False
    return True


def _resize(rgb: Image.Image, side: int, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey keeps its high byte (Pillow would clip it), transparency is laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


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
    """images: uint8 [B, S, S, 3], on the CPU. numbers: int64 [B]. bad: numbers whose image cannot be decoded (black),
    with the reason.
    """

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
        """Features of every sample, in the data's order: float32 [N, W]. The encoder is moved to the device and left
        there.

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
        """Features of some rows, in their order, batch by batch: float32 [B, W] on the device; decoded ahead by
        threads.

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
        picture = lambda row: decoded_by(data.encoded[row].read(), side, row)  # noqa: E731
        for batch in decoded_batches(batches, side, picture, self.threads, self.device):
            bad += [f"{data.keys[row]} ({reason})" for row, reason in batch.bad]
            if bad:
                continue  # after the first bad image only the decoding goes on, to count the others
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                features = net(normalise(batch.images)).float()
            yield features
        if bad:
            rest = f" and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
            raise UserError(
                f"{len(bad)} of {len(rows)} images of {data.directory} cannot be decoded: {', '.join(bad[:_BAD_SHOWN])}{rest}",
                allowed="whole image files that Pillow reads",
                fix="fix or remove them: leaving them out here would make accuracies on other copies of the data differ",
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
                fix="probe an earlier checkpoint: the weights of this one have diverged",
            )
        if file:
            with atomic_write(file) as partial, open(partial, "wb") as stream:
                np.save(stream, features)
        return features


# ---- plain_jpeg: Plain JPEGs -> pixels, compiled and without the interpreter's lock: what Pillow gives, within two levels, at a third of the time.
#
# Everything that is not a healthy JPEG in grey or YCbCr is left to Pillow (pixels.py), from which the words of a fault come.
#
# S image side.


_UNFIT = -2
_MOST_PIXELS = 89_478_485  # Pillow warns beyond
_YCBCR, _GREY = 1, 2  # TJCS
_WARNING = 0
_CUBIC_REACH = 2.0


@njit
def _window(width: int, height: int, side: int, centre: bool, seed: int, epoch: int, index: int) -> Window:
    """The part of an image that Pillow's `resize((S, S), BICUBIC, box)` reads, and the box in it; shrunk by the decoder
    as `draft` does.
    """
    flip, shrink = False, 1
    if centre:
        shrink = shrink_to_fill(width, height, 2 * side)
        width, height = shrunk(width, shrink), shrunk(height, shrink)
        w = h = min(width, height)
        x, y = (width - w) / 2, (height - h) / 2
    else:
        left, top, w, h = random_crop(width, height, CROP_SCALE, CROP_RATIO, seed, epoch, index)
        x, y = float(left), float(top)
        flip = flipped(seed, epoch, index)
    across, down = _CUBIC_REACH * max(1.0, w / side), _CUBIC_REACH * max(1.0, h / side)
    first_column, first_row = max(0, math.floor(x - across)), max(0, math.floor(y - down))
    columns = min(width, math.ceil(x + w + across)) - first_column
    rows = min(height, math.ceil(y + h + down)) - first_row
    return Window(
        shrink, first_column, first_row, columns, rows, x - first_column, y - first_row, float(w), float(h), flip
    )


@njit(nogil=True, cache=True)
def _decode_plain(
    encoded: np.ndarray,
    side: int,
    centre: bool,
    seed: int,
    epoch: int,
    index: int,
    handle: int,
    scratch: np.ndarray,
    image: np.ndarray,
) -> int:
    """Fill `image`, uint8 [S, S, 3]; DONE, _UNFIT, or the bytes of scratch that are needed."""
    header, box = np.empty(4, np.int32), np.empty(BOX, np.float32)
    address, size, at = encoded.ctypes.data, len(encoded), header.ctypes.data
    if tj_header(handle, address, np.uint64(size), at, at + 4, at + 8, at + 12) != 0:
        return _UNFIT
    width, height = int(header[0]), int(header[1])
    if header[3] not in (_YCBCR, _GREY) or width * height > _MOST_PIXELS:
        return _UNFIT
    crops = Crops((1.0, 1.0), (1.0, 1.0), False, 0, side, centre, False)
    window = _window(width, height, side, centre, seed, epoch, index)
    found = decode_row(address, size, width, height, window, crops, handle, scratch, image, box)
    if found == DONE and tj_error(handle) == _WARNING:  # e.g. cut short: Pillow says what it thinks of it
        return _UNFIT
    return found if found >= DONE else _UNFIT


class _OfThread(threading.local):
    """What each thread decodes with: a TurboJPEG handle, and memory that grows with the largest image."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(1 << 20, np.uint8)


_own = _OfThread()


def decode_plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """Pixels, uint8 [S, S, 3], of a JPEG; None where Pillow has to decide.

    Args:
        side: S.
        crop: None for the central crop, or (seed, epoch, index) of a random resized crop with its flip.

    Raises:
        UserError: libturbojpeg is not installed.
    """
    own, image = _own, np.empty((side, side, 3), np.uint8)
    data, draw = np.frombuffer(encoded, np.uint8), crop or (0, 0, 0)
    while True:
        found = _decode_plain(data, side, crop is None, *draw, own.decompressor.handle, own.scratch, image)
        if found <= DONE:
            return image if found == DONE else None
        own.scratch = np.empty(found + found // 4, np.uint8)
