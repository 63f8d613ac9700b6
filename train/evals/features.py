"""Features of a frozen encoder, extracted once for each encoder and part of a data set, for all protocols.

    Images -> threads: bytes, `decode` -> uint8 batches [B, S, S, 3] -> device: Normaliser, encoder -> [N, W] -> cache

The pixels are the same for every encoder: RGB with alpha on white, shorter side to S (bicubic), centre crop; or, for
recipes with augmentation, a random resized crop. Healthy grey and YCbCr JPEGs are decoded by compiled code without the
interpreter's lock, within two levels of Pillow's pixels and in a third of the time; all else goes to Pillow, whose
messages name the faults. N samples, B batch, S image side, W feature width.
"""

import math
import os
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from labels.image_metadata import decode_leniently
from labels.native import Decompressor, load_turbojpeg, njit, tj_error, tj_header
from labels.settings import Features
from labels.storage import UserError, atomic_write, fingerprint
from train.data.decode import BOX, DONE, Crops, Window, decode_row, shrink_to_fill, shrunk
from train.data.inputs import feed_batches, stack_pinned
from train.data.order import flipped, random_crop
from train.encoders.encoder import Encoder, ImageForm
from train.evals.data.images import Images

# A part of the caches' keys: a change of the pixels changes it.
TRANSFORM = (
    "RGB, alpha on white, shorter side to image_size (bicubic, antialiased: PIL's, for plain JPEGs within two levels), "
    "centre crop"
)
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of RandomResizedCrop: shares of the area, width to height
# Pillow's, for bytes of no whole image
_FORM_FAULTS = (ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)
DECODE_FAULTS = (OSError, *_FORM_FAULTS, Image.DecompressionBombError)
Decode = Callable[[bytes, int, int], np.ndarray]  # encoded image, S, row of the data set -> uint8 [S, S, 3]
_BAD_SHOWN = 5


@dataclass(frozen=True)
class Extractor:
    """Gives features, and keeps them in `cache` under a fingerprint of encoder, images, transform and precision.

    Classes and captions are no part of it: tasks over the same images share the features.
    """

    device: torch.device  # where encoders run
    settings: Features
    cache: Path | None = None  # a folder, or None: nothing is kept

    def __call__(self, encoder: Encoder, data: Images) -> np.ndarray:
        """Features of every sample, in the data's order: float32 [N, W]. Moves the encoder to the device.

        Raises UserError for images that cannot be decoded, and for features that are not finite.
        """
        key = fingerprint([encoder.describe(), data.image_fingerprint, data.state, TRANSFORM, self.precision])
        file = self.cache / f"{key}.npy" if self.cache else None
        if file and file.is_file():
            return np.load(file, allow_pickle=False)
        features = self._extract(encoder, data)
        if file:
            with atomic_write(file) as partial, open(partial, "wb") as stream:
                np.save(stream, features)
        return features

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

    def stream(self, encoder: Encoder, data: Images, rows: np.ndarray, decode: Decode) -> Iterator[Tensor]:
        """Features of `rows`, int [R] in any order, batch by batch: float32 [B, W] on the device; decoded ahead."""
        net, normalise = encoder.net.to(self.device), Normaliser(encoder.images, self.device)
        side, size = encoder.images.side, min(self.settings.batch_size, max(len(rows), 1))
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        bad: list[str] = []

        def image_of(row: int) -> np.ndarray:
            return decode(data.encoded[row].read(), side, row)

        for batch in decoded_batches(batches, side, image_of, self.threads, self.device):
            bad += [f"{data.locate(row)} ({reason})" for row, reason in batch.bad]
            if bad:
                continue  # after the first bad image only decode, to count the others
            with torch.inference_mode(), autocast:
                features = net(normalise(batch.images)).float()
            yield features
        if bad:
            first = ", ".join(bad[:_BAD_SHOWN]) + (
                f" and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
            )
            raise UserError(
                f"{len(bad)} of {len(rows)} images of the {data.part} part cannot be decoded: {first}",
                allowed="whole image files that Pillow reads",
                fix="fix or remove them: if they were skipped, accuracies on other copies of the data would differ",
            )

    def _extract(self, encoder: Encoder, data: Images) -> np.ndarray:
        features = np.empty((len(data), encoder.width), np.float32)
        done = 0
        for batch in self.stream(encoder, data, np.arange(len(data)), lambda encoded, side, row: decode(encoded, side)):
            features[done : done + len(batch)] = batch.cpu().numpy()
            done += len(batch)
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            key = data.keys[int(np.argmin(finite))]
            raise UserError(
                f"the encoder {encoder.name!r} gives features that are not finite, first for {key}",
                fix="probe an earlier checkpoint: the weights of this one have diverged",
            )
        return features


class Normaliser:
    """uint8 [B, S, S, 3] on the CPU -> float32 [B, 3, S, S] on the device, less mean, divided by deviation."""

    def __init__(self, form: ImageForm, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in form[1:])

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return (pixels.float().div(255) - self._mean) / self._std


class DecodedBatch(NamedTuple):
    """Decoded images; those that cannot be decoded are black and listed in `bad`."""

    images: Tensor  # uint8 [B, S, S, 3], on the CPU
    numbers: np.ndarray  # int64 [B]
    bad: list[tuple[int, str]]  # number, reason


def decoded_batches(
    batches: Iterable[np.ndarray], side: int, image_of: Callable[[int], np.ndarray], threads: int, device: torch.device
) -> Iterator[DecodedBatch]:
    """Batches of images decoded ahead by threads, in order; at the end prints how many odd images were among them.

    `batches`: numbers of images, int64 [B]; `image_of`: a number -> uint8 [S, S, 3], called in threads (what Pillow
    raises goes into `bad`); `device`: where the batches go later.
    """

    odd: defaultdict[str, set[int]] = defaultdict(set)

    def sample(number: int) -> np.ndarray | str:
        _oddities.found = ()
        try:
            image = image_of(number)
        except DECODE_FAULTS as error:
            return f"{type(error).__name__}: {error}"
        for oddity in _oddities.found:
            odd[oddity].add(number)
        return image

    def collate(numbers: np.ndarray, samples: list[np.ndarray | str]) -> DecodedBatch:
        black = np.zeros((side, side, 3), np.uint8)
        images = stack_pinned([black if isinstance(image, str) else image for image in samples], device)
        bad = [(int(number), image) for number, image in zip(numbers, samples, strict=True) if isinstance(image, str)]
        return DecodedBatch(images, numbers, bad)

    try:
        yield from feed_batches(batches, sample, collate, threads)
    finally:
        for oddity, numbers in sorted(odd.items()):
            print(f"images decoded with {oddity}: {len(numbers):,}", flush=True)


# -- pixels


class _Oddities(threading.local):
    """What Pillow would warn of in the image that a thread has decoded last."""

    found: tuple[str, ...] = ()


_oddities = _Oddities()


def decode(encoded: bytes, side: int) -> np.ndarray:
    """Image bytes of any kind that Pillow reads -> uint8 [S, S, 3]: shorter side to S, bicubic, centre crop.

    Raises DECODE_FAULTS.
    """
    pixels = _plain_jpeg(encoded, side, None)
    if pixels is not None:
        return pixels
    # The draft lets the JPEG decoder halve big images, never below twice the side.
    rgb = _decode_rgb(encoded, (2 * side, 2 * side))
    short = min(rgb.size)
    left, top = (rgb.width - short) / 2, (rgb.height - short) / 2
    return _resize(rgb, side, (left, top, left + short, top + short))


def decode_crop(encoded: bytes, side: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """`decode` with RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3), half of the images flipped: uint8 [S, S, 3].

    The crop is a function of (seed, epoch, index) alone.
    """
    pixels = _plain_jpeg(encoded, side, (seed, epoch, index))
    if pixels is not None:
        return pixels
    rgb = _decode_rgb(encoded, None)
    left, top, width, height = random_crop(rgb.width, rgb.height, CROP_SCALE, CROP_RATIO, seed, epoch, index)
    pixels = _resize(rgb, side, (left, top, left + width, top + height))
    return pixels[:, ::-1] if flipped(seed, epoch, index) else pixels


def _plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """As decode_plain_jpeg; None also for other formats, and without libturbojpeg: Pillow is a slower replacement."""
    if not encoded.startswith(b"\xff\xd8") or not _has_turbojpeg():
        return None
    return decode_plain_jpeg(encoded, side, crop)


@cache
def _has_turbojpeg() -> bool:
    try:
        load_turbojpeg()
    except UserError:
        return False
    return True


def _decode_rgb(encoded: bytes, draft: tuple[int, int] | None) -> Image.Image:
    """By Pillow, as 8-bit RGB that has not been turned; a JPEG not below the size `draft`."""

    def decoded(image: Image.Image, _: int) -> tuple[Image.Image, int]:
        pixels = image.width * image.height
        if draft:
            image.draft(None, draft)
        return _to_rgb(image), pixels

    (rgb, pixels), damaged = decode_leniently(encoded, decoded)
    large = pixels > (Image.MAX_IMAGE_PIXELS or pixels)
    _oddities.found = ("damaged metadata",) * damaged + (f"more than {Image.MAX_IMAGE_PIXELS:,} pixels",) * large
    return rgb


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


# -- plain JPEGs, compiled

_UNFIT, _NO_HEADER = -2, -3
_MOST_PIXELS = 89_478_485  # Pillow warns beyond
_YCBCR, _GREY = 1, 2  # TJCS
_WARNING = 0
_CUBIC_REACH = 2.0


class _ThreadMemory(threading.local):
    """What each thread decodes with: a TurboJPEG handle, and memory that grows with the largest image."""

    def __init__(self) -> None:
        self.decompressor, self.scratch = Decompressor(), np.empty(1 << 20, np.uint8)


_memory = _ThreadMemory()


def decode_plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """Pixels, uint8 [S, S, 3], of a JPEG; None where Pillow has to decide.

    `crop`: None for the central crop, or (seed, epoch, index) of a random resized crop with its flip.
    """
    memory, image = _memory, np.empty((side, side, 3), np.uint8)
    data, draw = np.frombuffer(encoded, np.uint8), crop or (0, 0, 0)
    while True:
        status = _decode_plain(data, side, crop is None, *draw, memory.decompressor.handle, memory.scratch, image)
        if status == _NO_HEADER:  # a handle decodes nothing more after that
            memory.decompressor = Decompressor()
        if status <= DONE:
            return image if status == DONE else None
        memory.scratch = np.empty(status + status // 4, np.uint8)


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
    """Fill `image`, uint8 [S, S, 3]; DONE, _UNFIT, _NO_HEADER, or the bytes of scratch that are needed."""
    header, box = np.empty(4, np.int32), np.empty(BOX, np.float32)
    data, size, fields = encoded.ctypes.data, len(encoded), header.ctypes.data
    if tj_header(handle, data, np.uint64(size), fields, fields + 4, fields + 8, fields + 12) != 0:
        return _NO_HEADER
    width, height = int(header[0]), int(header[1])
    if header[3] not in (_YCBCR, _GREY) or width * height > _MOST_PIXELS:
        return _UNFIT
    crops = Crops((1.0, 1.0), (1.0, 1.0), False, 0, side, centre, False)
    window = _window(width, height, side, centre, seed, epoch, index)
    status = decode_row(data, size, width, height, window, crops, handle, scratch, image, box)
    if status == DONE and tj_error(handle) == _WARNING:  # e.g. cut short: Pillow decides
        return _UNFIT
    return status if status >= DONE else _UNFIT


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
    x, y = x - first_column, y - first_row
    return Window(shrink, first_column, first_row, columns, rows, x, y, float(w), float(h), flip)
