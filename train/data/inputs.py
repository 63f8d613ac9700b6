"""From the loader's batch to what the model takes: on the device, resampled if the loader left that, jittered,
normalised.

B batch (of this rank), S image side, K label limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from labels.manifest import PAD_ID
from labels.native import njit
from labels.settings import Data, Train
from train.data.crops import uniform
from train.data.loader import Batch
from train.distributed import World

# ---- canvas: Crops of a batch, as the decoder left them, to S x S: PIL's antialiased bicubic as two batched matrix
# products, on any device.
#
# B batch, H x W canvas, S image side.


_AT_ONCE_BYTES = 1 << 28  # of float32 canvases
_REACH = 2.0
_TF32_MASK = ~0x1FFF  # of a float32's bits: what TF32 keeps


@torch.no_grad()
def resample_canvas(canvas: torch.Tensor, boxes: torch.Tensor, vertical_first: np.ndarray, size: int) -> torch.Tensor:
    """Resample each crop.

    Args:
        canvas: uint8 [B, H, W, 3].
        boxes: float32 [B, BOX] (train/data/decode.py), on the same device.
        vertical_first: bool [B], in the host's memory: which pass comes first; PIL rounds to 8 bits between them.
        size: S.

    Returns:
        float32 [B, 3, S, S], whole numbers from 0 to 255.
    """
    out = torch.empty((len(canvas), 3, size, size), device=canvas.device)
    at_once = max(1, _AT_ONCE_BYTES // (4 * canvas[0].numel()))
    for vertical in (False, True):
        rows = torch.from_numpy(np.flatnonzero(vertical_first == vertical))
        for part in rows.to(canvas.device, non_blocking=True).split(at_once):
            out[part] = _resample(canvas[part], boxes[part], vertical, size)
    return out


def _resample(canvas: torch.Tensor, boxes: torch.Tensor, vertical_first: bool, size: int) -> torch.Tensor:
    x, y, width, height, left, top, columns, rows, flip = boxes.unbind(1)
    across = interpolation(x, width, left, columns, size, canvas.shape[2])  # [B, S, W]
    across = torch.where(flip.bool()[:, None, None], across.flip(1), across)
    down = interpolation(y, height, top, rows, size, canvas.shape[1])  # [B, S, H]
    # The axis that is summed over stands second; the other one, which comes next, last.
    if vertical_first:
        return _two_products(canvas.permute(0, 1, 3, 2), down, across).permute(0, 2, 1, 3)
    return _two_products(canvas.permute(0, 2, 3, 1), across, down).permute(0, 2, 3, 1)


def _two_products(pixels: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[B, P, 3, Q] by [B, S, P] and [B, S, Q] to [B, S, 3, S], rounded to 8 bits after each."""
    batch, size, other = len(pixels), first.shape[1], pixels.shape[3]
    halfway = _to_bytes(product(first, pixels.flatten(2).float())).view(batch, size * 3, other)
    return _to_bytes(product(second, halfway.transpose(1, 2)).transpose(1, 2)).view(batch, size, 3, size)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def product(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights [B, S, P] times values [B, P, Q], of whole numbers below 2^11, exact to float32 whatever matrix precision
    torch is set to.

    On CUDA float32 products may be TF32's, with 10 bits of fraction: enough for the values, not for the weights, which
    are therefore taken in two parts.
    """
    if not weights.is_cuda:
        return weights @ values
    coarse = coarse_part(weights)
    return coarse @ values + (weights - coarse) @ values


def coarse_part(weights: torch.Tensor) -> torch.Tensor:
    """float32 numbers cut to what TF32 holds."""
    return (weights.view(torch.int32) & _TF32_MASK).view(torch.float32)


def interpolation(
    begin: torch.Tensor, length: torch.Tensor, first: torch.Tensor, extent: torch.Tensor, size: int, canvas: int
) -> torch.Tensor:
    """The weights with which a canvas' pixels make each output pixel.

    Args:
        begin, length: float32 [B], the crop along this axis, in pixels of the canvas.
        first, extent: float32 [B], where the pixels begin that the filter may see, and how many they are; it is cut
            there and its weights normed to 1.
        size: S.
        canvas: P, the canvas' side.

    Returns:
        float32 [B, S, P], bands of PIL's BICUBIC.
    """
    begin, length = begin.double()[:, None], length.double()[:, None]
    scale = length / size
    centre = (
        begin + (torch.arange(size, device=begin.device) + 0.5) * scale
    )  # [B, S], in float64: weights follow to 1e-7
    near = centre.floor()
    pixel = torch.arange(canvas, device=begin.device, dtype=torch.float32)
    distance = (pixel - near.float()[..., None]) + (0.5 - (centre - near)).float()[..., None]  # [B, S, P]
    distance = (distance / scale.clamp(min=1).float()[..., None]).abs_().clamp_(max=_REACH)
    inner = (1.5 * distance - 2.5) * distance * distance + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = (
        torch.where(distance < 1, inner, outer)
        * (pixel >= first[:, None, None])
        * (pixel < (first + extent)[:, None, None])
    )
    return weights / weights.sum(2, keepdim=True)


# ---- jitter: Colour jitter and grey images for a batch on the device: torchvision's definitions, drawn per sample from
# (seed, epoch, position).
#
# B batch. Images are float32 [B, 3, H, W] in 0..1, changed in place.


FACTORS = 4
"""Brightness, contrast, saturation, hue: factors as in torchvision.transforms.functional.adjust_*."""
_FIRST_DRAW = 41  # behind those of train/data/crops.py
_LUMA = (0.2989, 0.587, 0.114)


@njit(cache=True)
def draw(
    strengths: np.ndarray,
    probability: float,
    grey_probability: float,
    seed: int,
    epochs: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is done to each sample.

    Args:
        strengths: float64 [FACTORS], as torchvision's ColorJitter takes them.
        probability, grey_probability: share of samples that are jittered, and made grey afterwards.
        seed, epochs, positions: what the draws depend on; int64 [B].

    Returns:
        factors float32 [B, FACTORS]; order int64 [B, FACTORS], the steps first to last, -1 where a sample is not
        jittered; grey bool [B].
    """
    batch = len(positions)
    factors, order = np.empty((batch, FACTORS), np.float32), np.full((batch, FACTORS), -1)
    grey = np.empty(batch, np.bool_)
    for row in range(batch):
        epoch, position = epochs[row], positions[row]
        grey[row] = uniform(seed, epoch, position, _FIRST_DRAW + 1) < grey_probability
        for step in range(FACTORS):
            share, strength = 2 * uniform(seed, epoch, position, _FIRST_DRAW + 2 + step) - 1, strengths[step]
            low = -strength if step == 3 else max(0.0, 1 - strength)
            high = strength if step == 3 else 1 + strength
            factors[row, step] = low + (high - low) * (share + 1) / 2
        if uniform(seed, epoch, position, _FIRST_DRAW) < probability:
            for step in range(FACTORS):  # Fisher and Yates: a random order
                other = int(uniform(seed, epoch, position, _FIRST_DRAW + 2 + FACTORS + step) * (step + 1))
                order[row, step] = order[row, other]
                order[row, other] = step
    return factors, order, grey


@torch.no_grad()
def jitter(images: torch.Tensor, factors: np.ndarray, order: np.ndarray, grey: np.ndarray) -> None:
    """Apply what `draw` gave, in place: first the four steps, each sample's in its own order, then grey."""
    steps = (_brightness, _contrast, _saturation, _hue)
    on_device = torch.from_numpy(factors).to(images.device, non_blocking=True)
    for turn in range(FACTORS):
        for number, step in enumerate(steps):
            rows = _rows(order[:, turn] == number, images)
            if len(rows):
                images[rows] = step(images[rows], on_device[rows, number][:, None, None, None])
    rows = _rows(grey, images)
    if len(rows):
        images[rows] = _luma(images[rows]).expand(-1, 3, -1, -1)


def _rows(chosen: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)


def _luma(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _blend(images: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def _brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, 0.0, factor)


def _contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, _luma(images).mean((1, 2, 3), keepdim=True), factor)


def _saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, _luma(images), factor)


def _hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the hue of HSV by a share of the circle; value and saturation stay."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    red, green, blue = (images / torch.where(spread == 0, 1, spread)[:, 0:1]).split(1, 1)
    hue = torch.where(
        high == images[:, 0:1], green - blue, torch.where(high == images[:, 1:2], 2 + blue - red, 4 + red - green)
    )
    hue = hue + 6 * turn
    # Of each channel: how far the hue's sixth is from where the channel is at its lowest (5, 3, 1 sixths onwards).
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    sixth = (hue + offsets).remainder(6)
    return high - spread * torch.minimum(sixth, 4 - sixth).clamp(0, 1)


def resamples(settings: Data, device: torch.device) -> bool:
    """Whether the device resamples: `data.resample`, where `auto` leaves it to CUDA and not to a CPU."""
    return settings.resample == "device" or (settings.resample == "auto" and device.type == "cuda")


class ImageInput:
    """Called with a batch: images float32 [B, 3, S, S] and label ids int32 [B, K], both on the device.

    Args:
        settings: `train.data`.
        device: where the model is.
        image_size: S.
        seed: of colour jitter and grey images.
    """

    def __init__(self, settings: Data, device: torch.device, *, image_size: int, seed: int) -> None:
        self._settings, self._device, self._size, self._seed = settings, device, image_size, seed
        self._mean = torch.tensor(settings.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(settings.std, device=device).view(1, 3, 1, 1)
        self._table = (torch.arange(256, device=device)[:, None] / 255 - self._mean.flatten()) / self._std.flatten()
        self._strengths = np.array(settings.color_jitter, np.float64)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, label_ids, boxes = batch.to(self._device)
        settings = self._settings
        coloured = settings.color_jitter_probability or settings.grey_probability
        if boxes is None and not coloured and pixels.device.type == "cpu":
            images = torch.empty(pixels.shape)
            _look_up(pixels.numpy(), self._table.numpy(), images.numpy())
            return images.permute(0, 3, 1, 2), label_ids
        if boxes is None or batch.boxes is None:
            images = pixels.permute(0, 3, 1, 2).float()
        else:
            width, height = batch.boxes[:, 2].numpy(), batch.boxes[:, 3].numpy()
            # As `vertical_first` of train/data/resize.py.
            images = resample_canvas(
                pixels, boxes, height - self._size > np.maximum(0, 2 * (width - self._size)), self._size
            )
        images = images / 255
        if coloured:
            chances = settings.color_jitter_probability, settings.grey_probability
            jitter(images, *draw(self._strengths, *chances, self._seed, batch.epochs, batch.positions))
        return images.sub_(self._mean).div_(self._std), label_ids


@njit(cache=True, nogil=True)
def _look_up(pixels: np.ndarray, table: np.ndarray, into: np.ndarray) -> None:
    """into[..., c] = table[pixel, c] for uint8 [B, S, S, 3]: the same floats as four passes over the batch, in one."""
    flat, out = pixels.reshape(-1, 3), into.reshape(-1, 3)
    for place in range(len(flat)):
        for channel in range(3):
            out[place, channel] = table[flat[place, channel], channel]


# ---- synthetic: Random images and labels, made once on the device: `train run --synthetic` shows what the model alone
# can do, without loader and disk.
#
# B batch (of this rank), S image side, V vocabulary, K label limit.


_LABELS_OF_A_SAMPLE = 12


@dataclass(frozen=True)
class SyntheticBatch:
    """images float32 [B, 3, S, S], as normalised as real ones; label_ids int32 [B, K], padded with PAD_ID; no image is
    bad.
    """

    images: torch.Tensor
    label_ids: torch.Tensor
    bad: int = 0


def synthetic_batches(
    settings: Train, vocabulary: int, label_limit: int, world: World, steps: int
) -> Iterator[SyntheticBatch]:
    """The same batch, once a step."""
    share, size = settings.batch_size // world.size, settings.model.image_size
    dice = torch.Generator(world.device).manual_seed(settings.runtime.seed + world.rank)
    images = torch.randn((share, 3, size, size), generator=dice, device=world.device)
    label_ids = torch.full((share, label_limit), PAD_ID, dtype=torch.int32, device=world.device)
    filled = min(_LABELS_OF_A_SAMPLE, label_limit, vocabulary)
    drawn = torch.randint(vocabulary, (share, 2 * filled), generator=dice, device=world.device)
    for row, ids in enumerate(drawn):
        distinct = ids.unique()[:filled]  # ascending and distinct, as label rows are
        label_ids[row, : len(distinct)] = distinct.int()
    batch = SyntheticBatch(images, label_ids)
    return (batch for _ in range(steps))


def synthetic_inputs(batch: SyntheticBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model takes: there is nothing left to do."""
    return batch.images, batch.label_ids
