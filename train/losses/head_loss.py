"""The head's linear layer and the loss as one module: features in, scalar out.

B batch, W trunk width, V vocabulary, K label limit.
"""

import torch
from torch import nn

from labels.settings import Loss
from train.losses.classwise import asymmetric, bce
from train.losses.fused import fused, product_type
from train.losses.head import Head, RowLoss
from train.losses.positives import Positives, positives
from train.losses.ranks import everyone
from train.losses.softmax import softmax_rows
from train.losses.two_way import two_way


class HeadLoss(nn.Module):
    """Loss of the configured kind; holds the label weights, no parameters.

    Args:
        settings: `train.loss`.
        idf: float32 [V].
    """

    idf: torch.Tensor

    def __init__(self, settings: Loss, idf: torch.Tensor) -> None:
        super().__init__()
        self.settings = settings
        self._buffer: torch.Tensor | None = None  # kept from step to step: touching fresh memory costs more than using it
        # Not a part of the weights: it comes from OUT, whose fingerprint every checkpoint names.
        self.register_buffer("idf", idf if settings.idf else torch.ones_like(idf), persistent=False)

    def forward(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch. Its gradients are computed here, and are exact under autocast as under float32.

        Args:
            features: [B, W], after the head's norm.
            weight, bias: [V, W] and [V], of the head's linear layer.
            label_ids: int [B, K], padded with PAD_ID.

        Returns:
            float32 scalar; float64 for a head in float64. Its gradient can be asked for once.
        """
        dtype = product_type(features, weight)

        def compute(needs: tuple[bool, ...]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
            with torch.autocast(weight.device.type, enabled=False):
                head = Head(features, weight, bias, needs, dtype, self.settings.memory, self._buffer)
                labels = positives(label_ids, self.idf.to(head.sums))
                loss = batch_loss(self.settings, head, labels)
                self._buffer = head.buffer
                return loss, head.gradients

        return fused(features, weight, bias, compute)  # type: ignore[call-arg]  # the decorator hides the parameters


def batch_loss(settings: Loss, head: Head, labels: Positives) -> torch.Tensor:
    """The loss of a batch, scalar; adds its gradients to the head's.

    Args:
        settings: which loss.
        head: of these samples.
        labels: of these samples.
    """
    if settings.name == "two_way":
        return two_way(head, labels, everyone())
    scale = 1 / (len(head.features) * (len(head.weight) if settings.name == "soft_margin" else 1))
    return head.rows(row_loss(settings), labels, scale).sum() * scale


def row_loss(settings: Loss) -> RowLoss:
    """The loss of rows by its name; `soft_margin` is `bce` divided by V (torch.nn.MultiLabelSoftMarginLoss)."""
    if settings.name == "softmax":
        return softmax_rows
    if settings.name == "asl":
        return asymmetric(settings.gamma_negative, settings.gamma_positive, settings.clip)
    return bce()
