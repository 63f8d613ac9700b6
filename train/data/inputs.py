"""What the model takes: batches from the loader, from threads over a Python function, or random ones.

    Loader -> Batch -> ImageInput, on the device: resample what the loader left to it, jitter, normalise
    feed_batches: rows -> threads: sample(row), collate -> batch     evaluations, fine-tuning, captioning, LLaVA
    synthetic_batches: the same random batch each step               `train run --synthetic`: the model's own speed

Images are float32 [B, 3, S, S], label ids int32 [B, K], both on the device. B batch (of this rank), S image side, H x W
canvas, K label limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from labels.manifest import PAD_ID
from labels.native import njit
from labels.settings import Data, Train
from train.data.files import Threads
from train.data.order import uniform
from train.distributed import World

if TYPE_CHECKING:
    from train.data.loader import Batch  # evaluations use the feeder without the loader

_PREFETCHED_BATCHES = 2
_CANVAS_BYTES = 1 << 28  # of float32 canvases that are resampled together
_REACH = 2.0  # of the cubic, in output pixels
_TF32_MASK = ~0x1FFF  # the bits of a float32 that TF32 keeps
FACTORS = 4  # brightness, contrast, saturation, hue: factors as in torchvision.transforms.functional.adjust_*
_FIRST_DRAW = 41  # after those of crop and flip, train/data/order.py
_LUMA = (0.2989, 0.587, 0.114)
_SYNTHETIC_LABELS = 12
Sample = TypeVar("Sample")
FedBatch = TypeVar("FedBatch")


def resamples(settings: Data, device: torch.device) -> bool:
    """Whether the device resamples: `data.resample`, where `auto` leaves it to CUDA and not to a CPU."""
    return settings.resample == "device" or (settings.resample == "auto" and device.type == "cuda")


class ImageInput:
    """Called with a batch of the loader: images and label ids on the device. `seed` draws jitter and grey images."""

    def __init__(self, settings: Data, device: torch.device, *, image_size: int, seed: int) -> None:
        self._settings, self._device, self._size, self._seed = settings, device, image_size, seed
        self._mean = torch.tensor(settings.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(settings.std, device=device).view(1, 3, 1, 1)
        self._table = (torch.arange(256, device=device)[:, None] / 255 - self._mean.flatten()) / self._std.flatten()
        self._strengths = np.array(settings.color_jitter, np.float64)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels, label_ids, boxes = batch.to(self._device)
        settings, size = self._settings, self._size
        coloured = settings.color_jitter_probability or settings.grey_probability
        if boxes is None and not coloured and pixels.device.type == "cpu":
            images = torch.empty(pixels.shape)
            _look_up(pixels.numpy(), self._table.numpy(), images.numpy())
            return images.permute(0, 3, 1, 2), label_ids
        if boxes is None or batch.boxes is None:
            images = pixels.permute(0, 3, 1, 2).float()
        else:
            width, height = batch.boxes[:, 2].numpy(), batch.boxes[:, 3].numpy()
            vertical_first = height - size > np.maximum(0, 2 * (width - size))  # as in train/data/resize.py
            images = resample_canvas(pixels, boxes, vertical_first, size)
        images = images / 255
        if coloured:
            chances = settings.color_jitter_probability, settings.grey_probability
            jitter(images, *draw(self._strengths, *chances, self._seed, batch.epochs, batch.positions))
        return images.sub_(self._mean).div_(self._std), label_ids


@njit(cache=True, nogil=True)
def _look_up(pixels: np.ndarray, table: np.ndarray, normalised: np.ndarray) -> None:
    """normalised[..., c] = table[pixel, c] for uint8 [B, S, S, 3]: one pass instead of four, the same floats."""
    flat, out = pixels.reshape(-1, 3), normalised.reshape(-1, 3)
    for pixel in range(len(flat)):
        for channel in range(3):
            out[pixel, channel] = table[flat[pixel, channel], channel]


@torch.no_grad()
def resample_canvas(canvas: Tensor, boxes: Tensor, vertical_first: np.ndarray, size: int) -> Tensor:
    """Crops as the decoder left them to S x S: PIL's antialiased bicubic as two batched matrix products, on any device.

    canvas uint8 [B, H, W, 3]; boxes float32 [B, BOX] (train/data/decode.py) on the same device; vertical_first bool [B]
    on the host: which pass comes first, as PIL rounds to 8 bits between. Returns whole numbers, float32 [B, 3, S, S].
    """
    out = torch.empty((len(canvas), 3, size, size), device=canvas.device)
    crops_at_once = max(1, _CANVAS_BYTES // (4 * canvas[0].numel()))
    for vertical in (False, True):
        rows = torch.from_numpy(np.flatnonzero(vertical_first == vertical))
        for part in rows.to(canvas.device, non_blocking=True).split(crops_at_once):
            out[part] = _resample(canvas[part], boxes[part], vertical, size)
    return out


def _resample(canvas: Tensor, boxes: Tensor, vertical_first: bool, size: int) -> Tensor:
    x, y, width, height, left, top, columns, rows, flip = boxes.unbind(1)
    across = interpolation(x, width, left, columns, size, canvas.shape[2])  # [B, S, W]
    across = torch.where(flip.bool()[:, None, None], across.flip(1), across)
    down = interpolation(y, height, top, rows, size, canvas.shape[1])  # [B, S, H]
    # The axis that is summed over is second; the other one, which comes next, last.
    if vertical_first:
        return _two_products(canvas.permute(0, 1, 3, 2), down, across).permute(0, 2, 1, 3)
    return _two_products(canvas.permute(0, 2, 3, 1), across, down).permute(0, 2, 3, 1)


def _two_products(pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[B, P, 3, Q] by [B, S, P] and [B, S, Q] to [B, S, 3, S], rounded to 8 bits after each."""
    batch, size, columns = len(pixels), first.shape[1], pixels.shape[3]
    halfway = _to_bytes(product(first, pixels.flatten(2).float())).view(batch, size * 3, columns)
    return _to_bytes(product(second, halfway.transpose(1, 2)).transpose(1, 2)).view(batch, size, 3, size)


def _to_bytes(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, S, P] times values [B, P, Q], whole numbers below 2^11: exact to float32 in any matrix precision.

    On CUDA float32 products may be TF32's, with 10 bits of fraction: enough for the values, not for the weights, which
    are therefore split in two parts.
    """
    if not weights.is_cuda:
        return weights @ values
    coarse = coarse_part(weights)
    return coarse @ values + (weights - coarse) @ values


def coarse_part(weights: Tensor) -> Tensor:
    """float32 numbers cut to what TF32 holds."""
    return (weights.view(torch.int32) & _TF32_MASK).view(torch.float32)


def interpolation(begin: Tensor, length: Tensor, first: Tensor, extent: Tensor, size: int, canvas: int) -> Tensor:
    """The weights of P canvas pixels in each output pixel: float32 [B, S, P], bands of PIL's BICUBIC.

    begin, length float32 [B]: the crop along this axis, in canvas pixels. first, extent float32 [B]: the pixels that
    the filter may see; it is cut there and its weights normed to 1.
    """
    begin, length = begin.double()[:, None], length.double()[:, None]
    scale = length / size
    # [B, S], in float64: the weights are accurate to 1e-7
    centre = begin + (torch.arange(size, device=begin.device) + 0.5) * scale
    near = centre.floor()
    pixel = torch.arange(canvas, device=begin.device, dtype=torch.float32)
    distance = (pixel - near.float()[..., None]) + (0.5 - (centre - near)).float()[..., None]  # [B, S, P]
    distance = (distance / scale.clamp(min=1).float()[..., None]).abs_().clamp_(max=_REACH)
    inner = (1.5 * distance - 2.5) * distance * distance + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    first, end = first[:, None, None], (first + extent)[:, None, None]
    weights = torch.where(distance < 1, inner, outer) * (pixel >= first) * (pixel < end)
    return weights / weights.sum(2, keepdim=True)


# Colour jitter and grey images, torchvision's definitions, drawn per sample from (seed, epoch, position). Images are
# float32 [B, 3, H, W] in 0..1, changed in place.


@njit(cache=True)
def draw(
    strengths: np.ndarray,
    probability: float,
    grey_probability: float,
    seed: int,
    epochs: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the jitter of each sample: factors float32 [B, FACTORS], order int64 [B, FACTORS], grey bool [B].

    `strengths` float64 [FACTORS] are torchvision's ColorJitter's; the probabilities are the shares of samples that are
    jittered and made grey. `order` has the steps first to last, -1 where a sample is not jittered.
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
                swapped = int(uniform(seed, epoch, position, _FIRST_DRAW + 2 + FACTORS + step) * (step + 1))
                order[row, step] = order[row, swapped]
                order[row, swapped] = step
    return factors, order, grey


@torch.no_grad()
def jitter(images: Tensor, factors: np.ndarray, order: np.ndarray, grey: np.ndarray) -> None:
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


def _rows(mask: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(images.device, non_blocking=True)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _blend(images: Tensor, background: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * background).clamp_(0, 1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, 0.0, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images).mean((1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images), factor)


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV by a share of the circle; value and saturation stay."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    red, green, blue = (images / torch.where(spread == 0, 1, spread)[:, 0:1]).split(1, 1)
    green_or_blue = torch.where(high == images[:, 1:2], 2 + blue - red, 4 + red - green)
    hue = torch.where(high == images[:, 0:1], green - blue, green_or_blue) + 6 * turn
    # For each channel: how far the hue's sixth is from where the channel is at its lowest (5, 3, 1 sixths onwards).
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    sixth = (hue + offsets).remainder(6)
    return high - spread * torch.minimum(sixth, 4 - sixth).clamp(0, 1)


def feed_batches(
    batches: Iterable[np.ndarray],
    sample: Callable[[int], Sample],
    collate: Callable[[np.ndarray, list[Sample]], FedBatch],
    threads: int,
) -> Generator[FedBatch]:
    """Batches in order, made in threads from the rows of each, int64 [B]; a batch raises its errors when it is taken.

    While the caller has a batch, `_PREFETCHED_BATCHES` more are made or wait, so that memory is bounded. The threads
    end with the generator: when it is exhausted, closed or dropped, or when it raises.
    """

    def make_part(rows: np.ndarray) -> list[Sample]:
        return [sample(row) for row in rows.tolist()]

    def make_batch(rows: np.ndarray, parts: list[Future[list[Sample]]]) -> FedBatch:
        return collate(rows, [made for part in parts for made in part.result()])

    waiting: deque[Future[FedBatch]] = deque()
    # One thread more, since make_batch waits for its parts, which are submitted before it.
    with Threads(threads + 1, "feeder") as pool:
        for rows in batches:
            bounds = np.linspace(0, len(rows), min(threads, len(rows)) + 1).astype(int)
            parts = [pool.submit(make_part, rows[low:high]) for low, high in pairwise(bounds)]
            waiting.append(pool.submit(make_batch, rows, parts))
            if len(waiting) > _PREFETCHED_BATCHES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def stack_pinned(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays of one shape as a tensor [B, ...] on the CPU; for a GPU page-locked, so that asynchronous copies work.

    torch reuses such memory only when the copies from it are done.
    """
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    stacked = torch.empty((len(arrays), *arrays[0].shape), dtype=dtype, pin_memory=device.type == "cuda")
    np.stack(arrays, out=stacked.numpy())
    return stacked


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in page-locked memory, where `device` is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def rows_of_steps(count: int, size: int, seed: int, first_step: int, steps: int) -> Iterator[np.ndarray]:
    """The rows, int64 [size], of each step's batch: permutations of [0, count), one after the other without a gap."""
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first_step, steps):
        positions, rows = np.arange(step * size, (step + 1) * size), np.empty(size, np.int64)
        for number in range(positions[0] // count, positions[-1] // count + 1):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed, number]).permutation(count)
            in_epoch = positions // count == number
            rows[in_epoch] = order[positions[in_epoch] % count]
        yield rows


@dataclass(frozen=True)
class SyntheticBatch:
    """Random images, as normalised as real ones, and label ids padded with PAD_ID; no image is bad."""

    images: Tensor
    label_ids: Tensor
    bad: int = 0


def synthetic_batches(
    settings: Train, vocabulary: int, label_limit: int, world: World, steps: int
) -> Iterator[SyntheticBatch]:
    """The same batch in each step, made once on the device."""
    share, size = settings.batch_size // world.size, settings.model.image_size
    dice = torch.Generator(world.device).manual_seed(settings.runtime.seed + world.rank)
    images = torch.randn((share, 3, size, size), generator=dice, device=world.device)
    label_ids = torch.full((share, label_limit), PAD_ID, dtype=torch.int32, device=world.device)
    filled = min(_SYNTHETIC_LABELS, label_limit, vocabulary)
    drawn = torch.randint(vocabulary, (share, 2 * filled), generator=dice, device=world.device)
    for row, ids in enumerate(drawn):
        distinct = ids.unique()[:filled]  # ascending and distinct, as label rows are
        label_ids[row, : len(distinct)] = distinct.int()
    batch = SyntheticBatch(images, label_ids)
    return (batch for _ in range(steps))


def synthetic_inputs(batch: SyntheticBatch) -> tuple[Tensor, Tensor]:
    return batch.images, batch.label_ids
