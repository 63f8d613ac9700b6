"""Colour jitter and grey images for a batch on the device: torchvision's definitions, drawn per sample from (seed, epoch, position).

B batch. Images are float32 [B, 3, H, W] in 0..1, changed in place.
"""

import numpy as np
import torch

from labels.native import njit
from train.data.crops import uniform

FACTORS = 4
"""Brightness, contrast, saturation, hue: factors as in torchvision.transforms.functional.adjust_*."""
_FIRST_DRAW = 41  # behind those of train/data/crops.py
_LUMA = (0.2989, 0.587, 0.114)


@njit(cache=True)
def draw(
    strengths: np.ndarray, probability: float, grey_probability: float, seed: int, epochs: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is done to each sample.

    Args:
        strengths: float64 [FACTORS], as torchvision's ColorJitter takes them.
        probability, grey_probability: share of samples that are jittered, and made grey afterwards.
        seed, epochs, positions: what the draws depend on; int64 [B].

    Returns:
        factors float32 [B, FACTORS]; order int64 [B, FACTORS], the steps first to last, -1 where a sample is not jittered; grey bool [B].
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
    hue = torch.where(high == images[:, 0:1], green - blue, torch.where(high == images[:, 1:2], 2 + blue - red, 4 + red - green))
    hue = hue + 6 * turn
    # Of each channel: how far the hue's sixth is from where the channel is at its lowest (5, 3, 1 sixths onwards).
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    sixth = (hue + offsets).remainder(6)
    return high - spread * torch.minimum(sixth, 4 - sixth).clamp(0, 1)
