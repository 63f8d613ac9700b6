"""From the loader's batch to what the model takes: on the device, normalised, channels first.

B batch (of this rank), S image side, K label limit.
"""

import torch

from labels.settings import Data
from train.loader import Batch


class ImageInput:
    """Called with a batch: images float32 [B, 3, S, S] and label ids int32 [B, K], both on the device.

    Args:
        settings: `train.data`.
        device: where the model is.
    """

    def __init__(self, settings: Data, device: torch.device) -> None:
        self._device = device
        self._mean = torch.tensor(settings.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(settings.std, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, label_ids = batch.to(self._device)
        return (images.permute(0, 3, 1, 2).float() - self._mean) / self._std, label_ids
