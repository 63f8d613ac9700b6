"""From the loader's batch to what the model takes: on the device, resampled if the loader left that, jittered, normalised.

B batch (of this rank), S image side, K label limit.
"""

import numpy as np
import torch

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
        self._strengths = np.array(settings.color_jitter, np.float64)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, label_ids, boxes = batch.to(self._device)
        if boxes is None or batch.boxes is None:
            images = pixels.permute(0, 3, 1, 2).float()
        else:
            width, height = batch.boxes[:, 2].numpy(), batch.boxes[:, 3].numpy()
            # As `vertical_first` of train/resample.py.
            images = resample_canvas(pixels, boxes, height - self._size > np.maximum(0, 2 * (width - self._size)), self._size)
        images = images / 255
        settings = self._settings
        if settings.color_jitter_probability or settings.grey_probability:
            chances = settings.color_jitter_probability, settings.grey_probability
            jitter(images, *draw(self._strengths, *chances, self._seed, batch.epochs, batch.positions))
        return images.sub_(self._mean).div_(self._std), label_ids
