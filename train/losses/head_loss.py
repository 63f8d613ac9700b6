"""The head's matrix product and the loss as one module: features in, scalar out.

B batch, W trunk width, V vocabulary, K label limit.
"""

import torch
from torch import nn
from torch.nn import functional

from labels.settings import Loss
from train.losses.softmax import softmax_loss


class HeadLoss(nn.Module):
    """Loss of the configured kind; holds the label weights, no parameters.

    Args:
        settings: `train.loss`.
        idf: float32 [V].
    """

    idf: torch.Tensor

    def __init__(self, settings: Loss, idf: torch.Tensor) -> None:
        super().__init__()
        # Not a part of the weights: it comes from OUT, whose fingerprint every checkpoint names.
        self.register_buffer("idf", idf if settings.idf else (idf >= 0).float(), persistent=False)

    def forward(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch.

        Args:
            features: [B, W], after the head's norm.
            weight, bias: [V, W] and [V], of the head's linear layer.
            label_ids: int [B, K], padded with PAD_ID.

        Returns:
            float32 scalar.
        """
        return softmax_loss(functional.linear(features, weight, bias), label_ids, self.idf)
