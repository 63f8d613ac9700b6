"""From the loader's batch to what the model takes: on the device, resampled if the loader left that, jittered, normalised.

B batch (of this rank), S image side, K label limit.
"""

import numpy as np
import torch

from labels.native import njit
from labels.settings import Data
from train.batch import Batch
from train.canvas import resample_canvas
from train.jitter import draw, jitter


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
            images = resample_canvas(pixels, boxes, height - self._size > np.maximum(0, 2 * (width - self._size)), self._size)
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
