"""Losses that take every class by itself, such as binary cross-entropy and the asymmetric loss. R rows, V vocabulary, K label limit.

Each is the loss of a row without labels, one dense reduction, and a correction at the labels. The dense part sees -inf at the labels,
where a loss of negatives is 0: nothing large is added and taken away again. IDF weighs the positives (Positives.weights, mean 1 over a
row's labels, so that positives and negatives keep their balance); the paper compares these losses without IDF and says nothing of it.
A row without labels is all negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.losses.blocks import float_blocks
from train.losses.positives import Positives


@dataclass(frozen=True)
class Classwise:
    """A row loss (see head.RowLoss): the sum over all classes.

    Attributes:
        negative: logits [R, V] -> losses [R]; with True, leaves the slope in the logits.
        positive: logits [R, K] -> losses [R, K], slopes [R, K].
    """

    negative: Callable[[torch.Tensor, bool], torch.Tensor]
    positive: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, logits: torch.Tensor, labels: Positives, gradient: bool) -> torch.Tensor:
        picked = logits.gather(1, labels.ids)
        logits.scatter_(1, labels.ids, picked.masked_fill(labels.labelled, -torch.inf))
        losses = labels.shares.new_empty(len(logits))
        for rows, block in float_blocks(logits, keep=gradient):
            losses[rows] = self.negative(block, gradient)
        loss, slope = self.positive(picked.to(losses.dtype))
        if gradient:
            slope = (labels.weights * slope).to(logits.dtype)
            logits.scatter_(1, labels.ids, torch.where(labels.labelled, slope, logits.gather(1, labels.ids)))
        return losses + (labels.weights * loss * labels.valid).sum(dim=1)
