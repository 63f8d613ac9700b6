"""The head's linear layer and the loss as one module: features in, scalar out.

B batch, W trunk width, V vocabulary, K label limit.
"""

import torch
from torch import nn

from labels.settings import Loss
from train.losses.distributed import ranks, split_of, sum_over
from train.losses.fused import fused, product_type
from train.losses.head import Head, positives
from train.losses.kinds import kind


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
        self._batch_loss = kind(settings.name).batch_loss
        self._buffer: torch.Tensor | None = (
            None  # kept from step to step: touching fresh memory costs more than using it
        )
        # Not a part of the weights: it comes from OUT, whose fingerprint every checkpoint names.
        self.register_buffer("idf", idf if settings.idf else torch.ones_like(idf), persistent=False)

    def forward(
        self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, label_ids: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss of a batch. Its gradients are computed here, and are exact under autocast as under float32.

        Args:
            features: [B, W], after the head's norm.
            weight, bias: [V, W] and [V], of the head's linear layer; where they are split by class
                (train/distributed.py), all ranks call this together, and each gets the loss of all ranks' samples.
            label_ids: int [B, K], padded with PAD_ID.

        Returns:
            float32 scalar; float64 for a head in float64. Its gradient can be asked for once.
        """
        split = split_of(weight)
        if split is not None:
            weight, bias = weight.to_local(), bias.to_local()  # type: ignore[operator]  # they are DTensors
        dtype = product_type(features, weight)

        def compute(needs: tuple[bool, ...]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
            with torch.autocast(weight.device.type, enabled=False):
                rows, ids = (
                    (features, label_ids)
                    if split is None
                    else (split.gather(features.to(dtype)), split.gather(label_ids))
                )
                head = Head(rows, weight, bias, needs, dtype, self.settings.memory, self._buffer, split)
                labels = positives(ids, self.idf.to(head.sums))
                if split is not None:
                    labels = labels.of_classes(split.first, len(weight))
                loss, (into_features, *into_head) = self._batch_loss(self.settings, head, labels), head.gradients
                self._buffer = head.buffer
                if split is not None:
                    sum_over(loss, split.group)
                    if (
                        into_features is not None
                    ):  # the mean over the ranks is taken of the trunk's gradients, and of them alone
                        into_features = split.sum_own(into_features).mul_(ranks(split.group))
                return loss, [into_features, *into_head]

        return fused(features, weight, bias, compute)  # type: ignore[call-arg]  # the decorator hides the parameters
