"""Crops of a batch, as the decoder left them, to S x S: PIL's antialiased bicubic as two batched matrix products, on any device.

B batch, H x W canvas, S image side.
"""

import numpy as np
import torch

_AT_ONCE_BYTES = 1 << 28  # of float32 canvases
_REACH = 2.0
_TF32_MASK = ~0x1FFF  # of a float32's bits: what TF32 keeps


@torch.no_grad()
def resample_canvas(canvas: torch.Tensor, boxes: torch.Tensor, vertical_first: np.ndarray, size: int) -> torch.Tensor:
    """Resample each crop.

    Args:
        canvas: uint8 [B, H, W, 3].
        boxes: float32 [B, BOX] (train/pixels.py), on the same device.
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
    """weights [B, S, P] times values [B, P, Q], of whole numbers below 2^11, exact to float32 whatever matrix precision torch is set to.

    On CUDA float32 products may be TF32's, with 10 bits of fraction: enough for the values, not for the weights, which are therefore
    taken in two parts.
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
        first, extent: float32 [B], where the pixels begin that the filter may see, and how many they are; it is cut there and its weights
            normed to 1.
        size: S.
        canvas: P, the canvas' side.

    Returns:
        float32 [B, S, P], bands of PIL's BICUBIC.
    """
    begin, length = begin.double()[:, None], length.double()[:, None]
    scale = length / size
    centre = begin + (torch.arange(size, device=begin.device) + 0.5) * scale  # [B, S], in float64: weights follow to 1e-7
    near = centre.floor()
    pixel = torch.arange(canvas, device=begin.device, dtype=torch.float32)
    distance = (pixel - near.float()[..., None]) + (0.5 - (centre - near)).float()[..., None]  # [B, S, P]
    distance = (distance / scale.clamp(min=1).float()[..., None]).abs_().clamp_(max=_REACH)
    inner = (1.5 * distance - 2.5) * distance * distance + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, inner, outer) * (pixel >= first[:, None, None]) * (pixel < (first + extent)[:, None, None])
    return weights / weights.sum(2, keepdim=True)
